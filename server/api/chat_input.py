"""OpenAI's messages and tools, as chat completions and `/tokenize` read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..chat import conversation as neutral
from ..chat.conversation import BETWEEN_PARTS, Conversation
from .reading import GiveWay
from .types import MAX_TOOLS, Description, JsonSchema, Name, SchemaName, StrictModel, Text


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]


class TextMessage(StrictModel):
    """Words of the application (system or developer) or of the user."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None


class CalledFunction(StrictModel):
    name: Name
    arguments: Text = Field(description="JSON text of an object.")


class ToolCall(StrictModel):
    id: Name
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(StrictModel):
    """An earlier answer of the model; fields that must be empty let a client send it back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(StrictModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: Name = Field(description="The id of a call in an earlier message.")
    name: Name | None = None


Message = Annotated[Annotated[TextMessage | AssistantMessage | ToolMessage, Field(discriminator="role")], GiveWay]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class Function(StrictModel):
    name: SchemaName
    description: Description | None = None
    parameters: JsonSchema | None = Field(None, description="JSON Schema of the arguments, none by default.")
    strict: bool | None = Field(None, description="If true, unforced calls must obey the parameters' schema too.")


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class TemplateOptions(StrictModel):
    """What the chat template reads in addition to the messages."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = Field(
        None,
        description="End the prompt with the opening of a turn; by default not continue_final_message.",
    )
    continue_final_message: bool | None = Field(None, description="Continue the last message.")
    chat_template_kwargs: Annotated[dict[Name, Any], Field(max_length=32)] | None = Field(
        None, description="Values for variables of the checkpoint's chat template."
    )


def read_chat(messages: list[Message], options: TemplateOptions, **more: Any) -> Conversation:
    """Return the conversation of these messages, with `more` of its fields."""
    return Conversation(
        messages=[_message(message, n) for n, message in enumerate(messages)],
        tools=[
            neutral.Tool(
                **dict(tool.function), field=f"tools[{n}].function", parameters_field=f"tools[{n}].function.parameters"
            )
            for n, tool in enumerate(options.tools or ())
        ],
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=bool(options.continue_final_message),
        template_variables=options.chat_template_kwargs or {},
        **more,
    )


def _message(message: Message, position: int) -> neutral.Message:
    content = message.content
    text = BETWEEN_PARTS.join(part.text for part in content) if isinstance(content, list) else content
    if isinstance(message, ToolMessage):
        field = f"messages[{position}].tool_call_id"
        return neutral.Message("tool", text, call_id=message.tool_call_id, call_id_field=field, name=message.name)
    given = (isinstance(message, AssistantMessage) and message.tool_calls) or ()
    calls = tuple(neutral.ToolCall(call.id, call.function.name, call.function.arguments) for call in given)
    return neutral.Message(message.role, text, calls, name=message.name)
