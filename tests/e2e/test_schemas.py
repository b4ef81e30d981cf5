"""Schemas through every door of the server: what is promised arrives, and what cannot be is refused by its place."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

BIG = 1180293847561029384
USER = {"role": "user", "content": "?"}
ID = {
    "type": "object",
    "properties": {"id": {"enum": [BIG, BIG + 1]}},
    "required": ["id"],
    "additionalProperties": False,
}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


def doors(schema: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each way to ask for a schema: the path, and the body without its size."""
    inner, function = {"name": "x", "schema": schema, "strict": True}, {"name": "f", "parameters": schema}
    asked, talked = {"model": "tiny", "messages": [USER], "max_tokens": 100}, {"input": "?", "max_output_tokens": 100}
    return {
        "response_format": (CHAT, asked | {"response_format": {"type": "json_schema", "json_schema": inner}}),
        "structured_outputs": (COMPLETIONS, {"prompt": "?", "max_tokens": 100, "structured_outputs": {"json": schema}}),
        "text.format": (RESPONSES, talked | {"text": {"format": {"type": "json_schema"} | inner}}),
        "output_config": (MESSAGES, asked | {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
        "tools": (CHAT, asked | {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}),
        "tools of responses": (
            RESPONSES, talked | {"tools": [{"type": "function"} | function], "tool_choice": "required"},
        ),
        "tools of messages": (
            MESSAGES, asked | {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("door", doors({}))
def test_a_long_id_arrives_to_the_last_digit(http: httpx.Client, door: str) -> None:
    path, body = doors(ID)[door]
    answer = http.post(path, json=body | {"temperature": 1.0})
    assert answer.status_code == 200, answer.text
    assert str(BIG) in answer.text or str(BIG + 1) in answer.text


@pytest.mark.parametrize("door", doors({}))
def test_what_cannot_be_promised_is_refused_by_its_place(http: httpx.Client, door: str) -> None:
    schema = ID | {"properties": {"id": {"type": "integer", "multipleOf": 7, "minimum": BIG}}}
    path, body = doors(schema)[door]
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert "properties.id.multipleOf" in answer.json()["error"]["message"]


def test_a_long_number_with_a_point_is_the_same_number(http: httpx.Client) -> None:
    body = {"prompt": "?", "max_tokens": 30, "structured_outputs": {"json": {"const": BIG}}}
    text = json.dumps(body).replace(str(BIG), f"{BIG}.0")
    answer = http.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"] == str(BIG)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a"]},
    ],
)
def test_a_strict_schema_is_taken_as_it_stands(http: httpx.Client, schema: Any) -> None:
    path, body = doors(schema)["response_format"]
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    json.loads(answer.json()["choices"][0]["message"]["content"])


def test_a_gbnf_grammar_shapes_the_text(http: httpx.Client) -> None:
    body = {"prompt": "?", "structured_outputs": {"grammar": 'root ::= "a" root | [bc] "!"'}, "max_tokens": 60}
    assert http.post(COMPLETIONS, json=body).json()["choices"][0]["text"][-2:] in ("b!", "c!")


def test_a_failure_within_an_answer_is_no_answer(http: httpx.Client) -> None:
    # Two keys match, and three must be there, which is not known beforehand.
    schema = {"type": "object", "patternProperties": {"^a+$": {"const": 1}}, "propertyNames": {"maxLength": 2},
              "additionalProperties": False, "minProperties": 3}  # fmt: skip
    path, body = doors(schema)["response_format"]
    assert http.post(path, json=body).status_code == 400
    text = http.post(path, json=body | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]
    assert "every key" in events[-1]["error"]["message"]
    assert not any(choice["finish_reason"] for event in events for choice in event.get("choices", ()))
