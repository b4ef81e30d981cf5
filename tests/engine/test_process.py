"""The loop of the engine process, without a process."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest
from paged_runner import make_core, message

from pyllm.engine.messages import LENGTH_BYTES, Shutdown, StepOutputs, encode_frame
from pyllm.engine.process import read_frames, serve


def test_an_engine_that_waits_for_work_checks_its_books():
    core = make_core()
    core.scheduler.kv_cache.pool.allocate(1)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(RuntimeError, match="1 KV blocks"):
        serve(core, theirs, read_frames(theirs))


def test_an_engine_whose_books_are_right_goes_on_waiting():
    core = make_core()
    core.add_request(message("r", [1] * 9, max_tokens=3))
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def frames():
            time.sleep(0.3)
            yield encode_frame(Shutdown())[LENGTH_BYTES:]

        serve(core, theirs, frames())
        theirs.close()
        steps = [msgspec.msgpack.decode(frame, type=StepOutputs) for frame in read_frames(ours)]
    assert [output.finish_reason for step in steps for output in step.outputs] == [None, None, "length"]
    core.check_idle()
