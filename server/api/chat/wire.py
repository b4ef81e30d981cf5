"""Chat completions: the request, the answer and the chunks of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ....engine.messages import MAX_LOGPROBS
from ..fields import (
    MAX_INT,
    Description,
    GenerationRequest,
    JsonSchema,
    Name,
    PromptLogprob,
    SchemaName,
    StrictModel,
    Text,
    TokenDynamics,
    TokenLogprob,
    Usage,
)

MAX_TOOLS = 128


def _pass(value: Any) -> Any:
    return value


GiveWay = BeforeValidator(_pass)
"""Changes nothing: checking a long list is one step of the interpreter, unless there is some Python in it, at which
the other threads have their turn."""


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


class CalledFunction(StrictModel):
    """Which function, with what."""

    name: Name
    arguments: Text = Field(description="JSON text of an object.")


class ToolCall(StrictModel):
    """The model's wish to call a function."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(StrictModel):
    """What the model said before; the fields that hold nothing let a client send an answer back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(StrictModel):
    """What a called tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name = Field(description="The id of a call in a message before.")
    name: Name | None = None


Message = Annotated[
    Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")],
    GiveWay,
]


class Function(StrictModel):
    """A function that the model may call."""

    name: SchemaName
    description: Description | None = None
    parameters: JsonSchema | None = Field(None, description="JSON Schema of the arguments; without it there are none.")
    strict: bool | None = Field(None, description="With true, also a free choice must obey the parameters' schema.")


class Tool(StrictModel):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """A function by its name."""

    name: SchemaName


class NamedToolChoice(StrictModel):
    """This function must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(StrictModel):
    """Of all tools, only these are offered now."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class TemplateOptions(StrictModel):
    """What the chat template is given beside the messages."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the opening of a turn: true unless continue_final_message is."
    )
    continue_final_message: bool | None = Field(None, description="Go on with the last message.")
    chat_template_kwargs: Annotated[dict[Name, Any], Field(max_length=32)] | None = Field(
        None, description="Variables that the checkpoint's chat template knows."
    )


class ChatCompletionRequest(GenerationRequest, TemplateOptions):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    tool_choice: ToolChoice | None = Field(None, description="auto where there are tools, else none.")
    parallel_tool_calls: bool | None = Field(None, description="With false, one call at most.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Wins over max_tokens.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Without it, the rest of the context.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs.")


class ChatLogprobs(StrictModel):
    """Log-probabilities of a chat answer, of the raw distribution."""

    content: list[TokenLogprob]


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(StrictModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(StrictModel):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    dynamics: list[TokenDynamics] | None = None


class ChatCompletion(StrictModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class FunctionDelta(StrictModel):
    """A piece of a call: the name comes once, the arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCallDelta(StrictModel):
    """A piece of one tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(StrictModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(StrictModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    dynamics: list[TokenDynamics] | None = None


class ChatCompletionChunk(StrictModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
