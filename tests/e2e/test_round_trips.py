"""The official clients' own objects go back into the next request as they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel
from support.serving import PATIENCE, ServerProcess

USER: Any = {"role": "user", "content": "Hi"}


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]


TOOL: Any = openai.pydantic_function_tool(Weather, name="weather")
FLAT: Any = [{"type": "function", "strict": True} | TOOL["function"]]


def whole(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[USER], seed=1, max_tokens=100, **fields)


def parsed(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.parse(model="tiny", messages=[USER], seed=1, max_tokens=100, **fields)


def streamed(client: OpenAI, **fields: Any) -> Any:
    with client.chat.completions.stream(model="tiny", messages=[USER], seed=1, max_tokens=100, **fields) as stream:
        return stream.get_final_completion()


CHATS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (whole, {}),
    (whole, {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    (whole, {"logprobs": True, "extra_body": {"return_token_ids": True}}),
    (parsed, {"response_format": Weather}),
    (parsed, {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    (streamed, {}),
    (streamed, {"response_format": Weather}),
    (streamed, {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client declares `parsed` as always null
@pytest.mark.parametrize(("ask", "fields"), CHATS)
def test_a_chats_message_goes_back(client: OpenAI, ask: Callable[..., Any], fields: dict[str, Any]) -> None:
    message = ask(client, **fields).choices[0].message
    calls = message.tool_calls or []
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    assert bool(calls) == ("tools" in fields)
    tools = {"tools": fields["tools"]} if "tools" in fields else {}
    for form in (message, message.model_dump(), message.model_dump(exclude_none=True), message.to_dict()):
        history: Any = [USER, form, *results, USER]
        answer = client.chat.completions.with_raw_response.create(model="tiny", messages=history, max_tokens=2, **tools)
        assert answer.parse().usage.prompt_tokens > 10  # type: ignore[union-attr]
        assert "x-pyllm-ignored" not in answer.headers


@pytest.mark.parametrize("how", ["create", "parse", "stream"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_logprobs": 2},
        {"tools": FLAT, "tool_choice": "required", "parallel_tool_calls": False},
        {"text_format": Weather},
    ],
)
def test_a_responses_items_go_back(client: OpenAI, how: str, fields: dict[str, Any]) -> None:
    options: Any = {"model": "tiny", "input": [USER], "max_output_tokens": 100, "extra_body": {"seed": 1}} | fields
    if how == "create":
        if "text_format" in options:
            return
        response: Any = client.responses.create(**options)
    elif how == "parse":
        response = client.responses.parse(**options)
    else:
        with client.responses.stream(**options) as stream:
            response = stream.get_final_response()
    calls = [item.call_id for item in response.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call, "output": "sunny"} for call in calls]
    assert bool(calls) == ("tools" in fields)
    tools = {"tools": fields["tools"]} if "tools" in fields else {}
    for items in (
        response.output,
        response.model_dump()["output"],
        [item.model_dump() for item in response.output],
        [item.model_dump(exclude_none=True) for item in response.output],
        [item.to_dict() for item in response.output],
    ):
        history: Any = [USER, *items, *results, USER]
        again = client.responses.create(model="tiny", input=history, max_output_tokens=16, **tools)
        assert again.usage
        assert again.usage.input_tokens > 10


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


TOOL_OF_MESSAGES: Any = {"name": "weather", "input_schema": Weather.model_json_schema()}


@pytest.mark.parametrize("how", ["create", "stream", "parse", "beta"])
@pytest.mark.parametrize(
    "fields", [{}, {"tools": [TOOL_OF_MESSAGES], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}]
)
def test_a_messages_blocks_go_back(claude: Anthropic, how: str, fields: dict[str, Any]) -> None:
    options: Any = {"model": "tiny", "max_tokens": 100, "messages": [USER], "extra_body": {"seed": 1}} | fields
    if how == "create":
        message: Any = claude.messages.create(**options)
    elif how == "parse":
        if fields:
            return
        message = claude.messages.parse(output_format=Weather, **options)
    elif how == "beta":
        message = claude.beta.messages.create(betas=["context-management-2025-06-27"], **options)
    else:
        with claude.messages.stream(**options) as stream:
            message = stream.get_final_message()
    uses = [block.id for block in message.content if block.type == "tool_use"]
    assert bool(uses) == bool(fields)
    results: Any = [{"type": "tool_result", "tool_use_id": use, "content": "sunny"} for use in uses]
    for content in (
        message.content,
        message.model_dump()["content"],
        [block.model_dump(exclude_none=True) for block in message.content],
        [block.to_dict() for block in message.content],
    ):
        history: Any = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": results or "Hi"}]
        again = claude.messages.create(model="tiny", max_tokens=2, messages=history)
        assert again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0) > 10
