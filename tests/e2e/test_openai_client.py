"""The official Python client, synchronous and asynchronous: all that an application does with it."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from support.hostile import same
from support.serving import PATIENCE, ServerProcess

USER = {"role": "user", "content": "Who is there?"}
SEEDED = {"temperature": 1, "seed": 3}
Call = Callable[[Any], Any]
Ask = Callable[[Call], Any]


class Person(BaseModel):
    """What a structured answer holds here: of any length, so that it always ends."""

    name: Literal["Ann", "Bob"]
    age: int = Field(ge=0, le=99)
    tags: list[Literal["new", "old"]] = Field(max_length=3)


class Weather(BaseModel):
    """Arguments of a tool."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=7)


WEATHER = openai.pydantic_function_tool(Weather, name="weather", description="The weather of the next days.")
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "The time."}}


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Ask]:
    """Does one thing with either client; a stream comes as the list of its items, a stream helper as (events, end)."""
    options = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": PATIENCE}
    if request.param == "sync":
        with OpenAI(**options) as client:

            def ask(call: Call) -> Any:
                found = call(client)
                if hasattr(found, "__enter__") and not hasattr(found, "__iter__"):
                    with found as stream:
                        return list(stream), getattr(stream, FINALS[type(stream).__name__.removeprefix("Async")])()
                return list(found) if hasattr(found, "__next__") or "Page" in type(found).__name__ else found

            yield ask
        return

    async def ask_async(call: Call) -> Any:
        async with AsyncOpenAI(**options) as client:
            found = call(client)
            if hasattr(found, "__aenter__"):
                async with found as stream:
                    events = [event async for event in stream]
                    return events, await getattr(stream, FINALS[type(stream).__name__.removeprefix("Async")])()
            found = await found if inspect.isawaitable(found) else found
            return [item async for item in found] if hasattr(found, "__aiter__") else found

    yield lambda call: asyncio.run(ask_async(call))


FINALS = {"ChatCompletionStream": "get_final_completion", "ResponseStream": "get_final_response"}


def chat(**options: Any) -> Call:
    options = {"model": "tiny", "messages": [USER], "max_tokens": 16} | options
    return lambda client: client.chat.completions.create(**options)


def test_models_are_listed_and_found(ask: Ask) -> None:
    assert [model.id for model in ask(lambda client: client.models.list())] == ["tiny", "team/alias"]
    assert ask(lambda client: client.models.retrieve("team/alias")).id == "team/alias"


def test_a_chat_is_answered(ask: Ask) -> None:
    answer = ask(chat(**SEEDED))
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].message.role == "assistant"
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_adds_up_to_the_answer(ask: Ask) -> None:
    whole = ask(chat(**SEEDED))
    *chunks, last = ask(chat(**SEEDED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens, whole.usage.completion_tokens
    )  # fmt: skip


def test_the_clients_stream_helper_sees_every_event(ask: Ask) -> None:
    endless = {"extra_body": {"ignore_eos": True}, **SEEDED}
    whole = ask(chat(**endless)).choices[0].message.content
    stop = whole[5:7]
    text = whole.partition(stop)[0]
    options = {"model": "tiny", "messages": [USER], "max_tokens": 16, "stop": stop, **endless}
    events, final = ask(lambda client: client.chat.completions.stream(**options))
    assert final.choices[0].message.content == text
    assert "".join(event.delta for event in events if event.type == "content.delta") == text
    (done,) = (event for event in events if event.type == "content.done")
    assert done.content == text


def test_parse_gives_an_object_of_the_asked_type(ask: Ask) -> None:
    options = {"model": "tiny", "messages": [USER], "max_tokens": 300, **SEEDED}
    answer = ask(lambda client: client.chat.completions.parse(response_format=Person, **options))
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)
    events, final = ask(lambda client: client.chat.completions.stream(response_format=Person, **options))
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed
    assert next(event for event in events if event.type == "content.done").parsed == final.choices[0].message.parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_tool_call_has_arguments_that_parse(ask: Ask, choice: Any) -> None:
    options = {"model": "tiny", "messages": [USER], "max_tokens": 400, "tools": [WEATHER], "tool_choice": choice}
    options |= SEEDED | {"parallel_tool_calls": False}
    answer = ask(lambda client: client.chat.completions.parse(**options)).choices[0]
    (call,) = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert answer.message.content in (None, "")
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    events, final = ask(lambda client: client.chat.completions.stream(**options))
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    (done,) = (event for event in events if event.type == "tool_calls.function.arguments.done")
    assert (done.name, done.arguments) == ("weather", call.function.arguments)


def test_a_tools_result_goes_back_in(ask: Ask) -> None:
    tools = {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "function": {"name": "clock"}}}
    message = ask(chat(**tools, **SEEDED, max_tokens=300)).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
    turns = [USER, message.model_dump(exclude_none=True), result]
    again = ask(chat(messages=turns, tools=[WEATHER, CLOCK], tool_choice="none", **SEEDED))
    assert again.choices[0].message.tool_calls is None
    assert again.usage.prompt_tokens > len("user: Who is there?\nassistant:clock noon")


def test_choices_logprobs_and_stops_are_typed(ask: Ask) -> None:
    options = {"n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True}}
    choices = ask(chat(**options, **SEEDED)).choices
    assert [choice.index for choice in choices] == [0, 1]
    for choice in choices:
        assert len(choice.logprobs.content) == 16
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    stop = choices[0].message.content[4:6]
    stopped = ask(chat(stop=[stop], extra_body={"ignore_eos": True}, **SEEDED)).choices[0]
    assert stopped.message.content == choices[0].message.content.partition(stop)[0]


def test_logit_bias_commands_a_token(ask: Ask) -> None:
    answer = ask(chat(logit_bias={"70": 100}, temperature=0, max_tokens=5, extra_body={"return_token_ids": True}))
    assert answer.choices[0].token_ids == [70] * 5


@pytest.mark.parametrize(
    "prompt", ["Hi", ["Hi", "Ho"], [40, 41], [[40, 41], [42]]], ids=["text", "texts", "ids", "lists"]
)
def test_every_form_of_prompt_is_completed(ask: Ask, prompt: Any) -> None:
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "logprobs": 1, "extra_body": {"ignore_eos": True}}
    answer = ask(lambda client: client.completions.create(**options, **SEEDED))
    assert len(answer.choices) == (2 if isinstance(prompt[0], list) or prompt == ["Hi", "Ho"] else 1)
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices)
    chunks = ask(lambda client: client.completions.create(**options, **SEEDED, stream=True))
    for choice in answer.choices:
        assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == choice.index) == choice.text


def test_echo_puts_the_prompt_first(ask: Ask) -> None:
    options = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "echo": True, "logprobs": 0, **SEEDED}
    choice = ask(lambda client: client.completions.create(**options, extra_body={"ignore_eos": True})).choices[0]
    assert choice.text.startswith("Hello")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == 5 + 3


def numbers(embedding: Any) -> list[float]:
    """The numbers of a vector, from base64 if need be."""
    return np.frombuffer(base64.b64decode(embedding), "<f4").tolist() if isinstance(embedding, str) else embedding


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"], ids=["default", "float", "base64"])
def test_texts_become_embeddings_of_length_one(ask: Ask, encoding: Any) -> None:
    texts = ["red", "green", "red"]
    found = ask(lambda client: client.embeddings.create(model="tiny", input=texts, encoding_format=encoding))
    assert [entry.index for entry in found.data] == [0, 1, 2]
    if encoding == "base64":
        assert all(isinstance(entry.embedding, str) for entry in found.data)
    else:
        assert all(math.hypot(*entry.embedding) == pytest.approx(1, abs=1e-4) for entry in found.data)
    first, other, again = (numbers(entry.embedding) for entry in found.data)
    assert first == same(again)
    assert first != other
    assert found.usage.prompt_tokens == found.usage.total_tokens == len("redgreenred")


def test_a_response_is_made_stored_and_continued(ask: Ask) -> None:
    options = {"model": "tiny", "max_output_tokens": 16, "temperature": 0}
    first = ask(lambda client: client.responses.create(input="Hello", instructions="Be brief.", **options))
    assert (first.object, first.status) in (("response", "completed"), ("response", "incomplete"))
    assert isinstance(first.output_text, str)
    assert ask(lambda client: client.responses.retrieve(first.id)).output_text == first.output_text
    second = ask(lambda client: client.responses.create(input="Continue", previous_response_id=first.id, **options))
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    ask(lambda client: client.responses.delete(first.id))
    with pytest.raises(openai.NotFoundError):
        ask(lambda client: client.responses.retrieve(first.id))


def test_a_responses_stream_adds_up(ask: Ask) -> None:
    options = {"model": "tiny", "input": "Hello", "temperature": 1, "max_output_tokens": 90}
    options["extra_body"] = {"structured_outputs": {"regex": "[a-z]{30}"}, "seed": 4}
    whole = ask(lambda client: client.responses.create(**options))
    assert len(whole.output_text) == 30
    events = ask(lambda client: client.responses.create(**options, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    helped, final = ask(lambda client: client.responses.stream(**options))
    assert final.output_text == whole.output_text
    assert [event.type for event in helped] == [event.type for event in events]


def test_a_response_of_a_form_and_a_call(ask: Ask) -> None:
    options = {"model": "tiny", "input": "Hello", "max_output_tokens": 400, "temperature": 1}
    parsed = ask(lambda client: client.responses.parse(text_format=Person, **options))
    assert isinstance(parsed.output_parsed, Person)
    tool = {"type": "function", "name": "weather", "strict": True, "parameters": WEATHER["function"]["parameters"]}
    once = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}  # so that it always ends in time
    answer = ask(lambda client: client.responses.create(**once, **options))
    calls = [item for item in answer.output if item.type == "function_call"]
    assert len(calls) == 1
    assert Weather.model_validate_json(calls[0].arguments)
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"}
    history = [{"role": "user", "content": "Hello"}, calls[0].model_dump(exclude_none=True), result]
    ended = ask(lambda client: client.responses.create(**options | {"input": history, "max_output_tokens": 16}))
    assert ended.status in ("completed", "incomplete")


ERRORS: dict[str, tuple[Call, type[openai.APIStatusError], str | None]] = {
    "bad value": (chat(temperature=5), openai.BadRequestError, "temperature"),
    "bad value in a stream": (chat(temperature=5, stream=True), openai.BadRequestError, "temperature"),
    "unknown field": (chat(extra_body={"temprature": 1}), openai.BadRequestError, "temprature"),
    "no messages": (chat(messages=[]), openai.BadRequestError, "messages"),
    "too long": (chat(messages=[{"role": "user", "content": "Hi " * 10**5}]), openai.BadRequestError, "messages"),
    "bad schema": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}),
        openai.BadRequestError,
        "response_format",
    ),
    "unknown model": (chat(model="gpt-4o"), openai.NotFoundError, "model"),
    "unknown model card": (lambda client: client.models.retrieve("gpt-4o"), openai.NotFoundError, "model"),
    "unknown route": (lambda client: client.files.list(), openai.NotFoundError, None),
    "empty prompt": (lambda c: c.completions.create(model="tiny", prompt=""), openai.BadRequestError, "prompt"),
    "suffix": (lambda c: c.completions.create(model="tiny", prompt="a", suffix="b"), openai.BadRequestError, "suffix"),
    "no input": (lambda c: c.embeddings.create(model="tiny", input=[]), openai.BadRequestError, "input"),
    "unknown response": (
        lambda c: c.responses.create(model="tiny", input="a", previous_response_id="resp_0"),
        openai.BadRequestError, "previous_response_id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_failure_raises_the_clients_own_class_and_says_where(ask: Ask, case: str) -> None:
    call, kind, param = ERRORS[case]
    with pytest.raises(kind) as caught:
        ask(call)
    if param is not None:
        assert str(caught.value.param).startswith(param)
    assert caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_raw_answers_show_the_headers(ask: Ask) -> None:
    options = {"model": "tiny", "messages": [USER], "max_tokens": 1, "extra_headers": {"x-request-id": "mine-1"}}
    raw = ask(lambda client: client.chat.completions.with_raw_response.create(**options))
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "mine-1"
    assert raw.http_response.headers["content-type"] == "application/json"
    free = ask(lambda client: client.models.with_raw_response.list())
    assert free.headers["x-request-id"]


def test_a_timeout_is_raised_and_the_work_dropped(ask: Ask, server: ServerProcess) -> None:
    body = {"ignore_eos": True}
    with pytest.raises(openai.APITimeoutError):
        ask(lambda client: client.with_options(timeout=0.3).completions.create(
            model="tiny", prompt="Hi", max_tokens=8000, extra_body=body
        ))  # fmt: skip
    server.wait_until_idle()


def test_many_requests_at_once_are_all_answered(ask: Ask, server: ServerProcess) -> None:
    async def flood() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
            return await asyncio.gather(*(chat(**SEEDED, max_tokens=4)(client) for _ in range(40)))

    answers = asyncio.run(flood())
    assert {answer.choices[0].message.content for answer in answers} == {
        ask(chat(**SEEDED, max_tokens=4)).choices[0].message.content
    }


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_a_json_answer_parses(ask: Ask, form: str) -> None:
    schema = {"name": "person", "schema": Person.model_json_schema()}
    wanted = {"type": form} | ({"json_schema": schema} if form == "json_schema" else {})
    answer = ask(chat(response_format=wanted, max_tokens=400, **SEEDED)).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    if form == "json_schema":
        assert answer.finish_reason == "stop"
        Person.model_validate_json(answer.message.content)
