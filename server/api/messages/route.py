"""Messages in Anthropic's shape: a chat completion in other words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json
from starlette.responses import Response

from ....engine.client.output_processor import RequestOutput
from ....engine.errors import RequestError
from ...chat.tool_calls import CallPiece, TurnPiece, TurnReader
from ...chat.turn import Turn, prepare_turn
from ...generation.generation import Choice, Generation
from ...generation.served_model import LARGE_CHAT, ServedModel
from ...generation.streaming import EventStream, EventWriter
from ...http.context import RequestContext
from ...http.errors import ApiError, JsonResponse, anthropic_error, encode_json
from ...http.offload import off_loop, off_loop_if_large
from ..chat.wire import (
    AssistantMessage,
    CalledFunction,
    ChatCompletionRequest,
    Function,
    FunctionName,
    InstructionMessage,
    Message,
    NamedToolChoice,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMessage,
    UserMessage,
)
from ..fields import MAX_INT, JsonSchemaFormat, JsonSchemaResponseFormat, SamplingRequest
from .wire import (
    AssistantTurn,
    CountTokensRequest,
    MessagesRequest,
    OutputConfig,
    PromptRequest,
    SystemTurn,
    TextBlock,
    ToolChoiceTool,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)

SHARED_FIELDS = ("model", "max_tokens", *SamplingRequest.model_fields)
NAMES = {
    r"^stop\b": "stop_sequences",
    r"^response_format(\.json_schema)?(?=\.|$)": "output_config.format",
    r"^parallel_tool_calls$": "tool_choice.disable_parallel_tool_use",
    r"\.function\.parameters\b": ".input_schema",
    r"\.function\.": ".",
}
"""What chat completions call a field, as a pattern, and what it is called here."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def create_message(context: RequestContext, body: MessagesRequest, model: ServedModel) -> Response:
    """Answer with a message, whole or as a stream; every refusal is raised before the answer begins."""
    chat = await _to_chat(body)
    try:
        turn = await prepare_turn(chat, model)
        generation = turn.generate(model, context, chat)
    except RequestError as error:
        raise _in_our_words(error) from None
    head = {"id": f"msg_{context.request_id}", "type": "message", "role": "assistant", "model": body.model}
    if body.stream:
        events = MessageEvents(head, context.request_id, generation, turn, body)
        return EventStream(generation, events, model.flags.sse_keep_alive_interval)
    await generation.collect()
    (choice,) = generation.choices
    reader = turn.reader()
    content = read_blocks(reader, choice.pieces)
    calls = any(block["type"] == "tool_use" for block in content)
    end = ending(body, choice, reader, calls)
    return JsonResponse(head | {"content": content} | end | {"usage": token_counts(choice)})


async def count_tokens(_: RequestContext, body: CountTokensRequest, model: ServedModel) -> Response:
    """Count the tokens of the prompt that such a message would have."""
    chat = await _to_chat(body)
    chat.truncate_prompt_tokens = MAX_INT  # what is longer than the context is counted too
    try:
        turn = await prepare_turn(chat, model)
    except RequestError as error:
        raise _in_our_words(error) from None
    return JsonResponse({"input_tokens": len(turn.prompt)})


async def _to_chat(body: PromptRequest) -> ChatCompletionRequest:
    return await (off_loop if len(body.messages) >= LARGE_CHAT else off_loop_if_large)(to_chat, body)


def to_chat(body: PromptRequest) -> ChatCompletionRequest:
    """The same request in OpenAI's shape; raise `RequestError` where the turns do not fit each other."""
    messages = _messages(body)
    goes_on = isinstance(last := messages[-1], AssistantMessage)
    if isinstance(last, AssistantMessage) and last.tool_calls:
        raise RequestError("The last turn calls tools, but no tool_result follows.", param="messages")
    choice, parallel = _tool_choice(body)
    # Nothing is checked again: the bounds here are within those of chats, but for the numbers of messages and of
    # parts, which may grow by taking turns apart and by joining them.
    return ChatCompletionRequest.model_construct(
        messages=messages,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_response_format(body.output_config),
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        stop=getattr(body, "stop_sequences", None),
        **{name: value for name in SHARED_FIELDS if (value := getattr(body, name, None)) is not None},
    )


def _messages(body: PromptRequest) -> list[Message]:
    """The turns as messages; as Anthropic has it, turns of one role that follow each other are one."""
    messages: list[Any] = []
    if body.system:
        messages.append(InstructionMessage(role="system", content=_parts(body.system)))
    called: set[str] = set()
    for place, turn in enumerate(body.messages):
        if isinstance(turn, SystemTurn):
            messages.append(InstructionMessage(role="system", content=_parts(turn.content)))
        elif isinstance(turn, AssistantTurn):
            if not messages or not isinstance(messages[-1], AssistantMessage):
                messages.append(AssistantMessage(role="assistant", content="", tool_calls=None))
            called |= _extend_answer(messages[-1], turn)
        else:
            _extend_question(messages, turn, place, called)
    return messages


def _extend_answer(message: AssistantMessage, turn: AssistantTurn) -> set[str]:
    """Add a turn to the message of those before it; return the ids of the turn's calls."""
    called = set()
    for block in _blocks(turn.content):
        if isinstance(block, TextBlock):
            if not isinstance(message.content, list):
                message.content = []
            message.content.append(TextPart.model_construct(type="text", text=block.text))
        elif isinstance(block, ToolUseBlock):
            function = CalledFunction.model_construct(name=block.name, arguments=encode_json(block.input).decode())
            if message.tool_calls is None:
                message.tool_calls = []
            message.tool_calls.append(ToolCall.model_construct(id=block.id, type="function", function=function))
            called.add(block.id)
    return called


def _extend_question(messages: list[Any], turn: UserTurn, place: int, called: set[str]) -> None:
    for number, block in enumerate(_blocks(turn.content)):
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in called:
                path = f"messages[{place}].content[{number}].tool_use_id"
                raise RequestError(f"{path} is of no tool_use block before it.", param=path)
            parts = _parts(block.content or "")
            if block.is_error:
                parts[0] = TextPart.model_construct(type="text", text=f"Error: {parts[0].text}")
            messages.append(ToolMessage(role="tool", content=parts, tool_call_id=block.tool_use_id))
            continue
        if not messages or not isinstance(messages[-1], UserMessage):
            messages.append(UserMessage.model_construct(role="user", content=[]))
        messages[-1].content.append(TextPart(type="text", text=block.text))


def _blocks(content: str | list[Any]) -> list[Any]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _parts(content: str | list[TextBlock]) -> list[TextPart]:
    """At least one part."""
    return [TextPart(type="text", text=block.text) for block in _blocks(content or "")]


def _tool(tool: Any) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(type="function", function=function)


def _tool_choice(body: PromptRequest) -> tuple[ToolChoice | None, bool | None]:
    """Which tool is to be called, and whether several may be."""
    choice = body.tool_choice
    if choice is None:
        return None, None
    single = getattr(choice, "disable_parallel_tool_use", None)
    parallel = None if single is None else not single
    if isinstance(choice, ToolChoiceTool):
        return NamedToolChoice(type="function", function=FunctionName(name=choice.name)), parallel
    return CHOICES[choice.type], parallel  # type: ignore[return-value]


def _response_format(config: OutputConfig | None) -> JsonSchemaResponseFormat | None:
    if config is None or config.format is None:
        return None
    schema = JsonSchemaFormat(name="answer", schema=config.format.json_schema, strict=None)
    return JsonSchemaResponseFormat(type="json_schema", json_schema=schema)


def _in_our_words(error: RequestError) -> RequestError:
    """The same error with the names that fields have here."""
    name = error.param or ""
    for pattern, ours in NAMES.items():
        name = re.sub(pattern, ours, name)
    text = str(error).replace(error.param, name) if error.param else str(error)
    return RequestError(text, param=name or None, code=error.code)


def token_counts(choice: Choice) -> dict[str, int]:
    """Anthropic's usage object: what was read from the cache does not count as input."""
    return {
        "input_tokens": len(choice.prompt_token_ids) - choice.num_cached_tokens,
        "cache_read_input_tokens": choice.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": choice.num_output_tokens,
    }


def ending(body: MessagesRequest, choice: Choice, reader: TurnReader, calls: bool) -> dict[str, str | None]:
    """Why the answer ended; a turn's end that the chat template writes as text is no stop sequence unless asked for."""
    if choice.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str) and choice.stop_reason in (body.stop_sequences or ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    # OpenAI has "stop" for a call that was asked for by its name.
    called = reader.finish_reason == "tool_calls" or (calls and isinstance(body.tool_choice, ToolChoiceTool))
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def read_blocks(reader: TurnReader, texts: Iterable[str]) -> list[dict[str, Any]]:
    """The blocks of a whole answer."""
    blocks: list[dict[str, Any]] = []
    for piece in [*map(reader.feed, texts), reader.finish()]:
        for part in _in_order(piece):
            if isinstance(part, str):
                if not blocks or blocks[-1]["type"] != "text":
                    blocks.append({"type": "text", "text": ""})
                blocks[-1]["text"] += part
            else:
                if part.name is not None:
                    blocks.append({"type": "tool_use", "id": part.id, "name": part.name, "input": ""})
                blocks[-1]["input"] += part.arguments
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = _parse_input(block["input"])
    return blocks


def _parse_input(text: str) -> dict[str, Any]:
    """The input of a call; of one that was cut short, what there is of it, as Anthropic's client has it in a stream."""
    try:
        value = from_json(text or "{}", allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


def _in_order(piece: TurnPiece) -> Iterable[str | CallPiece]:
    """The rest of an open call, then text, then new calls, so that a block is never added to after its end."""
    first_new = next((n for n, call in enumerate(piece.calls) if call.name is not None), len(piece.calls))
    yield from piece.calls[:first_new]
    if piece.content:
        yield piece.content
    yield from piece.calls[first_new:]


def event(content: dict[str, Any]) -> bytes:
    """One event, named by its type."""
    return b"event: %s\ndata: %s\n\n" % (content["type"].encode(), encode_json(content))


class MessageEvents(EventWriter):
    """Anthropic's events: the start waits for the first token, since it tells how much of the prompt was cached."""

    TEXT = b'{"type":"text_delta","text":%s}'
    INPUT = b'{"type":"input_json_delta","partial_json":%s}'

    def __init__(
        self, head: dict[str, Any], request_id: str, generation: Generation, turn: Turn, body: MessagesRequest
    ) -> None:
        """`head` is what the message says from its start on."""
        self._head = head
        self._request_id = request_id
        self._choice = generation.choices[0]
        self._reader = turn.reader()
        self._body = body
        self._started = self._calls = False
        self._kind = ""
        self._index = -1

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """New text: it may begin, go on with and end blocks."""
        return self._start() + self._show(self._reader.feed(output.text))

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """The rest of the last block, and why the answer ended."""
        data = self._start() + self._show(self._reader.finish()) + self._close()
        end = ending(self._body, self._choice, self._reader, self._calls)
        return data + event({"type": "message_delta", "delta": end, "usage": token_counts(self._choice)})

    def closing(self) -> bytes:
        """The end of the stream."""
        return event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        """The error."""
        return event(anthropic_error(error, self._request_id))

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        usage = token_counts(self._choice)
        message = self._head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return event({"type": "message_start", "message": message}) + event({"type": "ping"})

    def _show(self, piece: TurnPiece) -> bytes:
        data = b""
        for part in _in_order(piece):
            if isinstance(part, str):
                if self._kind != "text":
                    data += self._open({"type": "text", "text": ""})
                data += self._delta(self.TEXT, part)
                continue
            if part.name is not None:
                self._calls = True
                data += self._open({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            if part.arguments:
                data += self._delta(self.INPUT, part.arguments)
        return data

    def _delta(self, form: bytes, text: str) -> bytes:
        shown = b'"index":%d,"delta":%s}' % (self._index, form % encode_json(text))
        return b'event: content_block_delta\ndata: {"type":"content_block_delta",%s\n\n' % shown

    def _open(self, block: dict[str, Any]) -> bytes:
        data = self._close()
        self._kind = block["type"]
        self._index += 1
        return data + event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return event({"type": "content_block_stop", "index": self._index})
