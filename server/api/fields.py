"""What endpoints share: types with their bounds, the fields of requests for text, token counts and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ...engine.errors import RequestError
from ...engine.messages import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams
from ..chat.conversation import AnswerFormat, Sampling
from ..chat.served_model import ServedModel
from ..chat.structured import (
    MAX_CHOICES,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from ..generation.generation import MAX_SEQUENCES, Generation
from ..http.middleware import RequestContext

MAX_TEXT = 4 * 2**20
MAX_IDS = 2**20
MAX_INT = 2**31 - 1
MAX_PROMPTS = 256
MAX_BAD_WORDS = 128
MAX_TOOLS = 128
LOGPROB_FIELDS = ("logprobs", "top_logprobs", "prompt_logprobs")

# OpenAI's fields that this server does not support, with the values that have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "web_search_options": (),
}

Name = Annotated[str, StringConstraints(max_length=512)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=128)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenIdText, Bias], Field(max_length=MAX_LOGIT_BIAS)]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]
BadWords = Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)]
Grammar = Annotated[str, StringConstraints(min_length=1, max_length=2**16)]
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Description = Annotated[str, StringConstraints(max_length=2**16)]
JsonSchema = dict[str, Any]
Priority = Annotated[
    int | None, Field(ge=-(2**31), le=MAX_INT, description="Lower goes first, under policy `priority`.")
]
KeptTokens = Annotated[int | None, Field(ge=-1, le=MAX_INT, description="Keep the last N tokens; -1: all that fit.")]
GiveWay = BeforeValidator(lambda value: value)
"""Lets other threads run while the items of a long list are checked; without any Python code, that is one step."""


class StrictModel(BaseModel):
    """A model without unknown fields, conversions or infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(None, description="Send a last chunk with the token counts.")
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are never padded.")


class JsonSchemaFormat(StrictModel):
    """A named schema that the answer must satisfy."""

    name: SchemaName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    json_schema: JsonSchema = Field(alias="schema", description="JSON Schema of the answer.")
    strict: bool | None = Field(None, description="The schema is enforced with true and with false.")


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(StrictModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaResponseFormat, Field(discriminator="type")]


class StructuredOutputs(StrictModel):
    """The format of the text, as vLLM's clients ask for it: exactly one of these."""

    json_schema: JsonSchema | None = Field(None, alias="json", description="JSON Schema of the answer.")
    regex: Grammar | None = Field(None, description="Regular expression that matches the whole answer.")
    choice: Annotated[list[StopText], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None
    grammar: Grammar | None = Field(None, description="Grammar in Lark's notation; its first rule is `start`.")

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("needs exactly one of json, regex, choice and grammar")
        return self


class SamplingRequest(StrictModel):
    """The fields of every request for text."""

    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT, description="-1 and 0 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Repeatable draws; choice j uses seed + j.")
    priority: Priority = None
    cache_salt: Salt | None = Field(None, description="Only requests with the same salt share cached prompts.")


class OpenAIRequest(SamplingRequest):
    """The fields that chats, completions and responses share."""

    model: Name | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Continue past the end of the text or turn.")
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: LogitBias | None = Field(None, description="Added to the logits of these token ids.")
    bad_words: BadWords | None = Field(None, description="Words that are never completed.")
    allowed_token_ids: TokenIds | None = Field(None, description="Only these are generated.")
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool | None = None

    # Accepted and ignored.
    user: Name | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None


class GenerationRequest(OpenAIRequest):
    """The fields that chats and completions share."""

    n: int | None = Field(None, ge=1, le=128, description=f"Answers per prompt; prompts times n ≤ {MAX_SEQUENCES}.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of the prompt's tokens."
    )
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: KeptTokens = None
    return_dynamics: bool | None = Field(None, description="Report what the network did for each token.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    # Accepted and ignored.
    store: bool | None = None
    verbosity: Name | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


GRAMMARS: dict[str, Callable[..., str]] = {
    "json_schema": json_schema_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}
"""Makes the grammar of each kind of structured output."""
SAMPLING_FIELDS = {*SamplingParams.__struct_fields__} - {"max_tokens", "logprobs", "grammar"}


def read_sampling(body: SamplingRequest, model: ServedModel) -> Sampling:
    """Return what a request sets of `SamplingParams`; raises `RequestError`."""
    if getattr(body, "stream_options", None) is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in LOGPROB_FIELDS:
        value, most = getattr(body, name, None), model.flags.max_logprobs
        if value is not None and value is not True and value > most:
            raise RequestError(f"{name} must be at most {most} on this server, got {value}.", param=name)
    values = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name, None)) is not None}
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    if "logit_bias" in values:
        values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    if "allowed_token_ids" in values:
        values["allowed_token_ids"] = sorted({*values["allowed_token_ids"]})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def start_generation(
    context: RequestContext,
    body: SamplingRequest,
    model: ServedModel,
    prompts: list[list[int]],
    params: Sequence[SamplingParams],
    field: str,
) -> Generation:
    """Submit the prompts; an error calls them `field`. Raises as `Generation` does."""
    return Generation(
        model.engine, model.metrics, context, prompts, params, field=field, n=getattr(body, "n", None) or 1,
        priority=body.priority or 0, cache_salt=body.cache_salt, streams=bool(body.stream),
    )  # fmt: skip


def read_format(
    wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    outputs: StructuredOutputs | None,
    field: str,
    schema_field: str,
) -> AnswerFormat | None:
    """Return the format that a request asks for in `field` or in structured_outputs; raises `RequestError`."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None if outputs is None else _structured_format(outputs)
    if outputs is not None:
        raise RequestError(f"structured_outputs and {field} cannot both be given.", param="structured_outputs")
    if isinstance(wanted, JsonObjectFormat):
        return AnswerFormat(json_object_grammar(), field, field)
    grammar = json_schema_grammar(wanted.json_schema, wanted.strict is True, schema_field)
    return AnswerFormat(grammar, field, schema_field)


def read_response_format(body: GenerationRequest) -> AnswerFormat | None:
    """Return the format of a chat or completion; raises `RequestError`."""
    form, field = body.response_format, "response_format"
    wanted = form.json_schema if isinstance(form, JsonSchemaResponseFormat) else form
    return read_format(wanted, body.structured_outputs, field, f"{field}.json_schema.schema")


def _structured_format(outputs: StructuredOutputs) -> AnswerFormat:
    ((kind, value),) = ((name, value) for name, value in outputs if value is not None)
    field = f"structured_outputs.{kind}".removesuffix("_schema")
    return AnswerFormat(GRAMMARS[kind](value, param=field), "structured_outputs", field)


class PromptTokensDetails(StrictModel):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(StrictModel):
    """How many of the completion's tokens were reasoning."""

    reasoning_tokens: int


class Usage(StrictModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(StrictModel):
    """One candidate at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token at a position, and the likeliest candidates."""

    top_logprobs: list[TopLogprob]


class PromptLogprob(StrictModel):
    """One candidate at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class TokenDynamics(StrictModel):
    """What the network did for one generated token; the lists have one entry per layer."""

    token_id: int
    token: str
    input_token_id: int = Field(description="The token that was read; its id selects the expert.")
    experts: list[int]
    rerouted: list[bool] = Field(description="Whether mu selected another expert instead.")
    mu_norm: list[float]
    velocity_norm: list[float]


class ChoiceDetails(StrictModel):
    """The fields that choices of chats and of completions share."""

    index: int
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    dynamics: list[TokenDynamics] | None = None


FinishReason = Literal["stop", "length"]


class ErrorBody(StrictModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(StrictModel):
    """Answer with any status of 400 or more."""

    error: ErrorBody
