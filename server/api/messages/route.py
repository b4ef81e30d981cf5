"""The route of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain, groupby
from typing import Any, Literal

from pydantic_core import from_json
from starlette.responses import Response

from ....engine.client.output_processor import RequestOutput
from ....engine.errors import RequestError
from ...chat.conversation import BETWEEN_PARTS, AnswerFormat, Conversation, Message, Tool, ToolCall, ToolChoice
from ...chat.parts import Part, Thought
from ...chat.served_model import ServedModel
from ...chat.structured_output import json_schema_grammar
from ...chat.turn import Turn, prepare_prompt, prepare_turn, tokenizing_bytes
from ...generation.generation import Choice, Generation
from ...generation.streaming import EventStream, EventWriter
from ...http.body import off_loop_if_large
from ...http.errors import ApiError, JsonResponse, encode_json
from ...http.middleware import RequestContext
from ..reading import read_sampling, start_generation
from ..types import MAX_INT
from . import wire

MODES: dict[str, Literal["auto", "required", "none", "named"]]
MODES = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}


async def create_message(context: RequestContext, body: wire.MessagesRequest, model: ServedModel) -> Response:
    """Answer with a message, in one response or as a stream; a refused request gets a plain error response."""
    sampling = {**read_sampling(body, model), "stop": tuple(body.stop_sequences or ())}
    read = await off_loop_if_large(read_conversation, body, sampling=sampling, max_tokens=body.max_tokens)
    turn = await prepare_turn(read, model)
    generation = start_generation(context, body, model, [turn.prompt], turn.params, "messages")
    head = {"id": f"msg_{context.request_id}", "type": "message", "role": "assistant", "model": body.model}
    if body.stream:
        events = MessageEvents(head, generation, turn, body)
        return EventStream(generation, events, model.flags.sse_keep_alive_interval)
    await generation.collect()
    (choice,) = generation.choices
    parsed = turn.read_whole(choice)
    content, usage = [_block(part) for part in parsed.parts], token_counts(choice)
    end = ending(body, choice, parsed.finish_reason, bool(parsed.calls))
    return JsonResponse(head | {"content": content} | end | {"usage": usage})


async def count_tokens(context: RequestContext, body: wire.CountTokensRequest, model: ServedModel) -> Response:
    """Count the tokens of a message's prompt, even if it is longer than the context."""
    read = await off_loop_if_large(read_conversation, body, keep_tokens=MAX_INT)
    with context.hold("tokenizing", tokenizing_bytes(read)):
        prompt, _, _ = await prepare_prompt(read, model)
    return JsonResponse({"input_tokens": len(prompt)})


def read_conversation(body: wire.CountTokensRequest, **more: Any) -> Conversation:
    """Return the conversation that a request asks for, with `more` of its fields; raises `RequestError`."""
    messages = list(_join_turns(_split_turns(body)))
    if messages[-1].calls:
        raise RequestError("The last message calls tools: add a tool_result for each call.", param="messages")
    return Conversation(
        messages=messages,
        tools=[
            Tool(tool.name, tool.description, tool.input_schema, tool.strict, f"tools[{n}]", f"tools[{n}].input_schema")
            for n, tool in enumerate(body.tools or ())
        ],
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=not getattr(body.tool_choice, "disable_parallel_tool_use", None),
        answer_format=_answer_format(body.output_config),
        continue_final_message=messages[-1].role == "assistant",
        template_variables=body.chat_template_kwargs or {},
        **more,
    )


def _split_turns(body: wire.CountTokensRequest) -> Iterator[Message]:
    """Yield a message for each block of the turns, and one for each system prompt."""
    if body.system:
        yield Message("system", _text(body.system))
    for position, turn in enumerate(body.messages):
        if isinstance(turn, wire.SystemTurn):
            yield Message("system", _text(turn.content))
            continue
        if isinstance(turn, wire.AssistantTurn):
            yield Message("assistant", None)  # an empty assistant turn is still a turn
        for number, block in enumerate([turn.content] if isinstance(turn.content, str) else turn.content):
            match block:
                case str():
                    yield Message(turn.role, block)
                case wire.TextBlock():
                    yield Message(turn.role, block.text)
                case wire.ToolUseBlock():
                    call = ToolCall(block.id, block.name, encode_json(block.input).decode())
                    yield Message("assistant", None, (call,))
                case wire.ToolResultBlock():
                    text = ("Error: " if block.is_error else "") + _text(block.content or "")
                    field = f"messages[{position}].content[{number}].tool_use_id"
                    yield Message("tool", text, call_id=block.tool_use_id, call_id_field=field)


def _join_turns(messages: Iterable[Message]) -> Iterator[Message]:
    """Yield the messages, with adjacent ones by the user or by the assistant joined."""
    for role, group in groupby(messages, key=lambda message: message.role):
        if role not in ("user", "assistant"):
            yield from group
            continue
        joined = list(group)
        text = BETWEEN_PARTS.join(message.text for message in joined if message.text is not None)
        yield Message(role, text, tuple(chain.from_iterable(message.calls for message in joined)))


def _text(content: str | list[wire.TextBlock]) -> str:
    return content if isinstance(content, str) else BETWEEN_PARTS.join(block.text for block in content)


def _tool_choice(choice: wire.MessagesToolChoice | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    return ToolChoice(MODES[choice.type], (choice.name,) if isinstance(choice, wire.ToolChoiceTool) else None)


def _answer_format(config: wire.OutputConfig | None) -> AnswerFormat | None:
    if config is None or config.format is None:
        return None
    field = "output_config.format.schema"
    return AnswerFormat(json_schema_grammar(config.format.json_schema, param=field), "output_config.format", field)


def token_counts(choice: Choice) -> dict[str, int]:
    """Return Anthropic's usage object, in which cached tokens do not count as input."""
    return {
        "input_tokens": len(choice.prompt_token_ids) - choice.num_cached_tokens,
        "cache_read_input_tokens": choice.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": choice.num_output_tokens,
    }


def ending(body: wire.MessagesRequest, choice: Choice, reason: str, has_calls: bool) -> dict[str, str | None]:
    """Return why the answer ended; the end of a turn in plain text is a stop sequence only if the request names it."""
    if choice.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str) and choice.stop_reason in (body.stop_sequences or ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    # For a call forced by name the reader reports OpenAI's "stop", so look at the calls.
    called = reason == "tool_calls" or (has_calls and isinstance(body.tool_choice, wire.ToolChoiceTool))
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _signature(thinking: str) -> str:
    """Return the signature that clients require on a block of thinking: a digest that the server never reads."""
    return blake2b(thinking.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _block(part: str | ToolCall | Thought) -> dict[str, Any]:
    """Return a block of the answer; an unfinished call's input is the part so far, as in Anthropic's client."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Thought):
        return {"type": "thinking", "thinking": part.text, "signature": _signature(part.text)}
    try:
        value = from_json(part.arguments or "{}", allow_partial=True)
    except ValueError:
        value = None
    value = value if isinstance(value, dict) else {"INVALID_JSON": part.arguments}
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": value}


def named_event(content: dict[str, Any]) -> bytes:
    """Return one event, named by its type."""
    return b"event: %s\ndata: %s\n\n" % (content["type"].encode(), encode_json(content))


class MessageEvents(EventWriter):
    """Writes Anthropic's events; the start waits for the first token, when the number of cached tokens is known."""

    def __init__(self, head: dict[str, Any], generation: Generation, turn: Turn, body: wire.MessagesRequest) -> None:
        """`head` has the fields of the message that are known at the start."""
        self._head = head
        self._request_id = generation.context.request_id
        self._choice = generation.choices[0]
        self._turn = turn
        self._reader = turn.reader()
        self._body = body
        self._started = self._calls = False
        self._kind = ""
        self._index = -1
        self._thinking: list[str] = []  # of the open block

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """Return events for new text, which may begin and end blocks."""
        return self._start() + self._show(self._turn.read(self._reader, output))

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return events for the rest of the last block and for the reason why the answer ended."""
        cut = self._turn.cut_off(output.finish_reason, output.stop_reason)
        data = self._start() + self._show(self._reader.finish(cut)) + self._close()
        end = ending(self._body, self._choice, self._reader.finish_reason, self._calls)
        return data + named_event({"type": "message_delta", "delta": end, "usage": token_counts(self._choice)})

    def closing(self) -> bytes:
        return named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return named_event(error.anthropic_body(self._request_id))

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        usage = token_counts(self._choice)
        message = self._head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return named_event({"type": "message_start", "message": message}) + named_event({"type": "ping"})

    def _show(self, parts: list[Part]) -> bytes:
        data = b""
        for part in parts:
            if isinstance(part, str):
                if self._kind != "text":
                    data += self._open({"type": "text", "text": ""})
                data += self._delta({"type": "text_delta", "text": part})
                continue
            if isinstance(part, Thought):
                if self._kind != "thinking":
                    data += self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._thinking.append(part.text)
                data += self._delta({"type": "thinking_delta", "thinking": part.text})
                continue
            if part.name is not None:
                self._calls = True
                data += self._open({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            if part.arguments:
                data += self._delta({"type": "input_json_delta", "partial_json": part.arguments})
        return data

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _open(self, block: dict[str, Any]) -> bytes:
        data = self._close()
        self._kind = block["type"]
        self._index += 1
        return data + named_event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        data, self._kind = b"", ""
        if self._thinking:
            signature = _signature("".join(self._thinking))
            data, self._thinking = self._delta({"type": "signature_delta", "signature": signature}), []
        return data + named_event({"type": "content_block_stop", "index": self._index})
