"""The Responses API: turns input items, and items of stored responses, into output items."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
from starlette.responses import Response

from ....engine.errors import RequestError
from ...chat.conversation import BETWEEN_PARTS, Conversation, Message, Tool, ToolCall, ToolChoice
from ...chat.served_model import ServedModel
from ...chat.turn import Turn, prepare_turn
from ...generation.streaming import EventStream
from ...http.body import LARGE_BODY_BYTES, is_large, off_loop_if_large
from ...http.budget import MAX_BODY_BYTES
from ...http.errors import ApiError, JsonResponse, encode_json, shorten
from ...http.middleware import RequestContext
from ..reading import read_format, read_sampling, start_generation
from ..types import MAX_TOOLS
from . import wire
from .events import ResponseWriter, new_id
from .store import Caller, Parts, ResponseStore, StoredResponse, decode_items

UNDECIDED = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))  # until the response ends
# The fields that a response repeats from its request, and those that always have the same value.
REPEATED = ("model", "instructions", "previous_response_id", "max_output_tokens", "user", "safety_identifier")
FIXED = {"background": False, "max_tool_calls": None}


async def create_response(
    context: RequestContext, body: wire.ResponseRequest, model: ServedModel, store: ResponseStore
) -> Response:
    """Answer input items in one response or as a stream; a refused request gets a plain error response."""
    caller = Caller.of(context)
    if body.store is not False:
        await store.check()
    conversation, items = await _read_request(context, body, model, store, caller)
    turn = await prepare_turn(conversation, model)
    response = await off_loop_if_large(_describe, body, turn)
    response["reasoning"] = read_reasoning(body, model)
    generation = start_generation(context, body, model, [turn.prompt], turn.params, "input")
    put = None if body.store is False else partial(store.put, input_items=items, caller=caller)
    writer = ResponseWriter(response, turn, generation, model.tokenizer, put)
    if body.stream:
        return EventStream(generation, writer, model.flags.sse_keep_alive_interval)
    await generation.collect()
    writer.piece(0, generation.choices[0])
    writer.closing()
    await writer.settle()
    if writer.error is not None:
        raise writer.error
    return JsonResponse(writer.response)


async def _read_request(
    context: RequestContext, body: wire.ResponseRequest, model: ServedModel, store: ResponseStore, caller: Caller
) -> tuple[Conversation, bytes]:
    """Return the conversation that a request asks for, and its items in JSON for the store."""
    sources = await find_sources(body, store, caller)
    if sources.size >= LARGE_BODY_BYTES:
        is_large.set(True)
        await context.reserve(sources.size)
    found = await load_sources(body, sources, store)
    return await off_loop_if_large(_read, body, found, model)


def read_reasoning(body: wire.ResponseRequest, model: ServedModel) -> dict[str, str | None]:
    """Return a request's reasoning options, as the response repeats them; raises `RequestError`."""
    options = (body.chat_template_kwargs or {}) if model.reasons else {"reasoning_effort": "none"}
    effort, summary = options.get("reasoning_effort"), options.get("reasoning_summary")
    if summary not in wire.SUMMARIES:
        field, known = "reasoning.summary", ", ".join(filter(None, wire.SUMMARIES))
        raise RequestError(f"{field} must be one of {known}, but got {shorten(str(summary))}.", param=field)
    return {"effort": effort if isinstance(effort, str) else None, "summary": summary}


@dataclass(frozen=True, slots=True)
class Sources:
    """The stored responses that a request refers to."""

    previous: StoredResponse | None
    holders: dict[str, StoredResponse]  # of each referenced item, by its id
    size: int  # bytes to read


@dataclass(frozen=True, slots=True)
class LoadedSources:
    """What those responses contain."""

    previous: Parts | None = None
    holders: dict[str, Parts] = field(default_factory=dict)


async def find_sources(body: wire.ResponseRequest, store: ResponseStore, caller: Caller) -> Sources:
    """Find the stored responses; raise `ApiError` or `RequestError` if one is missing or they exceed MAX_BODY_BYTES."""
    if body.input is None and body.previous_response_id is None:
        raise ApiError(400, "Missing required parameter: input.", param="input", code="missing_required_parameter")
    previous, size = None, 0
    if body.previous_response_id is not None:
        if (previous := await store.find(body.previous_response_id, caller)) is None:
            raise _lost_response(body.previous_response_id)
        size = sum(previous.sizes[1:])
        _check_size(size, "previous_response_id")
    references = _references(body)
    holders = await store.find_holders(references.keys(), caller)
    counted: set[str] = set()
    for item_id, param in references.items():
        if (holder := holders.get(item_id)) is None:
            raise _lost_item(item_id, param)
        if holder.id not in counted:  # each response is read once
            counted.add(holder.id)
            size += holder.sizes[2]
            _check_size(size, param)
    return Sources(previous, holders, size)


async def load_sources(body: wire.ResponseRequest, sources: Sources, store: ResponseStore) -> LoadedSources:
    """Read the stored responses; raise `ApiError` or `RequestError` if one was deleted meanwhile."""
    previous, loaded = None, dict[str, Parts]()
    if sources.previous is not None and (previous := await store.read(sources.previous)) is None:
        raise _lost_response(sources.previous.id)
    for item_id, param in _references(body).items():
        holder = sources.holders[item_id]
        if holder.id not in loaded:
            if (parts := await store.read(holder)) is None:
                raise _lost_item(item_id, param)
            loaded[holder.id] = parts
    return LoadedSources(previous, {item_id: loaded[holder.id] for item_id, holder in sources.holders.items()})


def _references(body: wire.ResponseRequest) -> dict[str, str]:
    """Return the ids of the referenced items with the fields that have them; raise `RequestError` for one twice."""
    found: dict[str, str] = {}
    for position, item in enumerate(body.input if isinstance(body.input, list) else ()):
        if isinstance(item, wire.ItemReference):
            param = f"input[{position}].id"
            if item.id in found:
                raise RequestError(f"{param} refers to the same item as an earlier reference.", param=param)
            found[item.id] = param
    return found


def _lost_response(response_id: str) -> ApiError:
    message = f"Previous response with id {shorten(response_id)!r} not found."
    return ApiError(400, message, param="previous_response_id", code="previous_response_not_found")


def _lost_item(item_id: str, param: str) -> RequestError:
    return RequestError(f"Item with id {shorten(item_id)!r} not found.", param=param, code="item_not_found")


def _check_size(size: int, param: str) -> None:
    if size > MAX_BODY_BYTES:
        raise RequestError(f"The earlier items have {size} bytes; the limit is {MAX_BODY_BYTES}.", param=param)


def _read(body: wire.ResponseRequest, sources: LoadedSources, model: ServedModel) -> tuple[Conversation, bytes]:
    """Return the conversation that a request asks for, and its items in JSON for the store."""
    items = read_items(body, sources)
    encoded = b"" if body.store is False else b"[%s]" % b",".join(map(encode_json, items))
    return read_conversation(body, to_messages(items), model), encoded


def read_items(body: wire.ResponseRequest, sources: LoadedSources) -> list[wire.Item]:
    """Return everything that the model reads except the instructions."""
    items: list[wire.Item] = []
    if sources.previous is not None:
        _, input_, output = sources.previous
        items += decode_items(input_) + _without_reasoning(decode_items(output))
    if isinstance(body.input, str):
        return [*items, _complete(wire.InputMessage(role="user", content=body.input))]
    decoded: dict[str, wire.Item] = {}
    for item in body.input or ():
        if isinstance(item, wire.ItemReference):
            if item.id not in decoded:
                decoded |= {found["id"]: found for found in decode_items(sources.holders[item.id].output)}
            items += _without_reasoning([decoded[item.id]])
        else:
            items.append(_complete(item))
    return items


def _without_reasoning(items: list[wire.Item]) -> list[wire.Item]:
    """Return the output items that the model reads again."""
    return [item for item in items if item["type"] != "reasoning"]


def _complete(item: wire.InputMessage | wire.InputCall | wire.InputCallOutput) -> wire.Item:
    """Return an item as it is stored and listed."""
    kind = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}[item.type]
    shown: wire.Item = item.model_dump(exclude_none=True, exclude={"content"})
    shown |= {"id": item.id or new_id(kind), "status": item.status or "completed"}
    if isinstance(item, wire.InputMessage):
        assistant = {"type": "output_text", "annotations": [], "logprobs": []}
        part = assistant if item.role == "assistant" else {"type": "input_text"}
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        shown["content"] = [part | {"text": text} for text in texts]
    return shown


def to_messages(items: list[wire.Item]) -> list[Message]:
    """Return the messages of items; calls become part of the assistant's message before them."""
    messages: list[Message] = []
    for is_call, group in groupby(items, key=lambda item: item["type"] == "function_call"):
        if is_call:
            calls = tuple(ToolCall(item["call_id"], item["name"], item["arguments"]) for item in group)
            if len(calls) > MAX_TOOLS:
                message = f"input has {len(calls)} consecutive function calls; the limit is {MAX_TOOLS}."
                raise RequestError(message, param="input")
            text = messages.pop().text if messages and messages[-1].role == "assistant" else None
            messages.append(Message("assistant", text, calls))
            continue
        for item in group:
            if item["type"] == "message":
                messages.append(Message(item["role"], _join(item["content"])))
            else:
                text = item["output"] if isinstance(item["output"], str) else _join(item["output"])
                messages.append(Message("tool", text, call_id=item["call_id"], call_id_field="input"))
    return messages


def _join(parts: list[dict[str, Any]]) -> str:
    return BETWEEN_PARTS.join(part["text"] for part in parts)


def read_conversation(body: wire.ResponseRequest, messages: list[Message], model: ServedModel) -> Conversation:
    """Return the conversation that a request asks for; raises `RequestError`."""
    if body.instructions is not None:
        messages = [Message("system", body.instructions), *messages]
    if not 1 <= len(messages) <= wire.MAX_ITEMS:
        count = f"{len(messages)} messages with those of earlier responses; the limit is {wire.MAX_ITEMS}"
        raise RequestError(f"input has {count if messages else 'no items'}.", param="input")
    logprobs = (body.top_logprobs or 0) if body.include or body.top_logprobs else None
    wanted = body.text.format if body.text else None
    return Conversation(
        messages=messages,
        messages_field="input",
        sampling={**read_sampling(body, model), "logprobs": logprobs},
        max_tokens=body.max_output_tokens,
        tools=[
            Tool(tool.name, tool.description, tool.parameters, tool.strict, f"tools[{n}]", f"tools[{n}].parameters")
            for n, tool in enumerate(body.tools or ())
        ],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_variables=body.chat_template_kwargs or {},
        answer_format=read_format(wanted, body.structured_outputs, "text.format", "text.format.schema"),
        # Instructions are not dropped with old items.
        keep_messages=int(body.instructions is not None) if body.truncation == "auto" else None,
    )


def _tool_choice(body: wire.ResponseRequest) -> ToolChoice:
    match body.tool_choice:
        case wire.FunctionChoice(name=name):
            return ToolChoice("named", (name,))
        case wire.AllowedFunctions(mode=mode, tools=functions):
            return ToolChoice(mode, tuple(function.name for function in functions))
        case choice:
            return ToolChoice(choice or "auto")


def _describe(body: wire.ResponseRequest, turn: Turn) -> dict[str, Any]:
    """Return the response object before it has any output: the request's options, or their defaults."""
    head = {"id": new_id("resp"), "object": "response", "created_at": int(time.time()), "status": "in_progress"}
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    choice = body.tool_choice
    options = {
        "output": [],
        "store": body.store is not False,
        "temperature": turn.params.temperature,
        "top_p": turn.params.top_p,
        "truncation": body.truncation or "disabled",
        "tools": msgspec.Raw(encode_json([dict(tool) for tool in body.tools or ()])),
        "tool_choice": (choice or "auto") if choice is None or isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "top_logprobs": body.top_logprobs or 0,
        "metadata": body.metadata or {},
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": "default",
    }
    return head | UNDECIDED | {name: getattr(body, name) for name in REPEATED} | options | FIXED
