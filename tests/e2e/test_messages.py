"""The bundled model through Anthropic's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import (
    Anthropic,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
)
from anthropic.types import Message
from pydantic import BaseModel
from support.serving import PATIENCE, ServerProcess

KEY = "open sesame"
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "get_weather",
    "description": "get the weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ADD = {
    "name": "add_numbers",
    "description": "add two numbers",
    "input_schema": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]
    },
}  # fmt: skip


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


WHAT_WEATHER = [user("What is the weather in Paris?")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`pyllm serve` with a key, and with no model named."""
    with ServerProcess(tmp_path_factory.mktemp("demo") / "log", "--api-key", KEY) as process:
        yield process


@pytest.fixture(scope="module")
def claude(demo: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo.url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def name(demo: ServerProcess) -> str:
    answer = httpx.get(f"{demo.url}/v1/models", headers={"x-api-key": KEY})
    return answer.raise_for_status().json()["data"][0]["id"]


@pytest.fixture
def ask(claude: Anthropic, name: str) -> Any:
    """Ask for a whole message, and for the same one as a stream, which must add up to it."""

    def both(messages: Any, *, sampling: dict[str, Any] = GREEDY, **fields: Any) -> Message:
        fields = {"model": name, "max_tokens": 80, "extra_body": sampling, "messages": messages} | fields
        whole = claude.messages.create(**fields)
        with claude.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        assert without_ids(streamed) == without_ids(whole)
        assert (streamed.stop_reason, streamed.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
        for usage in (streamed.usage, whole.usage):
            assert usage.cache_creation_input_tokens == 0
            assert usage.input_tokens > 0
        assert prompt_tokens(streamed) == prompt_tokens(whole)
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        return whole

    return both


def without_ids(message: Message) -> list[dict[str, Any]]:
    return [block.to_dict() | {"id": ""} for block in message.content]


def prompt_tokens(message: Message) -> int:
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def said(message: Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_an_answer_is_a_message(ask: Any, name: str) -> None:
    answer = ask([user("What is 7+5?")])
    assert re.search(r"\b12\b", said(answer))
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", name)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id == f"msg_{answer._request_id}"


def test_a_stream_gives_text_as_it_comes(claude: Anthropic, name: str) -> None:
    fields: dict[str, Any] = {"model": name, "max_tokens": 80, "messages": [user("How do I stream a response?")]}
    with claude.messages.stream(**fields, extra_body=GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == said(final)
    events = [event.type for event in claude.messages.create(**fields, extra_body=GREEDY, stream=True)]
    assert events[:2] == ["message_start", "content_block_start"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(events[2:-3]) == {"content_block_delta"}


@pytest.mark.anyio
async def test_the_asynchronous_client_gets_the_same(demo: ServerProcess, claude: Anthropic, name: str) -> None:
    fields: dict[str, Any] = {"model": name, "max_tokens": 40, "messages": [user("Hello!")], "extra_body": GREEDY}
    expected = said(claude.messages.create(**fields))
    async with AsyncAnthropic(base_url=demo.url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        assert said(await client.messages.create(**fields)) == expected
        async with client.messages.stream(**fields) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == expected
        assert (await client.messages.count_tokens(model=name, messages=[user("Hello!")])).input_tokens > 0


def test_sampling_with_a_seed_repeats_itself(ask: Any) -> None:
    ask([user("Tell me more.")], sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 5}, max_tokens=30)


def test_max_tokens_ends_the_answer(ask: Any) -> None:
    answer = ask([user("How do I stream a response?")], max_tokens=3)
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 3


def test_a_stop_sequence_ends_the_answer_and_is_named(ask: Any) -> None:
    whole = said(ask([user("How do I stream a response?")]))
    word = whole.split()[3]
    answer = ask([user("How do I stream a response?")], stop_sequences=["never said", word])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", word)
    assert said(answer) == whole[: whole.index(word)]


def test_the_system_message_is_part_of_the_prompt(ask: Any) -> None:
    bare = ask([user("Hello!")])
    for system in ("You are helpful.", [{"type": "text", "text": "You are helpful.",
                                         "cache_control": {"type": "ephemeral"}}]):  # fmt: skip
        assert prompt_tokens(ask([user("Hello!")], system=system)) > prompt_tokens(bare)


def test_count_tokens_says_what_the_usage_will(claude: Anthropic, ask: Any, name: str) -> None:
    for fields in (
        {"messages": [user("Hello!")]},
        {"messages": [user("Hello!")], "system": "You are helpful."},
        {"messages": WHAT_WEATHER, "tools": [WEATHER]},
        {"messages": [user("Hello!"), {"role": "assistant", "content": "Hello"}]},
    ):
        counted = claude.messages.count_tokens(model=name, **fields)
        assert counted.input_tokens == prompt_tokens(ask(**fields))


def test_usage_reports_cached_prompt_tokens(ask: Any) -> None:
    question = [user("Please repeat: " + "one two three " * 20)]
    ask(question, max_tokens=1)
    again = ask(question, max_tokens=1)
    assert (again.usage.cache_read_input_tokens or 0) >= 16
    assert again.usage.input_tokens < prompt_tokens(again)


def test_an_answer_that_was_begun_is_gone_on_with(ask: Any) -> None:
    whole = said(ask([user("Hello!")]))
    begun = whole[: whole.index(" ")]
    rest = ask([user("Hello!"), {"role": "assistant", "content": begun}])
    assert not said(rest).startswith(begun)
    assert said(rest)


def test_a_tool_is_called_and_its_result_is_put_into_words(ask: Any) -> None:
    call = ask(WHAT_WEATHER, tools=[WEATHER])
    assert call.stop_reason == "tool_use"
    use = call.content[-1]
    assert (use.type, use.name, use.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"temperature": 7, "sky": "cloudy"}'}
    turns = [*WHAT_WEATHER, {"role": "assistant", "content": call.content}, user([result])]
    answer = ask(turns, tools=[WEATHER])
    assert answer.stop_reason == "end_turn"
    assert said(answer)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add_numbers"}], ids=lambda c: c["type"])
def test_a_call_can_be_forced_and_its_input_fits_the_schema(ask: Any, choice: dict[str, Any]) -> None:
    tools = [ADD] if choice["type"] == "any" else [WEATHER, ADD]
    choice = choice | {"disable_parallel_tool_use": True}
    answer = ask([user("Hello!")], tools=tools, tool_choice=choice, max_tokens=200)
    (use,) = answer.content
    assert (use.type, use.name) == ("tool_use", "add_numbers")
    assert set(use.input) == {"a", "b"}
    assert all(isinstance(value, int) for value in use.input.values())
    assert answer.stop_reason == "tool_use"


def test_no_tool_is_called_where_none_may_be(ask: Any) -> None:
    answer = ask(WHAT_WEATHER, tools=[WEATHER], tool_choice={"type": "none"})
    assert all(block.type == "text" for block in answer.content)
    assert answer.stop_reason in ("end_turn", "max_tokens")


class Person(BaseModel):
    name: str
    age: int


def test_an_answer_can_be_made_to_fit_a_schema(claude: Anthropic, ask: Any, name: str) -> None:
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"enum": [1, 41]}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    config = {"format": {"type": "json_schema", "schema": schema}}
    Person.model_validate_json(said(ask([user("Hello!")], output_config=config, max_tokens=200)), strict=True)
    messages = [user("Write JSON: name Ann, age 41.")]
    parsed = claude.messages.parse(
        model=name, max_tokens=200, messages=messages, extra_body=GREEDY, output_format=Person
    )
    assert isinstance(parsed.parsed_output, Person)


@pytest.mark.parametrize(
    ("fields", "error", "kind", "words"),
    [
        ({"model": "claude"}, NotFoundError, "not_found_error", "'claude' does not exist"),
        ({"extra_body": {"nonsense": 1}}, BadRequestError, "invalid_request_error", "nonsense"),
        ({"messages": []}, BadRequestError, "invalid_request_error", "messages"),
        ({"container": "c"}, BadRequestError, "invalid_request_error", "container"),
        ({"messages": [user("Hi " * 10**4)]}, BadRequestError, "invalid_request_error", "context"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}},
            BadRequestError, "invalid_request_error", "other",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_refusal_raises_the_clients_own_error(
    claude: Anthropic, name: str, fields: dict[str, Any], error: type[Any], kind: str, words: str, stream: bool
) -> None:
    fields = {"model": name, "max_tokens": 10, "messages": [user("Hello!")], "stream": stream} | fields
    with pytest.raises(error, match=re.escape(words)) as caught:
        claude.messages.create(**fields)
    assert caught.value.type == kind
    assert caught.value.request_id == caught.value.body["request_id"]


def test_a_wrong_key_is_an_authentication_error(demo: ServerProcess, name: str) -> None:
    with (
        Anthropic(base_url=demo.url, api_key="wrong", max_retries=0, timeout=PATIENCE) as client,
        pytest.raises(AuthenticationError) as caught,
    ):
        client.messages.create(model=name, max_tokens=10, messages=[user("Hello!")])
    assert caught.value.type == "authentication_error"


def test_the_header_of_older_clients_is_a_key_too(demo: ServerProcess, name: str) -> None:
    body = {"model": name, "max_tokens": 5, "messages": [user("Hello!")]}
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    answer = httpx.post(f"{demo.url}/v1/messages", json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_a_stream_that_is_left_stops_the_engine(demo: ServerProcess, claude: Anthropic, name: str) -> None:
    with claude.messages.stream(
        model=name, max_tokens=900, messages=[user("Hello!")], extra_body={"temperature": 2.0}
    ) as stream:
        next(iter(stream.text_stream))
    demo.wait_until_idle()
