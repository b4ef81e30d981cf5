"""Messages, as Anthropic's clients speak: the request, the answer, the events of its stream, and errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, RootModel

from ..fields import (
    MAX_INT,
    MAX_TOOLS,
    Description,
    ErrorBody,
    GiveWay,
    JsonSchema,
    Name,
    SamplingRequest,
    SchemaName,
    StopText,
    StrictModel,
    Text,
)


def _ask_for_nothing(value: Any) -> None:
    """Let values pass that ask for nothing."""
    if value is not None and value != [] and value != {}:
        raise ValueError("is not supported by this server")


Unsupported = Annotated[None, BeforeValidator(_ask_for_nothing)]
"""A field of Anthropic's API that means something which this server cannot do."""


class CacheControl(StrictModel):
    """Where Anthropic would end a cached part; here all that was computed is cached without being told."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(StrictModel):
    """A text."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: Unsupported = None


class DirectCaller(StrictModel):
    """The model itself."""

    type: Literal["direct"]


class ToolUseBlock(StrictModel):
    """A call of a tool by the model."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: Unsupported = None


TextBlocks = Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)]


class ToolResultBlock(StrictModel):
    """What a called tool answered."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Text | TextBlocks | None = None
    is_error: bool | None = Field(None, description="With true, the model reads `Error: ` before the content.")
    cache_control: CacheControl | None = None
    toolset_name: Unsupported = None


class ThinkingBlock(StrictModel):
    """What another model thought: left out of the prompt, as by Anthropic where thinking is off."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text


class RedactedThinkingBlock(StrictModel):
    """What another model thought, enciphered: left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: Text


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class UserTurn(StrictModel):
    """What the user says, and what the tools answered."""

    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(min_length=1, max_length=1024, fail_fast=True)]


class AssistantTurn(StrictModel):
    """What the model said; as the last turn, the beginning of its answer."""

    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=1024, fail_fast=True)]


class SystemTurn(StrictModel):
    """What the application says between turns, where the model's chat template has a place for it."""

    role: Literal["system"]
    content: Text | TextBlocks


MessagesTurn = Annotated[Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")], GiveWay]


def _only_custom(value: Any) -> Any:
    if value not in (None, "custom"):
        raise ValueError("is not supported: this server has no tools of its own, only custom ones")
    return value


class CustomTool(StrictModel):
    """A tool that the client runs."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_only_custom)] = None
    name: SchemaName
    description: Description | None = None
    input_schema: JsonSchema = Field(description="JSON Schema of the input.")
    strict: bool | None = Field(
        None,
        description="With true, calls that are not forced fit the schema too; OpenAI's rules for strict schemas apply.",
    )
    eager_input_streaming: Literal[True] | None = Field(None, description="Input is always streamed as it comes.")
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None
    defer_loading: Literal[False] | None = None
    input_examples: Unsupported = None
    cache_control: CacheControl | None = None


class ToolChoiceAuto(StrictModel):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = Field(None, description="With true, one call at most.")


class ToolChoiceAny(StrictModel):
    """Some tool must be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = Field(None, description="With true, exactly one call.")


class ToolChoiceTool(StrictModel):
    """This tool must be called."""

    type: Literal["tool"]
    name: SchemaName
    disable_parallel_tool_use: bool | None = Field(None, description="With true, exactly one call.")


class ToolChoiceNone(StrictModel):
    """No tool may be called."""

    type: Literal["none"]


MessagesToolChoice = Annotated[
    ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Field(discriminator="type")
]


class ThinkingDisabled(StrictModel):
    """No thinking before the answer, which is the only way here."""

    type: Literal["disabled"]


class OutputSchema(StrictModel):
    """A schema that the answer must satisfy."""

    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(alias="schema", description="JSON Schema of the answer.")


class OutputConfig(StrictModel):
    """The form of the answer."""

    format: OutputSchema | None = None
    effort: Unsupported = None


class PromptRequest(StrictModel):
    """The fields that make the prompt."""

    model: Name
    messages: Annotated[list[MessagesTurn], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: Text | TextBlocks | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: Unsupported = None
    mcp_servers: Unsupported = None


class CountTokensRequest(PromptRequest):
    """Body of `POST /v1/messages/count_tokens`."""


class MessagesMetadata(StrictModel):
    """Anthropic's bookkeeping, accepted because ignoring it harms nobody."""

    user_id: Name | None = None


class MessagesRequest(SamplingRequest, PromptRequest):
    """Body of `POST /v1/messages`: Anthropic's fields, and those that are not Anthropic's as on the other routes."""

    max_tokens: int = Field(ge=1, le=MAX_INT)
    stop_sequences: Annotated[list[StopText], Field(max_length=4)] | None = None
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Unsupported = None


class AnswerText(StrictModel):
    """A text of the answer."""

    type: Literal["text"]
    text: str


class AnswerToolUse(StrictModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = Annotated[AnswerText | AnswerToolUse, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(StrictModel):
    """Token counts; the prompt is the sum of the first two."""

    input_tokens: int = Field(description="Of the prompt, what was computed.")
    cache_read_input_tokens: int = Field(description="Of the prompt, what had been computed before.")
    cache_creation_input_tokens: Literal[0]
    output_tokens: int


class MessageAnswer(StrictModel):
    """Answer of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStart(StrictModel):
    """The answer, still empty."""

    type: Literal["message_start"]
    message: MessageAnswer


class Ping(StrictModel):
    """Nothing."""

    type: Literal["ping"]


class BlockStart(StrictModel):
    """A block, still empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class PartialText(StrictModel):
    """More text."""

    type: Literal["text_delta"]
    text: str


class PartialInput(StrictModel):
    """More of the JSON text of a call's input."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(StrictModel):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[PartialText | PartialInput, Field(discriminator="type")]


class BlockStop(StrictModel):
    """The end of a block."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnd(StrictModel):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(StrictModel):
    """What is known at the end."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(StrictModel):
    """The end of the stream."""

    type: Literal["message_stop"]


class MessagesError(StrictModel):
    """Every answer of these routes with a status of 400 or more, and the last event of a stream that fails.

    It is Anthropic's shape and has all members of OpenAI's too.
    """

    type: Literal["error"]
    error: ErrorBody
    request_id: str


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | MessagesError,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a stream; the event's name is its type."""


class TokenCount(StrictModel):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int
