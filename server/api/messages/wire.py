"""Wire models of Anthropic's Messages API: requests, responses, the events of a stream, and errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, RootModel

from ..fields import ErrorBody, SamplingRequest
from ..reading import GiveWay
from ..types import (
    MAX_TOKENS,
    MAX_TOOLS,
    Description,
    JsonSchema,
    Name,
    StopText,
    StrictModel,
    TemplateVariables,
    Text,
    ToolName,
)


class CacheControl(StrictModel):
    """Accepted without effect: this server caches every prompt without being asked."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(StrictModel):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None


class ToolUseBlock(StrictModel):
    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None


TextBlocks = Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)]


class ToolResultBlock(StrictModel):
    type: Literal["tool_result"]
    tool_use_id: Name
    content: Text | TextBlocks | None = None
    is_error: bool | None = Field(None, description="With true, the model reads `Error: ` before the content.")
    cache_control: CacheControl | None = None


class ThinkingBlock(StrictModel):
    """Thinking of an earlier answer: left out of the prompt."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text


class RedactedThinking(StrictModel):
    """Encrypted thinking by another model: left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: Text


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinking, Field(discriminator="type")]


class UserTurn(StrictModel):
    """User text and tool results."""

    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(min_length=1, max_length=1024, fail_fast=True)]


class AssistantTurn(StrictModel):
    """Text and tool calls of the assistant; as the last turn, the start of its response."""

    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=1024, fail_fast=True)]


class SystemTurn(StrictModel):
    """Instructions between turns, if the model's chat template has a place for them."""

    role: Literal["system"]
    content: Text | TextBlocks


MessagesTurn = Annotated[Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")], GiveWay]


def _only_custom(value: Any) -> Any:
    if value not in (None, "custom"):
        raise ValueError("is not supported: this server has no built-in tools, so a tool's type must be custom")
    return value


class CustomTool(StrictModel):
    """A tool that the client runs."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_only_custom)] = None
    name: ToolName
    description: Description | None = None
    input_schema: JsonSchema = Field(description="JSON Schema of the input.")
    strict: bool | None = Field(None, description="If true, unforced calls obey the schema too.")
    cache_control: CacheControl | None = None


class ToolChoiceAny(StrictModel):
    """The model may call tools (auto) or must (any)."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = Field(None, description="If true, at most one call.")


class ToolChoiceTool(StrictModel):
    """The model must call this tool."""

    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = Field(None, description="Without effect: there is one call.")


class ToolChoiceNone(StrictModel):
    type: Literal["none"]


MessagesToolChoice = Annotated[ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Field(discriminator="type")]


class OutputSchema(StrictModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(alias="schema", description="JSON Schema of the answer.")


class OutputConfig(StrictModel):
    format: OutputSchema | None = None


class CountTokensRequest(StrictModel):
    """Body of `POST /v1/messages/count_tokens`: the fields that determine the prompt."""

    model: Name
    messages: Annotated[list[MessagesTurn], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: Text | TextBlocks | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessagesToolChoice | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: TemplateVariables = None
    cache_control: CacheControl | None = None


class MessagesRequest(SamplingRequest, CountTokensRequest):
    """Body of `POST /v1/messages`: Anthropic's fields, and other sampling fields as on the other routes."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: Annotated[list[StopText], Field(max_length=64)] | None = None


class AnswerText(StrictModel):
    type: Literal["text"]
    text: str


class AnswerToolUse(StrictModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnswerThinking(StrictModel):
    """The reasoning before the answer, if the model reasons."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field(description="A digest, for clients that need one; the server never reads it.")


AnswerBlock = Annotated[AnswerText | AnswerToolUse | AnswerThinking, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(StrictModel):
    """Token counts; the first two add up to the prompt."""

    input_tokens: int = Field(description="Tokens of the prompt that were computed.")
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that were cached.")
    cache_creation_input_tokens: Literal[0]
    output_tokens: int


class MessageAnswer(StrictModel):
    """Response body of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStart(StrictModel):
    type: Literal["message_start"]
    message: MessageAnswer


class BareEvent(StrictModel):
    """An event without content."""

    type: Literal["ping", "message_stop"]


class BlockStart(StrictModel):
    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class PartialText(StrictModel):
    type: Literal["text_delta"]
    text: str


class PartialInput(StrictModel):
    type: Literal["input_json_delta"]
    partial_json: str


class PartialThinking(StrictModel):
    type: Literal["thinking_delta"]
    thinking: str


class BlockSignature(StrictModel):
    """The signature of a block of thinking, at its end."""

    type: Literal["signature_delta"]
    signature: str


class BlockDelta(StrictModel):
    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[PartialText | PartialInput | PartialThinking | BlockSignature, Field(discriminator="type")]


class BlockStop(StrictModel):
    type: Literal["content_block_stop"]
    index: int


class MessageEnd(StrictModel):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(StrictModel):
    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessagesError(StrictModel):
    """An error, as a response or as a stream's last event: Anthropic's shape, with all fields of OpenAI's too."""

    type: Literal["error"]
    error: ErrorBody
    request_id: str


Event = MessageStart | BareEvent | BlockStart | BlockDelta | BlockStop | MessageDelta | MessagesError


class MessageEvent(RootModel[Annotated[Event, Field(discriminator="type")]]):
    """One event of a stream, named by its type."""


class TokenCount(StrictModel):
    """Response body of `POST /v1/messages/count_tokens`."""

    input_tokens: int
