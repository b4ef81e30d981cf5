"""Responses: from items to an answer in items, and on from there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
from starlette.responses import Response

from ....engine.errors import RequestError
from ...chat.conversation import BETWEEN_PARTS, AnswerFormat, Conversation, Message, Tool, ToolCall, ToolChoice
from ...chat.turn import Turn, prepare_turn
from ...generation.generation import Generation
from ...generation.served_model import ServedModel
from ...generation.streaming import EventStream
from ...http.body import LARGE_BODY_BYTES
from ...http.budget import MAX_BODY_BYTES
from ...http.context import RequestContext
from ...http.errors import ApiError, JsonResponse, encode_json, shorten
from ...http.offload import is_large, off_loop_if_large
from ..fields import MAX_TOOLS, read_format, read_sampling
from .events import Answer, Item, ResponseEvents, new_id
from .store import KeptResponse, ResponseStore
from .wire import (
    MAX_ITEMS,
    AllowedFunctions,
    FunctionChoice,
    FunctionTool,
    InputCall,
    InputCallOutput,
    InputMessage,
    ItemReference,
    ResponseRequest,
)


async def create_response(
    context: RequestContext, body: ResponseRequest, model: ServedModel, store: ResponseStore
) -> Response:
    """Answer input items, whole or as a stream; every refusal is raised before the answer begins."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only for requests with stream.", param="stream_options")
    owner = context.owner
    sources = find_sources(body, store, owner)
    if sources.size >= LARGE_BODY_BYTES:
        is_large.set(True)
        await context.reserve(sources.size)
    conversation, items = await off_loop_if_large(_read, body, sources, model)
    turn = await prepare_turn(conversation, model)
    described = await off_loop_if_large(_describe, body, turn)
    generation = Generation(
        model, context, [turn.prompt], [turn.params],
        field="input", priority=body.priority or 0, cache_salt=body.cache_salt, streams=bool(body.stream),
    )  # fmt: skip
    answer = Answer(described, turn, model.tokenizer)
    keep = partial(store.put if body.store is not False else _forget, input_items=items, owner=owner)
    if body.stream:
        return EventStream(generation, ResponseEvents(answer, generation, keep), model.flags.sse_keep_alive_interval)
    await generation.collect()
    (choice,) = generation.choices
    answer.take(choice.text, choice.logprobs)
    answer.finish(choice.finish_reason, generation.usage())
    keep(answer.response)
    return JsonResponse(answer.response)


def _forget(response: dict[str, Any], input_items: bytes, owner: str) -> None:
    """Keep nothing."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The earlier responses that a request goes on after or has items of.

    Attributes:
        holders: by the ids of the items, the response of each.
        size: bytes that are to be read of them.
    """

    previous: KeptResponse | None
    holders: dict[str, KeptResponse]
    size: int


def find_sources(body: ResponseRequest, store: ResponseStore, owner: str = "") -> Sources:
    """Find what a request names; raise `ApiError` or `RequestError` for what is not kept, and for too much."""
    if body.input is None and body.previous_response_id is None:
        raise ApiError(400, "Missing required parameter: input.", param="input", code="missing_required_parameter")
    previous, size = None, 0
    if body.previous_response_id is not None:
        if (previous := store.find(body.previous_response_id, owner)) is None:
            message = f"Previous response with id {shorten(body.previous_response_id)!r} not found."
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        size = previous.context_size
        _check_size(size, "previous_response_id")
    holders: dict[str, KeptResponse] = {}
    counted: set[str] = set()
    for position, item in enumerate(body.input if isinstance(body.input, list) else ()):
        if not isinstance(item, ItemReference):
            continue
        param = f"input[{position}].id"
        if (holder := store.find_holder(item.id, owner)) is None:
            raise RequestError(f"Item with id {shorten(item.id)!r} not found.", param=param, code="item_not_found")
        if item.id in holders:
            raise RequestError(f"{param} names an item for the second time.", param=param)
        holders[item.id] = holder
        if counted.isdisjoint(holder.item_ids):
            size += holder.output_size
            _check_size(size, param)
        counted.update(holder.item_ids[:1])
    return Sources(previous, holders, size)


def _check_size(size: int, param: str) -> None:
    if size > MAX_BODY_BYTES:
        raise RequestError(f"The earlier items have more than {MAX_BODY_BYTES} bytes.", param=param)


def _read(body: ResponseRequest, sources: Sources, model: ServedModel) -> tuple[Conversation, bytes]:
    """The conversation that a request asks for, and the items that it is of, in JSON."""
    items = read_items(body, sources)
    kept = b"" if body.store is False else b"[%s]" % b",".join(map(encode_json, items))
    return read_conversation(body, to_messages(items), model), kept


def read_items(body: ResponseRequest, sources: Sources) -> list[Item]:
    """All that the model is to read but the instructions, each item complete."""
    items: list[Item] = []
    if sources.previous is not None:
        items += sources.previous.input_items() + sources.previous.output_items()
    if isinstance(body.input, str):
        return [*items, _complete(InputMessage(role="user", content=body.input))]
    decoded: dict[str, Item] = {}
    for item in body.input or ():
        if isinstance(item, ItemReference):
            if item.id not in decoded:
                decoded |= {found["id"]: found for found in sources.holders[item.id].output_items()}
            items.append(decoded[item.id])
        else:
            items.append(_complete(item))
    return items


def _complete(item: InputMessage | InputCall | InputCallOutput) -> Item:
    """An item as it is kept and shown."""
    kind = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}[item.type]
    shown: Item = item.model_dump(exclude_none=True, exclude={"content"})
    shown |= {"id": item.id or new_id(kind), "status": item.status or "completed"}
    if isinstance(item, InputMessage):
        spoken = {"type": "output_text", "annotations": [], "logprobs": []}
        form = spoken if item.role == "assistant" else {"type": "input_text"}
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        shown["content"] = [form | {"text": text} for text in texts]
    return shown


def to_messages(items: list[Item]) -> list[Message]:
    """Items as messages: calls belong to the assistant's message that they follow."""
    messages: list[Message] = []
    for is_call, group in groupby(items, key=lambda item: item["type"] == "function_call"):
        if is_call:
            calls = tuple(ToolCall(item["call_id"], item["name"], item["arguments"]) for item in group)
            if len(calls) > MAX_TOOLS:
                raise RequestError(f"input has more than {MAX_TOOLS} function calls in a row.", param="input")
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


def read_conversation(body: ResponseRequest, messages: list[Message], model: ServedModel) -> Conversation:
    """The conversation of messages that a request asks for; raises `RequestError`."""
    if body.instructions is not None:
        messages = [Message("system", body.instructions), *messages]
    if not 1 <= len(messages) <= MAX_ITEMS:
        many = f"more than {MAX_ITEMS} messages, with those before it" if messages else "no items"
        raise RequestError(f"input has {many}.", param="input")
    shows = bool(body.include or body.top_logprobs)
    return Conversation(
        messages=messages,
        messages_field="input",
        sampling={**read_sampling(body, model), "logprobs": (body.top_logprobs or 0) if shows else None},
        max_tokens=body.max_output_tokens,
        tools=[_tool(tool, position) for position, tool in enumerate(body.tools or ())],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        answer_format=_answer_format(body),
        # Instructions are of this response alone, and stay when old items go.
        keep_messages=int(body.instructions is not None) if body.truncation == "auto" else None,
    )


def _answer_format(body: ResponseRequest) -> AnswerFormat | None:
    wanted = body.text.format if body.text else None
    return read_format(wanted, body.structured_outputs, "text.format", "text.format.schema")


def _tool(tool: FunctionTool, position: int) -> Tool:
    field = f"tools[{position}]"
    return Tool(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict,
        name_field=f"{field}.name", parameters_field=f"{field}.parameters",
    )  # fmt: skip


def _tool_choice(body: ResponseRequest) -> ToolChoice:
    match body.tool_choice:
        case FunctionChoice(name=name):
            return ToolChoice("named", (name,))
        case AllowedFunctions(mode=mode, tools=functions):
            return ToolChoice(mode, tuple(function.name for function in functions))
        case choice:
            return ToolChoice(choice or "auto")


def _describe(body: ResponseRequest, turn: Turn) -> dict[str, Any]:
    """The response object before there is any output: what was asked, and the values that hold where nothing was."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    choice = body.tool_choice
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "model": body.model,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "background": False,
        "temperature": turn.params.temperature,
        "top_p": turn.params.top_p,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "truncation": body.truncation or "disabled",
        "tools": msgspec.Raw(encode_json([dict(tool) for tool in body.tools or ()])),
        "tool_choice": (choice or "auto") if choice is None or isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "top_logprobs": body.top_logprobs or 0,
        "reasoning": {"effort": "none", "summary": None},
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": "default",
    }
