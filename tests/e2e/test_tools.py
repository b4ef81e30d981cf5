"""Tools and answer formats through the official client, with the bundled model, which was trained to call tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel
from support.serving import PATIENCE, ServerProcess

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PING: Any = {"type": "function", "function": {"name": "ping"}}
BOOK: Any = {
    "type": "function",
    "function": {
        "name": "book_room",
        "parameters": {
            "type": "object",
            "properties": {
                "size": {"enum": ["single", "double"]},
                "nights": {"type": "integer", "minimum": 1, "maximum": 30},
                "guest": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "maxLength": 20},
                        "vip": {"type": "boolean"},
                        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
                    },
                    "required": ["name", "vip"],
                    "additionalProperties": False,
                },
            },
            "required": ["size", "nights", "guest"],
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def ask(client: OpenAI, *tools: Any, messages: Any = QUESTION, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 200} | options
    if tools:
        options["tools"] = list(tools)
    return client.chat.completions.create(model="pyllm-demo", messages=messages, **options)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def valid_booking(arguments: Any) -> bool:
    guest = arguments["guest"]
    return (
        arguments["size"] in ("single", "double")
        and arguments["nights"] in range(1, 31)
        and isinstance(guest["name"], str)
        and isinstance(guest["vip"], bool)
        and set(arguments) == {"size", "nights", "guest"}
        and set(guest) <= {"name", "vip", "tags"}
    )


def test_the_model_calls_a_tool_and_answers_with_its_result(client: OpenAI) -> None:
    first = ask(client, WEATHER).choices[0]
    assert calls_of(first.message) == [("get_weather", {"city": "Paris"})]
    assert first.message.content is None
    assert first.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id,
              "content": '{"temperature": 21, "condition": "sunny"}'}  # fmt: skip
    second = ask(client, WEATHER, messages=[*QUESTION, first.message, result]).choices[0]
    assert second.finish_reason == "stop"
    assert second.message.tool_calls is None
    assert "Paris" in second.message.content


def test_a_tool_that_is_not_needed_is_not_called(client: OpenAI) -> None:
    choice = ask(client, WEATHER, messages=[{"role": "user", "content": "Hello!"}]).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content
    assert choice.finish_reason == "stop"


def test_without_a_choice_of_tools_the_model_writes_text(client: OpenAI) -> None:
    choice = ask(client, WEATHER, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content == ask(client).choices[0].message.content


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("tool", [WEATHER, PING, BOOK], ids=lambda tool: tool["function"]["name"])
@pytest.mark.parametrize("stream", [False, True])
def test_required_and_named_calls_are_valid(client: OpenAI, tool: Any, temperature: int, stream: bool) -> None:
    name = tool["function"]["name"]
    named = {"type": "function", "function": {"name": name}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        options = {"tool_choice": choice, "parallel_tool_calls": False, "temperature": temperature, "seed": 3}
        if stream:
            with client.chat.completions.stream(
                model="pyllm-demo", messages=QUESTION, tools=[tool], max_tokens=400, **options
            ) as events:  # fmt: skip
                answer = events.get_final_completion()
        else:
            answer = ask(client, tool, max_tokens=400, **options)
        found = answer.choices[0]
        assert found.finish_reason == reason
        assert not found.message.content
        ((called, arguments),) = calls_of(found.message)
        assert called == name
        if tool is PING:
            assert found.message.tool_calls[0].function.arguments == "{}"
        elif tool is BOOK:
            assert valid_booking(arguments)
        else:
            assert isinstance(arguments["city"], str)


def test_one_of_several_functions_is_required(client: OpenAI) -> None:
    answer = ask(
        client, WEATHER, PING, BOOK, tool_choice="required", parallel_tool_calls=False, n=3, temperature=1, seed=7
    )
    for choice in answer.choices:
        ((name, _),) = calls_of(choice.message)
        assert name in ("get_weather", "ping", "book_room")


def test_a_streamed_call_adds_up_to_the_whole_one(client: OpenAI) -> None:
    whole = ask(client, WEATHER)
    chunks = list(ask(client, WEATHER, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    assert pieces[0].id
    assert pieces[0].function.name == "get_weather"
    assert all(piece.id is None and piece.index == 0 for piece in pieces[1:])
    arguments = "".join(piece.function.arguments for piece in pieces)
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert len(pieces) > 3, "the arguments come as they are written"
    assert not any(delta.content for delta in deltas)
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage == whole.usage


def test_logprobs_of_a_call_cover_all_its_tokens(client: OpenAI) -> None:
    answer = ask(client, WEATHER, logprobs=True, top_logprobs=2)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    chunks = list(ask(client, WEATHER, logprobs=True, top_logprobs=2, stream=True))
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in answer.choices[0].logprobs.content]


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_cut_off_leaves_no_markup(client: OpenAI, choice: Any) -> None:
    whole = ask(client, WEATHER, tool_choice=choice).choices[0].message.tool_calls[0].function.arguments
    cuts: list[dict[str, Any]] = [{"max_tokens": limit} for limit in (1, 3, 6, 9, 12, 15)]
    cuts += [{"stop": stop} for stop in ("name", "weather", "city", "Par", "tool_call>")]

    def check(cut: dict[str, Any]) -> None:
        choice_ = ask(client, WEATHER, tool_choice=choice, **cut).choices[0]
        assert (choice_.message.content, choice_.finish_reason) == (None, "length"), cut
        arguments = "".join(call.function.arguments for call in choice_.message.tool_calls or [])
        assert whole.startswith(arguments)
        chunks = [chunk.choices[0] for chunk in ask(client, WEATHER, tool_choice=choice, stream=True, **cut)]
        assert not any(chunk.delta.content for chunk in chunks)
        pieces = [call.function.arguments for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert ("".join(pieces), chunks[-1].finish_reason) == (arguments, "length")

    with ThreadPoolExecutor(len(cuts)) as pool:  # the engine computes them together
        list(pool.map(check, cuts))


def test_strict_function_with_auto_choice_is_called_validly(client: OpenAI) -> None:
    class GetWeather(BaseModel):
        """Get the current weather in a city"""

        city: str
        unit: Literal["celsius", "fahrenheit"]

    tool = pydantic_function_tool(GetWeather, name="get_weather")
    answer = client.chat.completions.parse(
        model="pyllm-demo", messages=QUESTION, tools=[tool], temperature=0, max_tokens=200  # type: ignore[arg-type]
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)
    plain = ask(client, tool, messages=[{"role": "user", "content": "Hello!"}])
    assert plain.choices[0].message.content


class Person(BaseModel):
    name: str
    age: int
    role: Literal["guest", "host"]


def test_an_answer_is_parsed_into_the_model_that_was_asked_for(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Make a JSON object for Anna, who is 31."}]
    for tools in ({}, {"tools": [pydantic_function_tool(Person, name="save")]}):
        answer = client.chat.completions.parse(
            model="pyllm-demo",
            messages=messages,
            response_format=Person,
            temperature=1,
            seed=5,
            max_tokens=300,
            **tools,
        )
        message = answer.choices[0].message
        assert isinstance(message.parsed, Person) or message.tool_calls, message.content
        assert answer.choices[0].finish_reason in ("stop", "tool_calls")


def test_structured_outputs_hold(client: OpenAI) -> None:
    def said(outputs: Any) -> str:
        answer = ask(client, temperature=1, seed=1, extra_body={"structured_outputs": outputs})
        return str(answer.choices[0].message.content)

    assert said({"choice": ["rain", "sun"]}) in ("rain", "sun")
    assert said({"regex": "[0-9]{3}"}).isdecimal()
    assert said({"grammar": 'start: "a" "b"+ "c"'}).strip("b") != ""
    assert isinstance(json.loads(said({"json": {"type": "object", "maxProperties": 1}})), dict)
    mode: Any = {"type": "json_object"}
    question = [{"role": "user", "content": "Make a JSON object with name Anna and age 31."}]
    answer = ask(client, messages=question, response_format=mode)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
