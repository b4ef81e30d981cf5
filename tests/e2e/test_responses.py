"""Responses through the official client, with the bundled model."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from support.response_stores import STORES
from support.serving import PATIENCE, ServerProcess

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 80}
SUM = "What is 7+5?"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


@pytest.fixture(scope="module")
def model(demo: ServerProcess) -> str:
    return str(httpx.get(f"{demo.url}/v1/models").json()["data"][0]["id"])


@pytest.fixture(scope="module")
def talk(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module", params=STORES)
def store(
    request: pytest.FixtureRequest, demo: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The demo with each kind of store for its responses."""
    if request.param == "memory":
        yield demo
        return
    folder = tmp_path_factory.mktemp("store")
    url = f"sqlite://{folder}/responses.db" if request.param == "sqlite" else request.getfixturevalue("redis").url
    with ServerProcess(folder / "log", "--response-store", url) as server:
        yield server


@pytest.fixture(scope="module")
def stored(store: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{store.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def kinds(events: list[Any]) -> list[str]:
    """The types of events, each once where it repeats."""
    return [kind.removeprefix("response.") for kind, _ in itertools.groupby(event.type for event in events)]


def shown(response: Response) -> Any:
    """A response without what differs each time."""
    content = response.to_dict()
    for item in content["output"]:
        item.pop("id"), item.pop("call_id", None)
    return {name: value for name, value in content.items() if name not in ("id", "created_at", "completed_at")}


def test_a_response_answers_and_is_complete(talk: OpenAI, model: str) -> None:
    answer = talk.responses.create(model=model, input=SUM, **GREEDY)
    assert "12" in answer.output_text
    assert (answer.status, answer.object, answer.error) == ("completed", "response", None)
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    Response.model_validate(answer.to_dict())
    chat = talk.chat.completions.create(model=model, messages=[{"role": "user", "content": SUM}], temperature=0)
    assert chat.choices[0].message.content == answer.output_text
    assert chat.usage
    assert chat.usage.prompt_tokens == answer.usage.input_tokens


def test_streamed_response_has_the_events_in_order(talk: OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "input": SUM, "top_logprobs": 2, **GREEDY}
    whole = talk.responses.create(**options)
    events = list(talk.responses.create(**options, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert kinds(events) == ["created", "in_progress", *MESSAGE, "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    final, again = shown(events[-1].response), shown(whole)
    for content in (final, again):
        content["usage"].pop("input_tokens_details")  # the second time, the prompt is known
    logprobs = [content["output"][0]["content"][0].pop("logprobs") for content in (final, again)]
    assert final == again
    assert [entry["token"] for entry in logprobs[0]] == [entry["token"] for entry in logprobs[1]]
    assert "".join(entry["token"] for entry in logprobs[0]) == whole.output_text
    assert [e["logprob"] for e in logprobs[0]] == pytest.approx([e["logprob"] for e in logprobs[1]], abs=1e-3)


def test_the_clients_stream_helper_gathers_the_answer(talk: OpenAI, model: str) -> None:
    with talk.responses.stream(model=model, input=SUM, **GREEDY) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text
    assert "12" in final.output_text


@pytest.mark.anyio
async def test_the_async_client_creates_streams_and_chains(store: ServerProcess, model: str) -> None:
    async with AsyncOpenAI(base_url=f"{store.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        whole, stream = await asyncio.gather(
            client.responses.create(model=model, input=SUM, **GREEDY),
            client.responses.create(model=model, input=SUM, stream=True, **GREEDY),
        )
        events = [event async for event in stream]
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == whole.output_text
        async with client.responses.stream(
            model=model, input="And 2+2?", previous_response_id=whole.id, **GREEDY
        ) as following:
            final = await following.get_final_response()
    assert final.previous_response_id == whole.id


def test_a_chain_remembers_what_was_said(stored: OpenAI, model: str) -> None:
    first = stored.responses.create(model=model, input=SUM, instructions="Be brief.", **GREEDY)
    second = stored.responses.create(model=model, input="Thanks!", previous_response_id=first.id, **GREEDY)
    by_hand = stored.responses.create(
        model=model,
        input=[{"role": "user", "content": SUM}, *first.output, {"role": "user", "content": "Thanks!"}],  # type: ignore[list-item]
        **GREEDY,
    )
    assert second.output_text == by_hand.output_text
    assert second.usage
    assert by_hand.usage
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    items = list(stored.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.content[0].text for item in items] == [SUM, first.output_text, "Thanks!"]  # type: ignore[union-attr]


def test_a_kept_response_is_retrieved_deleted_and_gone(stored: OpenAI, model: str) -> None:
    answer = stored.responses.create(model=model, input=SUM, **GREEDY)
    assert stored.responses.retrieve(answer.id).to_dict() == answer.to_dict()
    with pytest.raises(openai.BadRequestError, match="background"):
        stored.responses.cancel(answer.id)
    stored.responses.delete(answer.id)
    for act in (
        stored.responses.retrieve,
        stored.responses.delete,
        stored.responses.cancel,
        stored.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            act(answer.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        stored.responses.create(model=model, input="x", previous_response_id=answer.id)
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "previous_response_not_found")


def test_parse_gives_an_object_of_the_asked_type(talk: OpenAI, model: str) -> None:
    for _ in range(3):
        answer = talk.responses.parse(model=model, input="Who are you?", text_format=Person, max_output_tokens=200)
        assert isinstance(answer.output_parsed, Person)
    with talk.responses.stream(model=model, input="Who?", text_format=Person, max_output_tokens=200) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_a_text_format_of_json_gives_an_object(talk: OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "input": "JSON", "max_output_tokens": 400, "extra_body": {"seed": 3}}
    answer = talk.responses.create(text={"format": {"type": "json_object"}}, **options)
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)
    assert answer.text
    assert answer.text.format
    assert answer.text.format.type == "json_object"


def test_a_structured_output_of_choices_is_one_of_them(talk: OpenAI, model: str) -> None:
    choices = ["certainly", "never"]
    answer = talk.responses.create(model=model, input="Well?", extra_body={"structured_outputs": {"choice": choices}})
    assert answer.output_text in choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=["required", "named"])
def test_required_call_fits_its_schema_and_takes_its_result(stored: OpenAI, model: str, choice: Any) -> None:
    options: dict[str, Any] = {"model": model, "tools": [TOOL], "max_output_tokens": 200}
    options["parallel_tool_calls"] = False
    question = {"role": "user", "content": "How is the weather in Paris?"}
    answer = stored.responses.create(input=[question], tool_choice=choice, extra_body={"seed": 5}, **options)
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.status, answer.status) == ("get_weather", "completed", "completed")
    assert list(json.loads(call.arguments)) == ["city"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 20 degrees."}
    chained = stored.responses.create(input=[result], previous_response_id=answer.id, temperature=0, **options)
    by_hand = stored.responses.create(input=[question, call, result], temperature=0, **options)
    assert chained.output_text == by_hand.output_text
    assert chained.usage
    assert answer.usage
    assert chained.usage.input_tokens > answer.usage.input_tokens


def test_streamed_call_has_the_events_and_the_same_arguments(talk: OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "input": "Weather?", "tools": [TOOL], "tool_choice": "required"}
    options |= {"parallel_tool_calls": False, "max_output_tokens": 200, "extra_body": {"seed": 5}}
    whole = talk.responses.create(**options)
    events = list(talk.responses.create(**options, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert kinds(events) == ["created", "in_progress", *CALL, "output_item.done", "completed"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == whole.output[0].arguments == events[-1].response.output[0].arguments  # type: ignore[union-attr]
    with talk.responses.stream(**options) as stream:
        parsed = stream.get_final_response().output[0]
    assert parsed.type == "function_call"
    assert parsed.parsed_arguments == json.loads(whole.output[0].arguments)  # type: ignore[union-attr]


def test_an_answer_that_is_cut_is_incomplete(talk: OpenAI, model: str) -> None:
    answer = talk.responses.create(model=model, input=SUM, max_output_tokens=2, extra_body={"ignore_eos": True})
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage
    assert answer.usage.output_tokens == 2


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"background": True}, "background", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0].type",
            "invalid_value",
        ),
        ({"extra_body": {"messages": [{"role": "user", "content": "x"}]}}, "messages", "unknown_parameter"),
        ({"input": "word " * 50_000}, "input", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "invalid_value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_refusal_names_the_field(
    talk: OpenAI, model: str, fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        talk.responses.create(**{"model": model, "input": "x", "stream": stream} | fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_an_unknown_model_is_not_found(talk: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        talk.responses.create(model="gpt-4o", input="x")


def test_a_client_that_leaves_a_stream_stops_the_work(demo: ServerProcess, talk: OpenAI, model: str) -> None:
    stream = talk.responses.create(model=model, input=SUM, stream=True, extra_body={"ignore_eos": True})
    assert next(iter(stream)).type == "response.created"
    stream.close()
    demo.wait_until_idle()


def test_the_page_describes_every_route(demo: ServerProcess) -> None:
    paths = httpx.get(f"{demo.url}/openapi.json").json()["paths"]
    one = "/v1/responses/{response_id}"
    found = {
        (path, method) for path, methods in paths.items() for method in methods if path.startswith("/v1/responses")
    }
    routes = {("/v1/responses", "post"), (one, "get"), (one, "delete")}
    assert found == routes | {(f"{one}/cancel", "post"), (f"{one}/input_items", "get")}
