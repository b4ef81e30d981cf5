"""What routers ask a server, and whether its engine still generates."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pyllm.engine.errors import EngineBusyError
from pyllm.server.api import server_info


def test_a_router_reads_the_servers_limits(harness):
    shown = harness.get("/server_info").json()
    config = harness.engine.info.config
    assert shown["max_total_num_tokens"] == 1600 == shown["page_size"] * config.num_kv_blocks
    assert shown["max_running_requests"] == config.max_num_seqs
    assert shown["max_queued_requests"] == config.max_num_queued_reqs
    assert shown["context_length"] == config.max_model_len
    assert shown["served_model_name"] == shown["model_path"] == "org/tiny"
    assert shown["tp_size"] == shown["dp_size"] == 1
    model = harness.get("/get_model_info").json()
    assert model["model_path"] == "org/tiny"
    assert model["is_generation"] is True


def test_the_engine_generates_a_token_for_a_health_check(harness):
    answer = harness.get("/health_generate")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    ((_, prompt, params),) = harness.engine.requests
    assert (len(prompt), params.max_tokens) == (1, 1)
    assert not harness.engine.running
    assert harness.metrics.finished == dict.fromkeys(harness.metrics.finished, 0), "it is no client's request"


def test_an_engine_that_generates_nothing_fails_its_health_check(harness, monkeypatch):
    monkeypatch.setattr(server_info, "PROBE_SECONDS", 0.2)
    harness.engine.hold_after = 0
    answer = harness.get("/health_generate")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_stuck"
    assert len(harness.engine.aborted) == 1, "and the request is dropped"
    harness.engine.error = "It broke."
    assert harness.get("/health_generate").json()["error"]["code"] == "engine_dead"
    assert harness.get("/ping").status_code == harness.get("/health").status_code == 503
    assert harness.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize("full", [False, True])
def test_an_engine_that_works_for_others_is_healthy(harness, monkeypatch, full):
    def refuse(*_: object, **__: object) -> None:
        raise EngineBusyError("The queue is full.", retry_after=1)

    harness.engine.hold_after = 0  # the probe waits behind other requests
    if full:
        monkeypatch.setattr(harness.engine, "submit", refuse)

    async def ask(client):
        asking = asyncio.ensure_future(client.get("/health_generate"))
        await asyncio.sleep(0.2)
        assert not asking.done()
        harness.engine.stats = msgspec.structs.replace(harness.engine.stats, step_tokens=5)
        return await asking

    assert harness.run(ask).status_code == 200
