"""When an engine counts as hung."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from pyllm.engine.client import watchdog
from pyllm.engine.client.watchdog import wait_for_hang
from pyllm.engine.messages import Ping

pytestmark = pytest.mark.anyio
TIMEOUT = 0.6


class Pipe:
    """The client's end of a socket whose engine may answer a ping."""

    def __init__(self, answers: Callable[[], bool] = lambda: False) -> None:
        self.num_received = 0
        self.sent: list[object] = []
        self._answers = answers

    def send(self, message: object) -> None:
        self.sent.append(message)
        self.num_received += self._answers()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_silence_after_a_ping_is_a_hang():
    pipe, started = Pipe(), time.monotonic()
    await asyncio.wait_for(wait_for_hang(pipe, TIMEOUT), 30)
    assert time.monotonic() - started > 0.9 * TIMEOUT * (watchdog.CHECKS - 1) / watchdog.CHECKS
    assert pipe.sent == [Ping()]


async def test_answered_pings_are_no_hang():
    pipe = Pipe(lambda: True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait_for_hang(pipe, TIMEOUT), 3 * TIMEOUT)
    assert len(pipe.sent) > 1


async def test_progress_in_a_long_step_is_no_hang():
    pipe = Pipe()
    hang = asyncio.create_task(wait_for_hang(pipe, TIMEOUT))
    for _ in range(12):
        await asyncio.sleep(TIMEOUT / 4)
        pipe.num_received += 1
        assert not hang.done()
    hang.cancel()


async def test_a_pause_of_the_client_is_no_hang():
    pipe = Pipe(lambda: True)
    hang = asyncio.create_task(wait_for_hang(pipe, TIMEOUT))
    await asyncio.sleep(TIMEOUT / 2)
    time.sleep(3 * TIMEOUT)  # noqa: ASYNC251 - nothing runs meanwhile, as on a machine that swaps
    await asyncio.sleep(TIMEOUT / 2)
    assert not hang.done()
    hang.cancel()
