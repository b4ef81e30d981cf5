"""The HTTP answer of each failure."""

from __future__ import annotations

import asyncio

import pytest
from support.answers import error_of

from pyllm.engine.errors import EngineDeadError
from pyllm.server.chat.template import ChatTemplateError
from pyllm.server.http.errors import ApiError, to_api_error

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def test_each_kind_of_failure_has_its_status():
    assert to_api_error(ChatTemplateError("no")).status == 400
    assert to_api_error(EngineDeadError("gone")).status == 503
    no_threads = to_api_error(RuntimeError("can't start new thread"))
    assert (no_threads.status, no_threads.code) == (503, "no_threads")
    own = ApiError(418, "tea")
    assert to_api_error(own) is own


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_a_429_with_retry_after(harness, stream):
    harness.engine.most = 3
    response = harness.chat(n=4, stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    error = error_of(response)
    assert (error.type, error.code, error.param) == ("rate_limit_error", "queue_full", None)
    assert harness.engine.requests == [], "all or none"
    assert harness.chat(n=3, stream=stream).status_code == 200


def test_a_fault_inside_is_a_500_that_tells_nothing(harness, monkeypatch, caplog):
    def fail(*_, **__):
        raise KeyError("secret detail")

    monkeypatch.setattr(harness.engine, "submit", fail)
    response = harness.chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_failed_sequence_is_a_500_or_an_error_event(harness, events_of):
    harness.engine.fail_after = 2
    response = harness.chat(n=3)
    assert response.status_code == 500
    assert error_of(response).type == "server_error"
    assert harness.engine.running == set()
    assert events_of(harness.chat(n=3, stream=True))[-1]["error"]["code"] == "internal_error"
    assert harness.engine.running == set()


def test_engine_that_dies_on_the_way_ends_answers_with_an_error(harness, events_of):
    async def die(client):
        task = asyncio.create_task(client.post(CHAT, json={"messages": [USER], "stream": True, "n": 2}))
        await asyncio.sleep(0.05)
        harness.engine.error = "gone"
        harness.engine.release.set()
        return await task

    harness.engine.hold_after = 3
    events = events_of(harness.run(die))
    assert events[-1]["error"]["code"] == "engine_dead"
    assert 'finished_reason="error",model_name="org/tiny"} 2.0' in harness.get("/metrics").text
    assert 'finished_reason="abort",model_name="org/tiny"} 0.0' in harness.get("/metrics").text
