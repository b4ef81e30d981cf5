"""Calls that a limit or a stop string cuts off, and tools that cannot be called, on every route that knows tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PATHS = [CHAT, RESPONSES, MESSAGES]
LIMIT = {CHAT: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ARGUMENTS = '{"city": "Rome"}'
START = '<tool_call>{"name": "weather", "arguments": '
CALL = START + ARGUMENTS + "}</tool_call>"
MARKS = ("<", "tool_call", "name", "arguments", "weather", "{")
# Each tool choice in the words of each route.
CHOICES: dict[str, dict[str, Any]] = {
    CHAT: {"required": "required", "named": {"type": "function", "function": {"name": "weather"}}, "auto": "auto"},
    RESPONSES: {"required": "required", "named": {"type": "function", "name": "weather"}, "auto": "auto"},
    MESSAGES: {"required": {"type": "any"}, "named": {"type": "tool", "name": "weather"}, "auto": {"type": "auto"}},
}


def body(path: str, schema: Any = SCHEMA, choice: str = "auto", **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", ("input_schema" if path == MESSAGES else "parameters"): schema}
    strict = {"strict": fields.pop("strict")} if "strict" in fields else {}
    tool = {"type": "custom" if path == MESSAGES else "function"}
    tool |= {"function": function | strict} if path == CHAT else function | strict
    prompt: dict[str, Any] = {"input": "Hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "Hi"}]}
    prompt |= {"model": "org/tiny", "max_tokens": 99} if path == MESSAGES else {}
    return prompt | {"tools": [tool], "tool_choice": CHOICES[path][choice]} | fields


def whole(path: str, answer: dict[str, Any]) -> tuple[str, list[str], str]:
    """The words, the text of each call's arguments and why the answer ended."""
    if path == CHAT:
        message = answer["choices"][0]["message"]
        calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        assert not calls or message["content"] is None or message["content"]
        return message["content"] or "", calls, answer["choices"][0]["finish_reason"]
    if path == RESPONSES:
        texts = [item["content"][0]["text"] for item in answer["output"] if item["type"] == "message"]
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        cut = answer["status"] == "incomplete"
        assert answer["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
        assert all(call["status"] == answer["status"] for call in calls[-1:])
        return "".join(texts), [call["arguments"] for call in calls], "length" if cut else "stop"
    texts = [block["text"] for block in answer["content"] if block["type"] == "text"]
    calls = [json.dumps(block["input"]) for block in answer["content"] if block["type"] == "tool_use"]
    return "".join(texts), calls, answer["stop_reason"]


def streamed(path: str, text: str) -> tuple[str, list[str], str]:
    """The same of a stream."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if path == RESPONSES:
        return whole(path, events[-1]["response"])
    words, calls, reason = "", [], ""
    for event in events:
        if path == MESSAGES:
            delta = event.get("delta", {})
            words += delta.get("text", "")
            if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
                calls.append("")
            elif "partial_json" in delta:
                calls[-1] += delta["partial_json"]
            reason = delta.get("stop_reason", reason)
            continue
        (choice,) = event["choices"]
        words += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", ()):
            calls += [""] * (call["index"] + 1 - len(calls))
            calls[call["index"]] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return words, calls, reason


@pytest.fixture(autouse=True)
def room(harness):
    harness.engine.configure(max_model_len=1000)


@pytest.mark.parametrize("choice", ["required", "named", "auto"])
@pytest.mark.parametrize("path", PATHS)
def test_a_call_cut_by_the_limit_is_no_words(harness, path, choice):
    before = "I look. " if choice == "auto" else ""
    harness.engine.reply = before + CALL
    for limit in [*range(1, 13), 20, len(START), len(START) + 1, len(START) + 9]:
        asked = body(path, choice=choice, **{LIMIT[path]: limit + len(before)})
        answer = harness.post(path, asked).json()
        words, calls, reason = whole(path, answer)
        assert path != CHAT or before or answer["choices"][0]["message"]["content"] is None
        assert words.rstrip() == before.rstrip()
        shown = ARGUMENTS[: max(limit - len(START), 0)]
        if path == MESSAGES:  # the value that the client's own parser makes of unfinished JSON
            assert calls == (["{}"] if limit > len(START) else [])
        else:
            assert "".join(calls) == shown
        assert reason == ("max_tokens" if path == MESSAGES else "length")
        flow = streamed(path, harness.post(path, asked | {"stream": True}).text)
        assert (flow[0].rstrip(), flow[2]) == (words.rstrip(), reason)
        assert "".join(flow[1]) == shown


STOPS = ["<", "tool", "_call>", "name", "weather", '", "', "arguments", ": {", "city", "Ro", "me"]


@pytest.mark.parametrize("choice", ["required", "named", "auto"])
@pytest.mark.parametrize(("path", "included"), [*((path, False) for path in PATHS), (CHAT, True), (RESPONSES, True)])
def test_a_call_cut_by_a_stop_string_is_no_words(harness, path, choice, included):
    harness.engine.reply = CALL
    for stop in STOPS:
        field = {"stop_sequences" if path == MESSAGES else "stop": [stop]}
        asked = body(path, choice=choice, **field, **({"include_stop_str_in_output": True} if included else {}))
        answer = harness.post(path, asked).json()
        words, calls, reason = whole(path, answer)
        is_text = choice == "auto" and stop == "<" and not included
        assert words == ""
        assert path != CHAT or is_text or answer["choices"][0]["message"]["content"] is None
        assert len(calls) <= 1
        assert reason == ("stop_sequence" if path == MESSAGES else "stop" if is_text else "length")
        flow = streamed(path, harness.post(path, asked | {"stream": True}).text)
        assert (flow[0], len(flow[1]), flow[2]) == (words, len(calls), reason)
        if path != MESSAGES:
            assert flow[1] == calls


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("path", PATHS)
def test_a_failure_inside_a_call_leaves_no_markup(harness, path, choice):
    harness.engine.reply = CALL
    for failing in (1, 5, 20, len(START), len(START) + 9):
        harness.engine.fail_after = failing
        assert harness.post(path, body(path, choice=choice)).status_code == 500
        text = harness.post(path, body(path, choice=choice, stream=True)).text
        assert "The engine failed on this request." in text
        if path == RESPONSES:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert [item["type"] for item in events[-1]["response"]["output"]] in ([], ["function_call"])
            assert all(item["status"] == "incomplete" for item in events[-1]["response"]["output"])
        else:
            flow = streamed(path, "\n".join(line for line in text.splitlines() if '"error"' not in line))
            assert (flow[0], "".join(flow[1])) == ("", ARGUMENTS[: max(failing - 1 - len(START), 0)])


def test_a_stop_string_after_a_whole_call_ends_it_as_usual(harness):
    harness.engine.reply = CALL
    for stop in ("}</", "</tool", "call>"):
        for choice, reason in (("auto", "tool_calls"), ("required", "tool_calls"), ("named", "stop")):
            found = whole(CHAT, harness.post(CHAT, body(CHAT, choice=choice, stop=stop)).json())
            if stop != "call>":  # which occurs in the opening mark too
                assert found == ("", [ARGUMENTS], reason)


IMPOSSIBLE: list[Any] = [
    {"type": "array", "items": {"type": "integer"}}, {"type": "string"}, {"type": "integer"}, {"type": "null"},
    {"type": ["string", "null"]}, {"const": 5}, {"enum": ["a", 1, None]}, {"const": [1]},
    {"anyOf": [{"type": "string"}, {"type": "array"}]}, {"oneOf": [{"type": "integer"}, False]}, {"anyOf": [False]},
    {"allOf": [{"type": "object"}, {"type": "string"}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array"}}},
    {"anyOf": [{"$ref": "#/$defs/A"}, {"const": 1}], "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "boolean"}}},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_parameters_that_no_object_satisfies_are_refused(harness, path, stream):
    place = {CHAT: "tools[0].function.parameters", RESPONSES: "tools[0].parameters", MESSAGES: "tools[0].input_schema"}
    for schema in IMPOSSIBLE:
        for choice in ("required", "named", "auto"):
            response = harness.post(path, body(path, schema, choice, stream=stream))
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, place[path]), schema
            assert "must allow an object" in error["message"]
    strict = harness.post(path, body(path, {"type": "array"}, strict=True, stream=stream))
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, place[path])
    assert harness.engine.requests == []


POSSIBLE: list[Any] = [
    {}, {"type": ["object", "null"]}, {"anyOf": [{"type": "array"}, {"type": "object", "properties": {}}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"oneOf": [{"type": "string"}, {"$ref": "#/$defs/A"}], "$defs": {"A": {"enum": [{"a": 1}, 2]}}},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"next": {"$ref": "#/$defs/A"}}}}},
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_parameters_that_an_object_satisfies_are_enforced_as_one(harness, path):
    for schema in POSSIBLE:
        response = harness.post(path, body(path, schema, "required"))
        assert response.status_code == 200, (schema, response.text)


def test_a_format_does_not_matter_to_a_demanded_call(harness):
    harness.engine.reply = CALL
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"name": "a", "schema": schema}
    formats: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": named}}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, {"structured_outputs": {"regex": "a+"}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema"} | named}}),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
    ]
    for path, fields in formats:
        for choice in ("required", "named"):
            alone = harness.post(path, body(path, choice=choice))
            both = harness.post(path, body(path, choice=choice, **fields))
            assert both.status_code == 200, both.text
            assert whole(path, both.json()) == whole(path, alone.json())
            assert whole(path, both.json())[1] == [ARGUMENTS]
            grammars = [params.grammar for _, _, params in harness.engine.requests[-2:]]
            assert grammars[0] == grammars[1]
    bad = body(
        CHAT,
        choice="required",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}},
    )
    assert harness.post(CHAT, bad).json()["error"]["param"].startswith("response_format")
