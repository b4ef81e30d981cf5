"""The wire models that endpoints share: the fields of requests for text, token counts and errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from ...engine.messages import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from ..chat.structured_output import MAX_CHOICES
from ..generation.generation import MAX_SEQUENCES
from .types import (
    MAX_INT,
    JsonSchema,
    KeptTokens,
    Name,
    Priority,
    Salt,
    SchemaName,
    StopText,
    StrictModel,
    TokenId,
    TokenIds,
)

TokenIdText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
LogitBias = Annotated[dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)]
BadWords = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=256)]], Field(max_length=128)]
Grammar = Annotated[str, StringConstraints(min_length=1, max_length=2**16)]


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(None, description="Send a last chunk with the token counts.")
    continuous_usage_stats: bool | None = Field(None, description="Send the token counts so far with every chunk.")
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are never padded.")


class JsonSchemaFormat(StrictModel):
    """A named schema that the answer must satisfy."""

    name: SchemaName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    json_schema: JsonSchema = Field(alias="schema", description="JSON Schema of the answer.")
    strict: bool | None = Field(None, description="Accepted; the schema is enforced either way.")


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]
    value: JsonSchema | None = Field(None, description="A schema, as Hugging Face's client writes it.")


class JsonSchemaResponseFormat(StrictModel):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


Format = TextFormat | JsonObjectFormat | JsonSchemaFormat
ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaResponseFormat, Field(discriminator="type")]


class StructuredOutputs(StrictModel):
    """vLLM's structured output options; set exactly one."""

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
    bad_words: BadWords | None = Field(None, description="Words that must not be generated.")
    allowed_token_ids: TokenIds | None = Field(None, description="Only these token ids may be generated.")
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
    return_dynamics: bool | None = Field(None, description="Report the network's dynamics for each token.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    # Accepted and ignored.
    store: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


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
    """The network's dynamics for one generated token; the lists have one entry per layer."""

    token_id: int
    token: str
    input_token_id: int = Field(description="The token that was read; its id selects the expert.")
    experts: list[int]
    routed_experts: list[list[int]] = Field(description="All experts that the layer used, the first one first.")
    expert_weights: list[list[float]] = Field(description="The weight of each of them in their sum.")
    rerouted: list[bool] = Field(description="Whether mu selected another expert instead.")
    mu_norm: list[float]
    velocity_norm: list[float]


class ChoiceDetails(StrictModel):
    """The fields that choices of chats and of completions share."""

    index: int
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    dynamics: list[TokenDynamics] | None = None


class ErrorBody(StrictModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(StrictModel):
    """Body of every error response (status 400 or above)."""

    error: ErrorBody
