"""How often and how soon a dead engine is started again, and what is said and counted meanwhile."""

from __future__ import annotations

import asyncio
import errno
import time

import msgspec
import pytest

from pyllm.engine.errors import EngineStartError
from pyllm.engine.messages import EngineStats, StepOutputs
from pyllm.server import restarts as module
from pyllm.server.generation.metrics import Metrics
from pyllm.server.restarts import Restarts


def test_the_pause_grows_up_to_a_minute_and_restarts_run_out():
    restarts = Restarts(9)
    assert [restarts.next_pause() for _ in range(10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60, None]
    assert restarts.next_pause() is None


def test_without_restarts_there_is_no_pause():
    assert Restarts(0).next_pause() is None


@pytest.fixture
def no_pauses(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return slept


NO_ROOM = EngineStartError("There is no room.")
NO_PROCESS = OSError(errno.ENOMEM, "Cannot allocate memory")


def successors(harness, *outcomes):
    """Let the engine's successors fail to start where an outcome is an error."""
    left = list(outcomes)

    async def successor():
        assert harness.service.restarting == "loading"
        assert harness.service.alive, "as it is when it is loaded for the first time"
        if error := left.pop(0):
            raise error
        engine = type(harness.engine)(harness.tokenizer)
        engine.successor = successor
        return engine

    harness.engine.successor = successor


def test_a_start_that_fails_counts_and_is_tried_again(harness, no_pauses, caplog):
    harness.engine.error = "It was killed."
    successors(harness, NO_ROOM, NO_PROCESS, None)
    revived = asyncio.run(Restarts(3).revive(harness.service, harness.model))
    assert no_pauses == [1, 2, 4]
    assert harness.service.model is revived is not harness.model
    assert revived.engine.is_alive
    assert harness.service.restarting == ""
    assert harness.get("/ready").status_code == 200
    assert "failed to start: There is no room." in caplog.text
    assert "failed to start: [Errno 12] Cannot allocate memory" in caplog.text


def test_when_no_restarts_are_left_it_is_over(harness, no_pauses):
    harness.engine.error = "It was killed."
    successors(harness, NO_ROOM, NO_ROOM)
    assert asyncio.run(Restarts(2).revive(harness.service, harness.model)) is None
    assert harness.service.restarting == ""
    assert harness.get("/health").status_code == 503


def test_supervision_ends_when_no_restarts_are_left(harness, no_pauses, monkeypatch):
    async def wait_dead(self):
        self.error = "It was killed."

    monkeypatch.setattr(type(harness.engine), "wait_dead", wait_dead)
    successors(harness, None, None)
    asyncio.run(Restarts(2).supervise(harness.service, harness.model))
    assert no_pauses == [1, 2]
    assert harness.service.model is not harness.model
    assert harness.get("/health").status_code == 503


def test_restarts_are_forgotten_after_a_time_of_health(harness, no_pauses, monkeypatch):
    harness.engine.error = "It was killed."
    successors(harness, None, None, None)
    restarts = Restarts(1)
    model = asyncio.run(restarts.revive(harness.service, harness.model))
    assert asyncio.run(restarts.revive(harness.service, model)) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + module.HEALTHY_SECONDS)
    assert asyncio.run(restarts.revive(harness.service, model)) is not None


@pytest.mark.parametrize(("state", "health"), [("waiting", 503), ("loading", 200)])
def test_restarting_engine_shows_in_probes_and_answers(harness, state, health):
    harness.engine.error = "It was killed."
    harness.service.restarting = state
    assert harness.get("/health").status_code == health
    for answer in (harness.get("/ready"), harness.chat()):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarting")
        assert int(answer.headers["retry-after"]) > 0


def values(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_counts_continue_from_engine_to_engine():
    reported = EngineStats(
        num_running=3, kv_cache_usage=0.5, num_preemptions=2, prefix_cache_queries=100, prefix_cache_hits=40,
        num_drafts=7, num_draft_tokens=20, num_accepted_tokens=[5, 3], step_tokens=9,
        expert_tokens=[[4, 6], [1, 9]], expert_reroutes=[0, 2],
    )  # fmt: skip
    metrics = Metrics("m", lambda: reported)
    metrics.on_step(StepOutputs(outputs=[], stats=reported))
    before = values(metrics)
    fresh = EngineStats()
    metrics.follow(lambda: fresh)
    after = values(metrics)
    counts = [name for name in before if not any(word in name for word in ("running", "usage", "restarts", "created"))]
    assert [after[name] for name in counts] == [before[name] for name in counts]
    assert after['pyllm:num_requests_running{model_name="m"}'] == 0
    assert after['pyllm:engine_restarts_total{model_name="m"}'] == 1
    metrics.follow(lambda: msgspec.structs.replace(reported, num_accepted_tokens=[1]))
    metrics.on_step(StepOutputs(outputs=[], stats=reported))
    last = values(metrics)
    assert last['pyllm:num_preemptions_total{model_name="m"}'] == 4
    assert last['pyllm:spec_decode_num_accepted_tokens_total{model_name="m"}'] == 9
    assert last['pyllm:expert_tokens_total{expert="1",layer="1",model_name="m"}'] == 18
    assert last['pyllm:expert_reroutes_total{layer="1",model_name="m"}'] == 4
