"""The loop of the engine process, without a process."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest
from support.paged_runner import make_core, message

from pyllm.engine import process as module
from pyllm.engine.messages import (
    LENGTH_BYTES,
    Alive,
    FromEngine,
    Ping,
    Shutdown,
    StepOutputs,
    encode_frame,
    read_frames,
)
from pyllm.engine.process import LoadReports, receive, serve


def test_an_engine_that_waits_for_work_checks_its_books():
    core = make_core()
    core.scheduler.kv_cache.pool.allocate(1)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(RuntimeError, match="1 KV blocks"):
        serve(core, theirs, receive(read_frames(theirs.makefile("rb"))))


def test_consistent_idle_engine_keeps_waiting():
    core = make_core()
    core.add_request(message("r", [1] * 9, max_tokens=3))
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def frames():
            time.sleep(0.3)
            yield encode_frame(Shutdown())[LENGTH_BYTES:]

        serve(core, theirs, receive(frames()))
        theirs.close()
        steps = [msgspec.msgpack.decode(frame, type=StepOutputs) for frame in read_frames(ours.makefile("rb"))]
    assert [output.finish_reason for step in steps for output in step.outputs] == [None, None, "length"]
    core.check_idle()


def conversation(core, *messages):
    """What the engine says to these messages, which come at once."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serve(core, theirs, receive(iter([encode_frame(each)[LENGTH_BYTES:] for each in (*messages, Shutdown())])))
        theirs.close()
        return [msgspec.msgpack.decode(frame, type=FromEngine) for frame in read_frames(ours.makefile("rb"))]


def test_a_ping_is_answered_by_the_loop_that_steps():
    assert conversation(make_core(), Ping(), Ping()) == [Alive(), Alive()]


def test_a_request_that_cannot_be_taken_in_ends_alone(monkeypatch):
    core = make_core()
    add = core.scheduler.add

    def faulty(request):
        if request.request_id == "bad":
            raise KeyError("the inside")
        add(request)

    monkeypatch.setattr(core.scheduler, "add", faulty)
    said = conversation(core, message("bad", [1], max_tokens=3), message("good", [1] * 70, max_tokens=1), Ping())
    (failed,), (refused,) = [step.outputs for step in said if isinstance(step, StepOutputs)]
    assert (failed.request_id, failed.finish_reason, failed.refused) == ("bad", "error", False)
    assert "the inside" in failed.error, "for the log"
    assert (refused.request_id, refused.refused) == ("good", True)
    core.check_idle()


def test_loading_is_reported_now_and_then(monkeypatch):
    clock, sent = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    report = LoadReports(sent.append)
    for second in range(26):
        clock[0] = 100.0 + second
        report(second, 25)
    assert [message.done for message in sent] == [1, 11, 21], "soon, then every ten seconds, and not at the end"
    assert {message.total for message in sent} == {25}


@pytest.mark.parametrize(("seconds", "pulses"), [(0.0, 0), (0.1, 3)])
def test_only_a_long_step_reports_layer_progress(monkeypatch, seconds, pulses):
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.05)
    core = make_core()

    class NoExperts:
        on_layer = None

        def count(self):
            return [], []

    core.observer, execute = NoExperts(), core.runner.execute

    def slow(sequences):
        for _ in range(3):
            time.sleep(seconds)
            core.observer.on_layer()
        return execute(sequences)

    core.runner.execute = slow
    core.add_request(message("r", [1] * 9, max_tokens=1, ignore_eos=True))
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def frames():
            time.sleep(0.6)
            yield encode_frame(Shutdown())[LENGTH_BYTES:]

        serve(core, theirs, receive(frames()))
        theirs.close()
        said = [msgspec.msgpack.decode(frame, type=FromEngine) for frame in read_frames(ours.makefile("rb"))]
    assert said.count(Alive()) == pulses
    assert isinstance(said[-1], StepOutputs)
