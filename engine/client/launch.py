"""Starts the engine process. Light, so that a command can start it first and import what it needs itself meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..config import EngineConfig

# Compute threads that spin while they wait take the processor from the very thread they wait for as soon as anything
# else runs: beside one busy process a step took 280 ms so. Threads that spin for a moment and then sleep lose little
# when the machine is quiet (17 ms a step against 14) and keep going when it is not (29). Only OpenMP's own start can be
# told; what the user has set wins, and a spin count would silence the user's wait policy.
THREAD_SETTINGS = {"GOMP_SPINCOUNT": "1000"}
# One heap for all threads, where the C library would give each its own: what one thread frees, all can use again. With
# several the engine's memory still grew after eight minutes of mixed load, with one it stays the same after two.
MEMORY_SETTINGS = {"MALLOC_ARENA_MAX": "1"}

KILL_SECONDS = 3.0
"""How long a killed process is waited for."""


def python() -> list[str]:
    """The command of an interpreter like this one: without asserts, the environment or the user's packages where it is.

    A file of the folder it is started in is never taken for a module.
    """
    flags = sys.flags
    return [sys.executable, "-P" + "O" * flags.optimize + "E" * flags.ignore_environment + "s" * flags.no_user_site]


class EngineProcess:
    """A process of `pyllm.engine.process`, which loads its libraries at once and then waits to be configured."""

    command: ClassVar[Sequence[str]] = ("-m", "pyllm.engine.process")
    """What Python runs, with the descriptor of its end of the socket as the last argument."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.socket, theirs = socket.socketpair()  # our end and the engine's
        with theirs:
            try:
                # A session of its own: Ctrl-C in a terminal is for this process, which then decides.
                self._process = subprocess.Popen(
                    [*python(), *self.command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                    env=MEMORY_SETTINGS | ({} if "OMP_WAIT_POLICY" in os.environ else THREAD_SETTINGS) | os.environ,
                )  # fmt: skip
            except BaseException:
                self.socket.close()
                raise

    def configure(self, config: EngineConfig) -> None:
        """Tell it, once, what to load; does not wait for it."""
        from ..messages import encode_frame

        with contextlib.suppress(OSError):  # it has ended, which whoever waits for its answer will find out
            self.socket.sendall(encode_frame(config))

    def end(self, seconds: float = 0.0) -> int | None:
        """End it, after so many seconds to do so itself; return its exit code, None if not even a kill helps.

        Blocks for that long. Harmless when it has ended; the socket is left to whoever reads it.
        """
        for patience in (seconds, KILL_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(patience)
            self._process.kill()
        return None  # it is stuck in the operating system, as with a driver that hangs

    def kill(self) -> None:
        """End it now, whatever it does, and close the socket; harmless when it has ended."""
        self.end()
        self.socket.close()
