"""Where the work on a request is done: on the event loop for a small one, and off it for one that is large."""

from __future__ import annotations

import threading

import pytest

from pyllm.server.api import chat, completions
from pyllm.server.api.messages import route as messages
from pyllm.server.api.responses import route as responses
from pyllm.server.api.responses import store as response_store
from pyllm.server.chat import structured_output, tool_choice, turn
from pyllm.server.chat.template import ChatTemplate, is_deeper
from pyllm.server.http import body as bodies

HI = [{"role": "user", "content": "Hi"}]
TURN = [(turn, name) for name in ("read_tools", "_check_template_options", "_tools_as_text", "sampling_params")]
TURN += [(tool_choice, "is_deeper"), (bodies, "parse_body"), (ChatTemplate, "_text")]
CHAT = (
    "/v1/chat/completions",
    {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]},
    [*TURN, (chat, "read_conversation")],
)
MESSAGES = (
    "/v1/messages",
    {"model": "alias", "max_tokens": 9, "messages": HI},
    [*(one for one in TURN if one[1] not in ("read_tools", "is_deeper")), (messages, "read_conversation")],
)
RESPONSES = (
    "/v1/responses",
    {"input": "Hi", "tools": [{"type": "function", "name": "f"}]},
    [*TURN, (responses, "read_items"), (responses, "read_conversation"), (responses, "_describe")],
)
READING = [(completions, name) for name in ("read_response_format", "read_sampling", "sampling_params")]
COMPLETIONS = ("/v1/completions", {"prompt": "Hi"}, [(bodies, "parse_body"), *READING])


@pytest.fixture
def threads(monkeypatch):
    """Note in which threads each of some functions is called."""

    def watch(work):
        found = {}
        for module, name in work:
            seen = found[name] = set()
            monkeypatch.setattr(module, name, noting(getattr(module, name), seen))
        return found

    def noting(function, seen):
        def noted(*arguments, **options):
            seen.add(threading.current_thread())
            return function(*arguments, **options)

        return noted

    return watch


@pytest.mark.parametrize(
    ("path", "fields", "work"), [CHAT, MESSAGES, RESPONSES, COMPLETIONS],
    ids=["chat", "messages", "responses", "completions"],
)  # fmt: skip
def test_all_work_on_a_large_body_is_done_off_the_event_loop(harness, monkeypatch, threads, path, fields, work):
    found = threads(work)
    assert harness.post(path, fields).status_code == 200
    assert set.union(*found.values()) == {threading.main_thread()}
    monkeypatch.setattr(bodies, "LARGE_BODY_BYTES", 10)
    for seen in found.values():
        seen.clear()
    assert harness.post(path, fields).status_code == 200
    assert [name for name, seen in found.items() if not seen or threading.main_thread() in seen] == []


def test_a_short_schema_becomes_a_grammar_off_the_event_loop(harness, threads):
    found = threads([(structured_output, "SchemaCompiler")])
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    harness.post("/v1/chat/completions", {"model": "alias", "messages": HI, "response_format": form})
    assert found["SchemaCompiler"]
    assert threading.main_thread() not in found["SchemaCompiler"]


def test_long_conversation_is_parsed_off_the_event_loop(harness, monkeypatch, threads):
    first = harness.post("/v1/responses", {"input": "One"}).json()
    found = threads([(responses, "read_items"), (turn, "_tools_as_text"), (response_store, "_page")])
    monkeypatch.setattr(responses, "LARGE_BODY_BYTES", 100)
    monkeypatch.setattr(response_store, "LARGE_BODY_BYTES", 100)
    second = harness.post("/v1/responses", {"input": "Two", "previous_response_id": first["id"]}).json()
    assert second["status"] == "completed"
    assert len(harness.get(f"/v1/responses/{second['id']}/input_items").json()["data"]) == 3
    assert [name for name, seen in found.items() if not seen or threading.main_thread() in seen] == []


@pytest.mark.parametrize(
    ("value", "depth"), [(1, 0), ([], 1), ({}, 1), ([1, {"a": 2}], 2), ({"a": [[]], "b": [1]}, 3), ("[[]]", 0)]
)
def test_depth_is_counted_in_lists_and_objects(value, depth):
    assert [is_deeper(value, levels) for levels in range(5)] == [levels < depth for levels in range(5)]


def test_long_texts_are_read_off_the_event_loop(harness, monkeypatch):
    threads = []
    encode_pieces = harness.tokenizer.encode_pieces

    def note(text, **options):
        if text.startswith("x"):
            threads.append(threading.current_thread() is threading.main_thread())
        yield from encode_pieces(text, **options)

    monkeypatch.setattr(harness.tokenizer, "encode_pieces", note)
    harness.engine.configure(max_model_len=10_000)
    harness.complete(prompt="x" * 5000)
    harness.complete(prompt="x")
    assert threads == [False, True]
