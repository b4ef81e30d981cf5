"""The Responses API's wire models: requests, responses, the events of a stream, and stored items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ....engine.messages import MAX_LOGPROBS
from ..fields import JsonObjectFormat, JsonSchemaFormat, OpenAIRequest, TextFormat, TokenLogprob
from ..types import MAX_TOKENS, MAX_TOOLS, Description, JsonSchema, Name, StrictModel, TemplateVariables, Text, ToolName

MAX_ITEMS = 4096
Summary = Literal["auto", "concise", "detailed"]
SUMMARIES = (None, "auto", "concise", "detailed")
Item = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


def _refuse(value: Any) -> Any:
    if value is not None and value is not False:
        raise ValueError("is not supported by this server")
    return value


UnsupportedFlag = Annotated[Literal[False] | None, BeforeValidator(_refuse)]


class InputText(StrictModel):
    """A text part of a message or of a function's result."""

    type: Literal["input_text"]
    text: Text


class AssistantText(StrictModel):
    """A text part of an earlier response."""

    type: Literal["output_text"]
    text: Text


MessagePart = Annotated[InputText | AssistantText, Field(discriminator="type")]


class InputMessage(StrictModel):
    """A message of the user, of the application, or of the model in an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[MessagePart], Field(min_length=1, max_length=1024, fail_fast=True)]
    id: Name | None = None
    status: Status | None = None


class InputCall(StrictModel):
    """A function call of an earlier response, as the server returned it."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text = Field(description="JSON text of an object.")
    id: Name | None = None
    status: Status | None = None


class InputCallOutput(StrictModel):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Text | Annotated[list[InputText], Field(min_length=1, max_length=1024, fail_fast=True)]
    id: Name | None = None
    status: Status | None = None


class ItemReference(StrictModel):
    """An output item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: Name


def _with_type(item: Any) -> Any:
    """Add the type of a message, which may leave it out."""
    return {"type": "message"} | item if isinstance(item, dict) and "role" in item else item


InputItem = Annotated[
    Annotated[InputMessage | InputCall | InputCallOutput | ItemReference, Field(discriminator="type")],
    BeforeValidator(_with_type),
]


class FunctionTool(StrictModel):
    """A function that the model may call: the only kind of tool."""

    type: Literal["function"]
    name: ToolName
    description: Description | None = None
    parameters: JsonSchema | None = Field(None, description="JSON Schema of the arguments (default: none).")
    strict: bool | None = None


class FunctionChoice(StrictModel):
    """The function that must be called, or one of those that are allowed."""

    type: Literal["function"]
    name: ToolName


class AllowedFunctions(StrictModel):
    """The only tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


NamedFunctions = Annotated[FunctionChoice | AllowedFunctions, Field(discriminator="type")]
ToolChoice = Literal["none", "auto", "required"] | NamedFunctions


class SchemaFormat(JsonSchemaFormat):
    """A text that satisfies a JSON schema."""

    type: Literal["json_schema"]


class TextOptions(StrictModel):
    """The format of the output text."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Has no effect.")


class ReasoningOptions(StrictModel):
    """The reasoning before the answer: how much, and whether as a summary."""

    effort: str | None = Field(description="As requested; none if the model does not reason.")
    summary: Summary | None = Field(description="As requested; the summary has all of the reasoning.")


class ResponseStreamOptions(StrictModel):
    include_obfuscation: UnsupportedFlag = None


class ResponseRequest(OpenAIRequest):
    """Body of `POST /v1/responses`; `input`, a user's text or items, is optional with `previous_response_id`."""

    input: Text | Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    instructions: Text | None = Field(None, description="System message of this response only.")
    previous_response_id: Name | None = Field(None, description="Continue from this stored response.")
    store: bool | None = Field(None, description="Store the response (default true).")
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Default: the rest of the context.")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="auto drops the oldest items to fit.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="Default: auto with tools, else none.")
    parallel_tool_calls: bool | None = Field(None, description="false allows one call at most.")
    text: TextOptions | None = None
    chat_template_kwargs: TemplateVariables = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Above 0, logprobs are included.")
    stream_options: ResponseStreamOptions | None = None
    background: UnsupportedFlag = None


class OutputText(StrictModel):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprob] = Field(description="Of the text's tokens, if requested.")


class OutputMessage(StrictModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(StrictModel):
    """A function call that the model makes."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class ReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(StrictModel):
    type: Literal["summary_text"]
    text: str


class OutputReasoning(StrictModel):
    """The reasoning before an answer or a call, if the model reasons: as content, or as a summary if requested."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText]


OutputItem = Annotated[OutputMessage | OutputCall | OutputReasoning, Field(discriminator="type")]


class ResponseFailure(StrictModel):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(StrictModel):
    reason: Literal["max_output_tokens"]


class InputTokensDetails(StrictModel):
    """How many of the input tokens came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(StrictModel):
    """How many of the output tokens were reasoning."""

    reasoning_tokens: int


class ResponseUsage(StrictModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(StrictModel):
    """Response body of `POST /v1/responses`, with the options of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    model: str
    instructions: str | None
    previous_response_id: str | None
    store: bool
    background: Literal[False]
    temperature: float
    top_p: float
    max_output_tokens: int | None
    max_tool_calls: None
    truncation: Literal["auto", "disabled"]
    tools: list[FunctionTool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    text: TextOptions
    top_logprobs: int
    reasoning: ReasoningOptions
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: str


class ResponseEvent(StrictModel):
    """One event of a stream; its fields depend on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    content_index: int | None = None
    summary_index: int | None = None
    part: Annotated[OutputText | ReasoningText | SummaryText, Field(discriminator="type")] | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    arguments: str | None = None


class StoredMessage(StrictModel):
    """A message of the stored input."""

    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    status: Status
    content: list[Annotated[InputText | OutputText, Field(discriminator="type")]]


class StoredCallOutput(InputCallOutput):
    """The stored result of a function call."""

    id: str
    status: Status


class InputItemList(StrictModel):
    """Response body of `GET /v1/responses/{response_id}/input_items`."""

    object: Literal["list"]
    data: list[Annotated[StoredMessage | OutputCall | StoredCallOutput, Field(discriminator="type")]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(StrictModel):
    """Response body of `DELETE /v1/responses/{response_id}`."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
