"""Reads the parts that requests share: a chat's messages and tools, sampling parameters, the format of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ..chat import conversation as neutral
from ..chat.conversation import BETWEEN_PARTS, AnswerFormat, Conversation, Sampling
from ..chat.served_model import ServedModel
from ..chat.structured_output import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from ..generation.generation import Generation
from ..http.middleware import RequestContext
from . import fields
from .types import MAX_TOOLS, Description, JsonSchema, Name, StrictModel, TemplateVariables, Text, ToolName

GiveWay = BeforeValidator(lambda value: value)
"""A Python no-op: without it pydantic checks a long list in one go and no other thread can run."""
LOGPROB_FIELDS = ("logprobs", "top_logprobs", "prompt_logprobs")
# Makes the grammar of each kind of structured output.
GRAMMARS: dict[str, Callable[..., str]] = {
    "json_schema": json_schema_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}
SAMPLING_FIELDS = {*SamplingParams.__struct_fields__} - {"max_tokens", "logprobs", "grammar"}


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
AnswerContent = Text | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]


class TextMessage(StrictModel):
    """Text from the application (system or developer) or the user."""

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
    """An earlier answer."""

    role: Literal["assistant"]
    content: AnswerContent | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class ToolMessage(StrictModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: Name = Field(description="The id of a call in an earlier message.")
    name: Name | None = None


Message = Annotated[Annotated[TextMessage | AssistantMessage | ToolMessage, Field(discriminator="role")], GiveWay]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class Function(StrictModel):
    name: ToolName
    description: Description | None = None
    parameters: JsonSchema | None = Field(None, description="JSON Schema of the arguments, none by default.")
    strict: bool | None = Field(None, description="If true, unforced calls must obey the parameters' schema too.")


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class TemplateOptions(StrictModel):
    """Fields that the chat template reads in addition to the messages."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the opening of a turn (default: the opposite of continue_final_message)."
    )
    continue_final_message: bool | None = Field(None, description="Continue the last message.")
    chat_template_kwargs: TemplateVariables = None


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


def read_sampling(body: fields.SamplingRequest, model: ServedModel) -> Sampling:
    """Return the fields of `SamplingParams` that a request sets; raises `RequestError`."""
    if getattr(body, "stream_options", None) is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in LOGPROB_FIELDS:
        value, limit = getattr(body, name, None), model.flags.max_logprobs
        if value is not None and value is not True and value > limit:
            raise RequestError(f"{name} must be at most {limit} on this server, but got {value}.", param=name)
    values = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name, None)) is not None}
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    if "logit_bias" in values:
        values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    if isinstance(body, fields.OpenAIRequest) and body.allowed_token_ids is not None:
        # The body lives as long as the request, and may list each id a thousand times.
        values["allowed_token_ids"] = body.allowed_token_ids = sorted({*body.allowed_token_ids})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def start_generation(
    context: RequestContext,
    body: fields.SamplingRequest,
    model: ServedModel,
    prompts: list[list[int]],
    params: SamplingParams,
    field: str,
) -> Generation:
    """Submit the prompts; errors report them under the name `field`. Raises as `Generation` does."""
    return Generation(
        model.engine, model.metrics, context, prompts, params, field=field, n=getattr(body, "n", None) or 1,
        priority=body.priority or 0, cache_salt=body.cache_salt, streams=bool(body.stream),
    )  # fmt: skip


def read_format(
    wanted: fields.Format | None, outputs: fields.StructuredOutputs | None, field: str, schema_field: str
) -> AnswerFormat | None:
    """Return the format that a request asks for in `field` or in structured_outputs; raises `RequestError`."""
    if wanted is None or isinstance(wanted, fields.TextFormat):
        return None if outputs is None else _structured_format(outputs)
    if outputs is not None:
        raise RequestError(f"structured_outputs and {field} cannot both be given.", param="structured_outputs")
    if isinstance(wanted, fields.JsonObjectFormat):
        if wanted.value is None:
            return AnswerFormat(json_schema_grammar({"type": "object"}), field, field)
        return AnswerFormat(json_schema_grammar(wanted.value, f"{field}.value"), field, f"{field}.value")
    grammar = json_schema_grammar(wanted.json_schema, schema_field)
    return AnswerFormat(grammar, field, schema_field)


def read_response_format(body: fields.GenerationRequest) -> AnswerFormat | None:
    """Return the format of a chat or completion; raises `RequestError`."""
    form, field = body.response_format, "response_format"
    wanted = form.json_schema if isinstance(form, fields.JsonSchemaResponseFormat) else form
    return read_format(wanted, body.structured_outputs, field, f"{field}.json_schema.schema")


def _structured_format(outputs: fields.StructuredOutputs) -> AnswerFormat:
    ((kind, value),) = ((name, value) for name, value in outputs if value is not None)
    field = f"structured_outputs.{kind}".removesuffix("_schema")
    return AnswerFormat(GRAMMARS[kind](value, param=field), "structured_outputs", field)
