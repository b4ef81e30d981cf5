"""Notices a hung engine: a process that still runs but makes no progress."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..messages import Ping

CHECKS = 30  # how many times the engine is checked within the timeout


class Pipe(Protocol):
    """The interface of the socket to the engine that the watchdog uses."""

    num_received: int  # how many times data has arrived

    def send(self, message: Ping) -> None: ...


async def wait_for_hang(pipe: Pipe, timeout: float) -> None:  # noqa: ASYNC109 - it returns when the time is up
    """Return when the engine has sent nothing for `timeout` seconds, although it was pinged.

    Each message shows that its main loop makes progress: a step's outputs, the reply to a ping, or, in a long step,
    the end of another layer. Time is counted in checks, so that a pause of this process, in which messages pile up
    unread, does not count as a hang.
    """
    received, silent = pipe.num_received, 0
    while silent < CHECKS - 1:  # the last message may have arrived up to one interval before the check that counted it
        await asyncio.sleep(timeout / CHECKS)
        silent = silent + 1 if pipe.num_received == received else 0
        received = pipe.num_received
        if silent == CHECKS // 3:
            pipe.send(Ping())
