"""Messages in Anthropic's shape, with a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from pyllm.server.api.messages import route as module
from pyllm.server.api.messages.wire import CountTokensRequest, MessageAnswer, MessageEvent, TokenCount
from pyllm.server.chat.parts import CallPiece, Part
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.chat.turn import PlainReader, Turn

Harness = Any  # of conftest.py

# Writes what it is given, so that a prompt shows it; it must look as if it knew calls.
SHOWING = (
    "{# tool_calls #}{{ messages | tojson }}\n{{ tools | tojson }}\n{% if add_generation_prompt %}answer:{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object", "properties": {}}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Zürich"}}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def send(harness: Harness, **fields: Any) -> httpx.Response:
    return harness.post("/v1/messages", {"model": "alias", "max_tokens": 50, "messages": HI} | fields)


def valid(response: httpx.Response, model: type[BaseModel] = MessageAnswer) -> dict[str, Any]:
    """The body, held against its model."""
    model.model_validate(response.json())
    return response.json()


def events_in(response: httpx.Response) -> list[dict[str, Any]]:
    """The events, each held against the model, with its name checked."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    assert response.text.endswith("\n\n")
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        MessageEvent.model_validate(content)
        found.append(content)
    return found


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events add up to; asserts that they come in order."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == []
    inputs: list[str] = []
    is_open = False
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            is_open = True
            assert event["index"] == len(inputs)
            message["content"].append(event["content_block"])
            inputs.append("")
            continue
        assert is_open
        assert event["index"] == len(inputs) - 1
        if event["type"] == "content_block_stop":
            is_open = False
        elif event["delta"]["type"] == "text_delta":
            message["content"][-1]["text"] += event["delta"]["text"]
        else:
            inputs[-1] += event["delta"]["partial_json"]
    assert not is_open
    for block, data in zip(message["content"], inputs, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(data or "{}")
    return message | events[-2]["delta"] | {"usage": events[-2]["usage"]}


@pytest.fixture
def showing(harness: Harness) -> Harness:
    """Its prompts are what the template was given, and may be long."""
    template = ChatTemplate(harness.tokenizer, SHOWING)
    harness.service.model = harness.model = replace(harness.model, template=template)
    harness.engine.configure(max_model_len=8000)
    return harness


def shown(harness: Harness, **fields: Any) -> tuple[list[dict[str, Any]], Any]:
    """The messages and tools that the template was given."""
    assert send(harness, **fields).status_code == 200
    prompt = harness.tokenizer.decode(harness.engine.requests[-1][1])
    messages, tools, _ = prompt.split("\n")
    return json.loads(messages), json.loads(tools)


class ScriptedReader(PlainReader):
    """Reads `<name{json}>` as calls, one character at a time."""

    finish_reason = "tool_calls"

    def __init__(self) -> None:
        self.count = -1
        self.head: str | None = None
        self.inside = False

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        for character in text:
            if character == "<":
                self.head, self.inside = "", True
            elif character == ">":
                self.inside = False
            elif not self.inside:
                parts.append(character)
            elif self.head is not None and character == "{":
                self.count += 1
                parts.append(CallPiece(index=self.count, id=f"call_{self.count}", name=self.head))
                parts.append(CallPiece(index=self.count, arguments="{"))
                self.head = None
            elif self.head is not None:
                self.head += character
            else:
                parts.append(CallPiece(index=self.count, arguments=character))
        return parts


@pytest.fixture
def calling(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    """Its turns are read by `ScriptedReader`."""
    prepare = module.prepare_turn

    async def prepare_scripted(*arguments: Any) -> Turn:
        return replace(await prepare(*arguments), reader=ScriptedReader)

    monkeypatch.setattr(module, "prepare_turn", prepare_scripted)
    return harness


def test_an_answer_is_a_message(harness: Harness) -> None:
    response = send(harness)
    body = valid(response)
    assert body["content"] == [{"type": "text", "text": "Hello, wörld!"}]
    assert (body["id"], body["model"]) == (f"msg_{response.headers['request-id']}", "alias")
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    prompt = len(harness.engine.requests[0][1])
    assert body["usage"] == {
        "input_tokens": prompt - 3, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0, "output_tokens": 15
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said", "reason", "sequence"),
    [
        ({}, "Hello, wörld!", "end_turn", None),
        ({"max_tokens": 3}, "Hel", "max_tokens", None),
        ({"stop_sequences": ["wör", "zzz"]}, "Hello, ", "stop_sequence", "wör"),
        ({"stop_sequences": ["H"]}, "", "stop_sequence", "H"),
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(
    harness: Harness, fields: dict[str, Any], said: str, reason: str, sequence: str | None
) -> None:
    whole = valid(send(harness, **fields))
    assert "".join(block["text"] for block in whole["content"]) == said
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    events = events_in(send(harness, stream=True, **fields))
    assert put_together(events) | {"id": ""} == whole | {"id": ""}
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 3
    assert bool(whole["content"]) == bool(said)


def test_plain_text_turn_end_is_not_a_stop_sequence(harness: Harness) -> None:
    harness.engine.reply = "Yes.\n\nUser: more"
    body = valid(send(harness))
    assert body["content"] == [{"type": "text", "text": "Yes."}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    body = valid(send(harness, stop_sequences=["\n\nUser:"]))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "\n\nUser:")


@pytest.mark.parametrize("reply", ['<a{"x": 1}>', 'Wait.<a{"x": 1}><b{}>', 'One<a{"x": [1, "é"]}>two<b{"y": 2}>three'])
def test_tool_calls_are_blocks_with_parsed_input(calling: Harness, reply: str) -> None:
    calling.engine.reply = reply
    whole = valid(send(calling))
    calls = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert (calls[0]["id"], calls[0]["name"]) == ("call_0", "a")
    assert calls[0]["input"]["x"] in (1, [1, "é"])
    assert whole["stop_reason"] == "tool_use"
    assert put_together(events_in(send(calling, stream=True))) | {"id": ""} == whole | {"id": ""}


def test_a_call_that_is_cut_short_has_the_input_that_there_is(calling: Harness) -> None:
    calling.engine.reply = '<a{"city": "Rome", "unit": "celsius"}>'
    body = valid(send(calling, max_tokens=24))
    assert body["content"][0]["input"] == {"city": "Rome"}
    assert body["stop_reason"] == "max_tokens"


def test_input_that_is_no_json_is_shown_as_it_is(calling: Harness) -> None:
    calling.engine.reply = "<a{city: Rome}>"
    assert valid(send(calling))["content"][0]["input"] == {"INVALID_JSON": "{city: Rome}"}


def test_turns_reach_the_model_as_a_chat(showing: Harness) -> None:
    turns = [
        {"role": "user", "content": [text("Weather in Zürich?", cache_control={"type": "ephemeral", "ttl": "1h"})]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "redacted_thinking", "data": "x"},
            text("I look.", citations=None), CALL | {"caller": {"type": "direct"}}, CALL | {"id": "call_2"},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [text("7"), text("dry")]},
            {"type": "tool_result", "tool_use_id": "call_2", "content": "no such city", "is_error": True},
            text("And?"),
        ]},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    messages, tools = shown(showing, system=[text("Be brief."), text("Be kind.")], messages=turns)
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool", "user"]
    contents = [message["content"] for message in messages]
    assert contents == ["Be brief.\nBe kind.", "Weather in Zürich?", "I look.", "7\ndry",
                        "Error: no such city", "And?\nWell?"]  # fmt: skip
    calls = [call["function"] | {"id": call["id"]} for call in messages[2]["tool_calls"]]
    assert calls[0] == {"id": "call_1", "name": "get_weather", "arguments": {"city": "Zürich"}}
    assert [message.get("tool_call_id") for message in messages[3:5]] == ["call_1", "call_2"]


def test_an_answer_can_be_sent_back_as_it_came(showing: Harness) -> None:
    said = valid(send(showing))["content"]
    messages, _ = shown(showing, messages=[*HI, {"role": "assistant", "content": said}, *HI])
    assert messages[1] == {"role": "assistant", "content": "Hello, wörld!"}


def test_tools_reach_the_model(showing: Harness) -> None:
    _, tools = shown(showing, tools=[WEATHER | {"type": "custom", "cache_control": {"type": "ephemeral"}}])
    (tool,) = tools
    assert tool["type"] == "function"
    assert tool["function"]["name"] == "get_weather"
    assert tool["function"]["parameters"] == WEATHER["input_schema"]


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_as_the_model_writes_it_is_a_tool_use_block(showing: Harness, choice: dict[str, Any]) -> None:
    showing.engine.reply = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
    whole = valid(send(showing, **fields))
    (block,) = whole["content"]
    assert (block["name"], block["input"], whole["stop_reason"]) == ("get_weather", {"city": "Rome"}, "tool_use")
    streamed = put_together(events_in(send(showing, **fields, stream=True)))
    assert streamed["content"] == [block | {"id": streamed["content"][0]["id"]}]
    assert streamed["stop_reason"] == "tool_use"
    cut = valid(send(showing, **fields | {"max_tokens": 60}))
    assert cut["content"][0]["input"] == {}
    assert cut["stop_reason"] == "max_tokens"


def test_the_forms_of_the_answer_reach_the_engine(showing: Harness) -> None:
    assert send(showing, output_config={"format": SCHEMA}).status_code == 200
    assert showing.engine.requests[-1][2].grammar
    one = {"type": "auto", "disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}, one):
        assert send(showing, tools=[WEATHER], tool_choice=choice).status_code == 200
        assert showing.engine.requests[-1][2].grammar
    assert send(showing, tools=[WEATHER], tool_choice={"type": "auto"}).status_code == 200
    assert showing.engine.requests[-1][2].grammar is None


def test_an_answer_that_was_begun_is_gone_on_with(harness: Harness) -> None:
    assert send(harness, messages=[*HI, {"role": "assistant", "content": "Once"}]).status_code == 200
    prompt = harness.tokenizer.decode(harness.engine.requests[0][1])
    assert prompt.endswith("Assistant: Once")


def test_sampling_fields_reach_the_engine(harness: Harness) -> None:
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3, "max_tokens": 9}
    send(harness, **fields, stop_sequences=["x"], priority=4, cache_salt="me")
    params = harness.engine.requests[0][2]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.stop[0] == "x"
    assert harness.engine.extras[-1] == (4, "me")


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "me"}}, {"metadata": None}, {"service_tier": "auto"}, {"mcp_servers": []},
        {"thinking": {"type": "disabled"}}, {"container": None}, {"context_management": {}}, {"output_config": {}},
        {"cache_control": {"type": "ephemeral"}}, {"system": None}, {"system": ""}, {"tools": []}, {"stream": False},
        {"stop_sequences": []},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_changes_nothing(harness: Harness, fields: dict[str, Any]) -> None:
    send(harness)
    assert valid(send(harness, **fields))["content"] == [{"type": "text", "text": "Hello, wörld!"}]
    assert harness.engine.requests[0][1:] == harness.engine.requests[1][1:]


def test_a_failure_in_the_stream_is_an_error_event(harness: Harness) -> None:
    harness.engine.fail_after = 4
    events = events_in(send(harness, stream=True))
    assert [event["type"] for event in events[-2:]] == ["content_block_delta", "error"]
    assert events[-1]["error"]["type"] == "api_error"
    harness.engine.fail_after = 1
    assert [event["type"] for event in events_in(send(harness, stream=True))] == ["error"]


def test_count_tokens_counts_the_prompt_without_generating(harness: Harness) -> None:
    fields = {"model": "alias", "messages": HI, "system": "Be brief."}
    body = valid(harness.post("/v1/messages/count_tokens", fields), TokenCount)
    assert harness.engine.requests == []
    usage = send(harness, **fields).json()["usage"]
    assert body["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert (
        harness.post("/v1/messages/count_tokens", fields | {"max_tokens": 1}).json()["error"]["param"] == "max_tokens"
    )


def test_count_tokens_counts_what_is_longer_than_the_context(harness: Harness) -> None:
    fields = {"model": "alias", "messages": [{"role": "user", "content": "x" * 5000}]}
    body = valid(harness.post("/v1/messages/count_tokens", fields), TokenCount)
    assert body["input_tokens"] > 5000
    assert send(harness, **fields).status_code == 400


def test_assistant_turns_in_a_row_are_joined_only_once(showing: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(number: int) -> dict[str, Any]:
        return {"role": "assistant", "content": [text(f"{number}"), CALL | {"id": f"call_{number}"}]}

    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0", "content": "Rain"}]}
    messages, _ = shown(showing, messages=[*HI, answer(0), answer(1), answer(2), result])
    assert messages[1]["content"] == "0\n1\n2"
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["call_0", "call_1", "call_2"]

    class Separator(str):
        joins = 0

        def join(self, texts):
            Separator.joins += 1
            return super().join(texts)

    monkeypatch.setattr(module, "BETWEEN_PARTS", Separator("-"))
    body = CountTokensRequest.model_validate({"model": "m", "messages": [answer(number) for number in range(9)] + HI})
    assert module.read_conversation(body).messages[0].text == "0-1-2-3-4-5-6-7-8"
    assert Separator.joins == 2


def test_the_openapi_page_describes_both_routes(harness: Harness) -> None:
    page = harness.get("/openapi.json").json()
    for path, body in (("/v1/messages", "MessagesRequest"), ("/v1/messages/count_tokens", "CountTokensRequest")):
        route = page["paths"][path]["post"]
        assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{body}")
        assert route["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessagesError")
    assert {"MessagesRequest", "CountTokensRequest", "MessageEvent"} <= set(page["components"]["schemas"])
