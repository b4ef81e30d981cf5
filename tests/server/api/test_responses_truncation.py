"""An input of `/v1/responses` that is too long: refused, or cut where it may be."""

from __future__ import annotations

import json

import pytest
from support.responses_client import creator, prompts

from pyllm.server.api.responses import route as responses
from pyllm.server.chat.template import ChatTemplate


@pytest.fixture
def harness(make_harness, store_url):
    return make_harness(response_store=store_url)


@pytest.fixture
def create(harness):
    return creator(harness)


def long_items(harness):
    room = harness.engine.info.config.max_model_len
    return [{"role": "user", "content": f"{number:02}" + "." * (room // 8)} for number in range(12)]


def test_a_long_input_is_refused_or_loses_its_oldest_items(create, harness):
    error = create(400, input=long_items(harness))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    answer = create(input=long_items(harness), truncation="auto", instructions="Obey.", max_output_tokens=20)
    assert answer["truncation"] == "auto"
    assert answer["usage"]["input_tokens"] + 20 <= harness.engine.info.config.max_model_len
    (prompt,) = prompts(harness)
    kept = [number for number in range(12) if f"{number:02}." in prompt]
    assert kept == list(range(kept[0], 12))
    assert len(kept) > 3
    assert "Obey." in prompt
    create(400, input="." * 500, truncation="auto")


def test_truncation_drops_the_result_of_a_call_that_is_gone(create, harness):
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": json.dumps({"x": "." * 120})}
    words = [{"role": "user", "content": text} for text in ("Ask." + "." * 60, "Well?")]
    items = [words[0], call, words[1], {"type": "function_call_output", "call_id": "c1", "output": "Rain"}, words[1]]
    create(400, input=items)
    create(input=items, truncation="auto")
    (prompt,) = prompts(harness)
    assert "Well?" in prompt
    assert "Rain" not in prompt
    short = call | {"arguments": "{}"}
    create(input=[words[0], words[0], words[0], short, items[3]], truncation="auto")
    assert "Rain" in prompts(harness)[1]
    create(400, input=[], instructions="." * 300, truncation="auto")


@pytest.mark.parametrize("size", [100, 1])
def test_truncation_reads_once_and_renders_little_too_much(create, harness, monkeypatch, size):
    read, rendered = [], []
    read_conversation, render = responses.read_conversation, ChatTemplate.render_pieces
    monkeypatch.setattr(
        responses, "read_conversation", lambda *given: read.append(read_conversation(*given)) or read[-1]
    )
    monkeypatch.setattr(
        ChatTemplate, "render_pieces", lambda *given, **more: rendered.append(len(given[1])) or render(*given, **more)
    )
    items = [{"role": "user", "content": f"{number:04}" + "." * size} for number in range(1000)]
    create(input=items, truncation="auto", max_output_tokens=20)
    kept = [number for number in range(1000) if f"{number:04}" in prompts(harness)[0]]
    assert kept == list(range(kept[0], 1000))
    assert len(read) == 1
    assert sum(rendered) < 100


def test_too_many_items_or_calls_together_are_refused(create, monkeypatch):
    first = create(input="One")
    monkeypatch.setattr(responses.wire, "MAX_ITEMS", 2)
    assert create(400, input="Two", previous_response_id=first["id"])["param"] == "input"
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    assert create(400, input=[call] * 129)["param"] == "input"


def test_truncation_leaves_alone_what_fits(create, harness):
    create(input="One", truncation="auto")
    create(input="One")
    assert prompts(harness)[0] == prompts(harness)[1]
