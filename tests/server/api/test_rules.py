"""The table of fields without effect: each is accepted in silence, named in x-pyllm-ignored, or refused by name."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from support import rules_table
from support.answers import error_of
from support.grammars import accepts

from pyllm.server.api.rules import RULES
from pyllm.server.app import ENDPOINTS
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.http.shapes import Shape
from pyllm.server.http.tolerance import Rule

Harness = Any  # of conftest.py

TEXT = {"type": "text", "text": "Hi"}
SCHEMA = {"type": "object", "properties": {}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "messages": [
        {"role": "user", "content": [TEXT]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "4"}]},
]
TURNS = [
    {"role": "user", "content": [TEXT]},
    {"role": "assistant", "content": [TEXT, {"type": "tool_use", "id": "c1", "name": "f", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [TEXT]}]},
]
COUNT = {"model": "alias", "messages": TURNS, "system": [TEXT], "tools": [{"name": "f", "input_schema": SCHEMA}]}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"max_tokens": 3},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3},
    "/v1/responses": {"input": ITEMS, "tools": [{"type": "function", "name": "f"}], "max_output_tokens": 3},
    "/v1/messages": COUNT | {"max_tokens": 3},
    "/v1/messages/count_tokens": COUNT,
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": CHAT,
    "/detokenize": {"tokens": [5]},
}
VALUES = ("low", {"a": "b"})
TYPED_VALUES = (*VALUES, True, 7, ["x"], "completed", {"type": "ephemeral"})
CASES = [(path, place, rule) for path, rules in RULES.items() for place, rule in rules.table.items()]
IDS = [f"{path} {place}" for path, place, _ in CASES]


@pytest.fixture(scope="module")
def shared(make_harness: Any) -> Harness:
    harness = make_harness()
    harness.engine.configure(max_model_len=1500)
    return harness


def owners(value: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """The objects that can have the last of these names; missing objects on the way are made."""
    name, rest = names[0], names[1:]
    if not rest:
        yield value
    elif name.endswith("[]"):
        for item in value.get(name[:-2]) or ():
            if isinstance(item, dict):
                yield from owners(item, rest)
    elif isinstance(value, dict):
        yield from owners(value.setdefault(name, {"type": "ephemeral"} if name == "cache_control" else {}), rest)


def wire(path: str) -> type[BaseModel]:
    """The endpoint's model."""
    return next(endpoint.body for endpoint in ENDPOINTS if endpoint.path == path)


def fresh(path: str, place: str) -> dict[str, Any]:
    """A copy of the base without shared parts, and with what the place needs."""
    body: dict[str, Any] = json.loads(json.dumps(BASES[path]))
    if place.startswith("stream_options"):
        body["stream"] = True
    if place.startswith("structured_outputs") and "structured_outputs" in wire(path).model_fields:
        body["structured_outputs"] = {"json": SCHEMA}
    if place.startswith("response_format"):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    if place.startswith("text.format"):
        body["text"] = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    return body


def is_known(path: str, place: str) -> bool:
    """Whether the endpoint's model has the place, and checks its type."""
    shape: Shape | None = Shape((wire(path),))
    for name in place.split("."):
        shape = shape.member(name.removesuffix("[]")) if shape else None
        shape = shape.items if shape and name.endswith("[]") else shape
    return shape is not None


def bodies(path: str, place: str, value: Any) -> Iterator[dict[str, Any]]:
    """The base with a value at a place: once for each object that the place may be in."""
    names = place.split(".")
    for number in range(len(list(owners(fresh(path, place), names)))):
        body = fresh(path, place)
        owner = list(owners(body, names))[number]
        if place.endswith("[]"):
            owner[names[-1][:-2]] = [*owner.get(names[-1][:-2], ()), value]
        elif names[-1] not in owner:
            owner[names[-1]] = value
        yield body


def examples(rule: Rule, is_typed: bool) -> Iterator[Any]:
    """Values that ask for something; where the model checks the type, one of them passes."""
    if rule.items:
        for pattern in rule.items:
            name = pattern.replace("*", "x")
            yield name if "." in pattern else {"type": name}
    else:
        yield from (value for value in (TYPED_VALUES if is_typed else VALUES) if not rule.asks_for_nothing(value))


def ignored(response: httpx.Response) -> set[str]:
    return set(response.headers.get("x-pyllm-ignored", "").split(", ")) - {""}


def outcome(response: httpx.Response, place: str) -> str:
    """What happened to the field."""
    if response.status_code == 200:
        return "hint" if any(name.startswith(place.removesuffix("[]")) for name in ignored(response)) else "bookkeeping"
    error = response.json()["error"]
    assert response.status_code == 400
    assert re.sub(r"\[\d+\]", "[]", error["param"]).startswith(place), error
    assert place.rpartition(".")[2].removesuffix("[]") in error["message"]
    return "refused"


@pytest.mark.parametrize(("path", "place", "rule"), CASES, ids=IDS)
def test_each_entry_is_what_the_table_says(shared: Harness, path: str, place: str, rule: Rule) -> None:
    is_typed = is_known(path, place) and not rule.items
    values = list(examples(rule, is_typed))
    outcomes = [{outcome(shared.post(path, body), place) for body in bodies(path, place, value)} for value in values]
    if is_typed:
        assert rule.kind in set().union(*outcomes)
    else:  # an object of another kind may have a field of this name that acts
        assert outcomes
        assert all(rule.kind in found for found in outcomes), list(zip(values, outcomes, strict=True))


@pytest.mark.parametrize(("path", "place", "rule"), CASES, ids=IDS)
def test_each_value_that_asks_for_nothing_is_accepted(shared: Harness, path: str, place: str, rule: Rule) -> None:
    for value in (None, *rule.nothing):
        for body in bodies(path, place, value):
            response = shared.post(path, body)
            if not place.endswith("[]"):
                assert response.status_code == 200, (value, response.text)
                assert not ignored(response)


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "high"}, {"reasoning_effort"}),
        ("/v1/responses", {"reasoning": {"summary": "auto"}}, {"reasoning.summary"}),
        ("/v1/messages", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
         {"thinking", "output_config.effort"}),
        ("/v1/completions", {"reasoning_effort": "low"}, {"reasoning_effort"}),
    ],
)  # fmt: skip
def test_streams_name_ignored_hints_too(shared: Harness, path: str, fields: dict[str, Any], names: set[str]) -> None:
    response = shared.post(path, BASES[path] | fields | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert ignored(response) == names


@pytest.mark.parametrize(
    ("path", "fields", "prompt"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "high"}, "high True"),
        ("/v1/chat/completions", {"reasoning_effort": "none"}, "none False"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, " False"),
        ("/v1/responses", {"reasoning": {"effort": "low", "summary": None}}, "low True"),
        ("/v1/messages", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max True"),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, " False"),
    ],
)
def test_a_template_that_reasons_reads_the_hints(make_harness: Any, path: str, fields: Any, prompt: str) -> None:
    harness = make_harness()
    template = "{{ reasoning_effort or '' }} {{ enable_thinking }}"
    replaced = ChatTemplate.from_tokenizer(harness.tokenizer, override=template)
    harness.service.model = dataclasses.replace(harness.model, template=replaced)
    body = {"model": "alias", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    body = body if "responses" not in path else {"input": "Hi", "max_output_tokens": 3}
    response = harness.post(path, body | fields)
    assert response.status_code == 200, response.text
    assert not ignored(response)
    assert harness.tokenizer.decode(harness.engine.requests[-1][1], skip_special_tokens=True) == prompt


def test_null_and_what_is_empty_ask_for_nothing_under_any_name(shared: Harness) -> None:
    nothing = {"no_such_field": None, "cache_control": None}
    empty = {"no_such_list": [], "no_such_object": {}}
    chat = {
        "messages": [
            {"role": role, "content": [TEXT | nothing], "tool_calls": None, "refusal": None, "name": None} | nothing
            for role in ("system", "user", "assistant", "user")
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": None} | nothing} | nothing],
        "stream": True,
        "stream_options": {"include_usage": True} | nothing,
        "response_format": {"type": "text"} | nothing,
    }
    response = shared.post("/v1/chat/completions", chat | nothing | empty)
    assert response.status_code == 200, response.text
    assert not ignored(response)
    for path, base in BASES.items():
        assert shared.post(path, base | nothing | empty).status_code == 200


def test_null_in_free_json_is_kept(shared: Harness) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [None]}}, "required": ["a"], "default": None}
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = shared.chat(response_format=answer, no_such_field=None)
    assert response.status_code == 200, response.text
    grammar = shared.engine.requests[-1][2].grammar
    assert accepts(grammar, '{"a":null}')
    assert not accepts(grammar, '{"a":1}')


def test_many_messages_with_nulls_are_accepted(shared: Harness) -> None:
    message = {"role": "user", "content": "a", "tool_calls": None, "refusal": None, "audio": None}
    response = shared.post("/tokenize", {"messages": [message] * 1500})
    assert response.status_code == 200, response.text


def test_unknown_fields_can_be_ignored_by_a_flag(make_harness: Any) -> None:
    tolerant = make_harness(ignore_unknown_fields=True)
    body = {"messages": [{"role": "user", "content": "Hi", "mood": "good"}], "frobnicate": 1, "temperature": 0}
    response = tolerant.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert ignored(response) == {"frobnicate", "messages[].mood"}
    refused = tolerant.post("/v1/chat/completions", body | {"use_beam_search": True})
    assert error_of(refused).param == "use_beam_search"
    assert error_of(tolerant.post("/v1/chat/completions", body | {"temperature": 3})).param == "temperature"


def test_the_page_has_the_table() -> None:
    assert rules_table.written() == rules_table.table(), "run tests/support/rules_table.py"


def test_the_header_is_bounded_and_safe(make_harness: Any) -> None:
    tolerant = make_harness(ignore_unknown_fields=True)
    names = {f"näme, {n}\r\nset-cookie: a{'x' * 300}": 1 for n in range(500)}
    response = tolerant.chat(**names)
    assert response.status_code == 200
    assert len(response.headers["x-pyllm-ignored"]) <= 1024
    assert response.headers["x-pyllm-ignored"].endswith(", ...")
    assert "set-cookie" not in response.headers


def test_the_log_names_an_ignored_field_once(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pyllm.server"):
        for _ in range(3):
            harness.complete(thinking_token_budget=5)
    assert caplog.text.count("thinking_token_budget") == 1


@pytest.mark.parametrize("value", [[], {}, 5, None, True, "x", 2**63, [["a"]]])
@pytest.mark.parametrize("member", ["role", "type", "content"])
def test_odd_types_of_members_are_a_400(shared: Harness, member: str, value: Any) -> None:
    for path, name in (("/v1/chat/completions", "messages"), ("/v1/messages", "messages"), ("/v1/responses", "input")):
        message = {"role": "user", "content": [{"type": "text", "text": "a", member: value}], "x": None, member: value}
        response = shared.post(path, BASES[path] | {name: [message]})
        assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "no_such_variable"])
def test_a_variable_that_is_null_asks_for_nothing(shared: Harness, name: str) -> None:
    assert shared.chat(chat_template_kwargs={name: None}).status_code == 200


def test_long_unknown_names_are_not_kept(make_harness: Any) -> None:
    """The log names each once, so it must know them: a few bytes of each, not megabytes."""
    tolerant = make_harness(ignore_unknown_fields=True)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20):
            assert tolerant.chat(**{f"{number}" + "x" * 500_000: 1}).status_code == 200
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 5_000_000
    finally:
        tracemalloc.stop()
