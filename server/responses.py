"""Responses: from items to an answer in items, and on from there."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ..engine.errors import RequestError
from .chat_template import ChatTemplateError
from .config import ServerConfig
from .errors import ApiError, JsonResponse, shorten
from .generation import Generation
from .protocol.chat import ChatCompletionRequest
from .protocol.responses import (
    AllowedFunctions,
    FunctionChoice,
    InputCall,
    InputCallOutput,
    InputMessage,
    ItemReference,
    ResponseRequest,
    SchemaFormat,
)
from .response_events import Answer, Item, ResponseEvents, new_id
from .response_store import ResponseStore
from .served_model import ServedModel
from .streaming import EventStream
from .turn import Turn, prepare_turn

TRANSLATED_FIELDS = {"tools", "tool_choice", "stream", "stream_options", "top_logprobs"}
SHARED_FIELDS = sorted({*ResponseRequest.model_fields} & {*ChatCompletionRequest.model_fields} - TRANSLATED_FIELDS)
RENAMED = (
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"(tools\[\d+\]|tool_choice)\.function", r"\1"),
)
"""What the fields of a chat are called here."""


async def create_response(
    request: Request, body: ResponseRequest, model: ServedModel, config: ServerConfig
) -> Response:
    """Answer input items, whole or as a stream; every refusal is raised before the answer begins."""
    name = model.check_name(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only for requests with stream.", param="stream_options")
    store: ResponseStore = request.app.state.responses
    items = read_items(body, store)
    try:
        turn, generation = await _begin(request, body, items, model)
    except (RequestError, ChatTemplateError) as error:
        raise _renamed(error) from None
    answer = Answer(_describe(body, name, turn), turn, model.tokenizer)
    keep = partial(store.put if body.store is not False else _forget, input_items=items)
    if body.stream:
        return EventStream(generation, ResponseEvents(answer, generation, keep), config.sse_keep_alive_interval)
    await generation.collect()
    (choice,) = generation.choices
    answer.take(choice.text, choice.logprobs)
    answer.finish(choice.finish_reason, generation.usage())
    keep(answer.response)
    return JsonResponse(answer.response)


def _forget(response: dict[str, Any], input_items: list[Item]) -> None:
    """Keep nothing."""


def read_items(body: ResponseRequest, store: ResponseStore) -> list[Item]:
    """All that the model is to read but the instructions, each item complete; raise `ApiError` or `RequestError`."""
    if body.input is None and body.previous_response_id is None:
        raise ApiError(400, "Missing required parameter: input.", param="input", code="missing_required_parameter")
    items: list[Item] = []
    if body.previous_response_id is not None:
        if (kept := store.find(body.previous_response_id)) is None:
            message = f"Previous response with id {shorten(body.previous_response_id)!r} not found."
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        items += kept.input_items() + kept.output_items()
    if isinstance(body.input, str):
        items.append(_complete(InputMessage(role="user", content=body.input)))
        return items
    for position, item in enumerate(body.input or ()):
        if isinstance(item, ItemReference):
            if (found := store.find_item(item.id)) is None:
                message = f"Item with id {shorten(item.id)!r} not found."
                raise RequestError(message, param=f"input[{position}].id", code="item_not_found")
            items.append(found)
        else:
            items.append(_complete(item))
    return items


def _complete(item: InputMessage | InputCall | InputCallOutput) -> Item:
    """An item as it is kept and shown."""
    shown: Item = item.model_dump(exclude_none=True)
    kind = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}[shown["type"]]
    shown |= {"id": item.id or new_id(kind), "status": item.status or "completed"}
    if isinstance(item, InputMessage):
        spoken = {"type": "output_text", "annotations": [], "logprobs": []}
        form = spoken if item.role == "assistant" else {"type": "input_text"}
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        shown["content"] = [form | {"text": text} for text in texts]
    return shown


def to_messages(items: list[Item]) -> list[dict[str, Any]]:
    """Items as a chat's messages: calls belong to the message that they follow."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item["type"]:
            case "message":
                content = [{"type": "text", "text": part["text"]} for part in item["content"]]
                messages.append({"role": item["role"], "content": content})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case _:
                output = item["output"]
                if not isinstance(output, str):
                    output = [{"type": "text", "text": part["text"]} for part in output]
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    return messages


def to_chat(body: ResponseRequest, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
    """The same request as a chat; raise `RequestError` for what a chat cannot be."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SHARED_FIELDS}
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    fields |= {"messages": instructions + messages, "max_completion_tokens": body.max_output_tokens}
    if _with_logprobs(body):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.tools:
        fields["tools"] = [{"type": "function", "function": _dump(tool, exclude={"type"})} for tool in body.tools]
    match body.tool_choice:
        case FunctionChoice() as function:
            fields["tool_choice"] = _named(function)
        case AllowedFunctions(mode=mode, tools=functions):
            allowed = {"mode": mode, "tools": [_named(function) for function in functions]}
            fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        case choice:
            fields["tool_choice"] = choice
    form = body.text.format if body.text else None
    if isinstance(form, SchemaFormat):
        fields["response_format"] = {"type": "json_schema", "json_schema": _dump(form, exclude={"type"})}
    elif form is not None:
        fields["response_format"] = {"type": form.type}
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:  # the fields are checked already; only all the messages together are not
        first = error.errors(include_url=False, include_input=False)[0]
        raise RequestError(f"input: {first['msg'].lower()}.", param="input") from None


def _named(function: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


def _dump(part: Any, **options: Any) -> dict[str, Any]:
    shown: dict[str, Any] = part.model_dump(by_alias=True, exclude_none=True, **options)
    return shown


def _with_logprobs(body: ResponseRequest) -> bool:
    return bool(body.include or body.top_logprobs)


async def _begin(
    request: Request, body: ResponseRequest, items: list[Item], model: ServedModel
) -> tuple[Turn, Generation]:
    """Submit the items, with `truncation` only those of the newest that fit."""
    messages = to_messages(items)
    if body.truncation == "auto" and len(messages) > 1 and not await _fits(body, messages, model):
        # The fewest of the oldest that make room; results stay with the message that has their calls.
        low, high = 0, len(messages) - 1
        while high > 0 and messages[high]["role"] == "tool":
            high -= 1
        while low + 1 < high:
            middle = (low + high) // 2
            if await _fits(body, _without(messages, middle), model):
                high = middle
            else:
                low = middle
        messages = _without(messages, high)
    chat = to_chat(body, messages)
    turn = await prepare_turn(chat, model)
    return turn, turn.generate(model, request, chat)


def _without(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The messages after the first `count`, less the results of calls that are gone."""
    called = {call["id"] for message in messages[count:] for call in message.get("tool_calls", ())}
    last = messages[-1]
    return [m for m in messages[count:] if m is last or m["role"] != "tool" or m["tool_call_id"] in called]


async def _fits(body: ResponseRequest, messages: list[dict[str, Any]], model: ServedModel) -> bool:
    """Whether messages leave room for the answer; other faults are raised as they are."""
    try:
        turn = await prepare_turn(to_chat(body, messages), model)
    except RequestError as error:
        if error.code == "context_length_exceeded":
            return False
        raise
    return len(turn.prompt) + (turn.params.max_tokens or 1) <= model.engine.info.max_model_len


def _renamed(error: RequestError | ChatTemplateError) -> RequestError:
    """The same failure with this endpoint's names of the fields."""
    if isinstance(error, ChatTemplateError):
        return RequestError(str(error), param="input", code="chat_template_error")
    message, param = str(error), error.param or "input"
    for pattern, name in RENAMED:
        param = re.sub(f"^{pattern}", name, param)
        message = re.sub(rf"\b{pattern}", name, message)
    param = re.sub(r"^messages\b.*", "input", param)
    message = re.sub(r"^messages\S*tool_call_id", "The call_id of a function_call_output", message)
    message = re.sub(r"^messages\S*", "input", message)
    return RequestError(message, param=param, code=error.code)


def _describe(body: ResponseRequest, name: str, turn: Turn) -> dict[str, Any]:
    """The response object before there is any output: what was asked, and the values that hold where nothing was."""
    text = _dump(body.text) if body.text else {}
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
        "model": name,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "background": False,
        "temperature": turn.params.temperature,
        "top_p": turn.params.top_p,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "truncation": body.truncation or "disabled",
        "tools": [tool.model_dump() for tool in body.tools or ()],
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
