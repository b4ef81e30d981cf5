"""OpenAI's requests and answers as pydantic models: the bounds that are checked are the bounds in the OpenAPI page.

A field that is null is absent. Answers are written as plain JSON for speed; their models stand here for the
OpenAPI page, and the tests hold every answer against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..engine.messages import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

MAX_TEXT = 4 * 2**20
MAX_IDS = 2**20
MAX_PROMPTS = 256
MAX_SEQUENCES = 1024
MAX_INT = 2**31 - 1

# Fields of OpenAI that mean something which this server cannot do, with the values that ask for nothing.
# Any other value is refused by name.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}

Name = Annotated[str, StringConstraints(max_length=512)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=128)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


class StrictModel(BaseModel):
    """A request or a part of one: no unknown fields, no conversions, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(StrictModel):
    """One text of a message made of parts."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]


class InstructionMessage(StrictModel):
    """What the application says to the model."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(StrictModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(StrictModel):
    """What the model said before; the fields that hold nothing let a client send an answer back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(StrictModel):
    """What a called tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class StreamOptions(StrictModel):
    """How a stream is written."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the token counts.")


class GenerationRequest(StrictModel):
    """The fields that chat and completions share."""

    model: Name | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT, description="-1 and 0 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description=f"Answers per prompt; prompts times n ≤ {MAX_SEQUENCES}.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Choice j draws with seed + j.")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the end of the text or turn.")
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(
        None, ge=-(2**31), le=MAX_INT, description="Lower goes first, where the server schedules by priority."
    )
    cache_salt: Salt | None = Field(None, description="Only requests of one salt share computed prompts.")

    # OpenAI's bookkeeping, accepted because ignoring it harms nobody.
    user: Name | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    verbosity: Name | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Wins over max_tokens.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Without it, the rest of the context.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs.")


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description=f"One or more texts or lists of token ids; prompts times n ≤ {MAX_SEQUENCES}.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="16 without it.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = Field(None, description="Put the model's first token before a text prompt.")


class PromptTokensDetails(StrictModel):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class CompletionTokensDetails(StrictModel):
    """Of the answer's tokens, those spent on reasoning."""

    reasoning_tokens: int


class Usage(StrictModel):
    """Token counts of one request."""

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
    """The chosen token at a position, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(StrictModel):
    """Log-probabilities of a chat answer, of the raw distribution."""

    content: list[TokenLogprob]


class CompletionLogprobs(StrictModel):
    """Log-probabilities in the older format."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class AnswerMessage(StrictModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(StrictModel):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(StrictModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Delta(StrictModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(StrictModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(StrictModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(StrictModel):
    """One continuation of a prompt; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(StrictModel):
    """Answer of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(StrictModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(StrictModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(StrictModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(StrictModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody
