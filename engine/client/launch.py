"""Starts the engine process. Imports little, so that a command can start it before it loads its own modules."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..config import EngineConfig

# Compute threads that spin take the processor from the thread that they wait for as soon as another program runs:
# with one other busy process a step took 280 ms. Threads that spin briefly and then sleep take 17 ms instead of 14 on a
# quiet machine, and 29 on that busy one. Only OpenMP's start-up reads these. The user's own settings win, and a spin
# count would override the user's wait policy.
THREAD_SETTINGS = {"GOMP_SPINCOUNT": "1000"}
# One heap for all threads instead of one each, so that every thread can reuse memory that another has freed: with
# several heaps, the engine's memory still grew after eight minutes of mixed load; with one, it is constant after two.
MEMORY_SETTINGS = {"MALLOC_ARENA_MAX": "1"}
# NumPy multiplies no matrices here, so its library need not start a thread for each processor.
NUMPY_SETTINGS = {"OPENBLAS_NUM_THREADS": "1"}
KILL_SECONDS = 3.0  # how long to wait for a killed process
# A supervisor or a terminal may send these to every process; the API process ends the engine, after draining.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def python() -> list[str]:
    """Return the command of an interpreter with this one's flags, which never imports from the current folder."""
    flags = sys.flags
    return [sys.executable, "-P" + "O" * flags.optimize + "E" * flags.ignore_environment + "s" * flags.no_user_site]


class EngineProcess:
    """A process of `pyllm.engine.process`, which loads its libraries at once and then waits to be configured."""

    command: ClassVar[Sequence[str]] = ("-m", "pyllm.engine.process")
    """Python's arguments; the descriptor of the engine's end of the socket is added as the last one."""
    popen: ClassVar[type[subprocess.Popen[bytes]]] = subprocess.Popen  # tests fork a process instead

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.socket, theirs = socket.socketpair()
        # These signals are blocked in the new process from its start, until it ignores them.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        with theirs:
            try:
                # In a session of its own, so that Ctrl-C in a terminal reaches only this process, which decides.
                self._process = self.popen(
                    [*python(), *self.command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                    env=MEMORY_SETTINGS | NUMPY_SETTINGS
                    | ({} if "OMP_WAIT_POLICY" in os.environ else THREAD_SETTINGS) | os.environ,
                )  # fmt: skip
            except BaseException:
                self.socket.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def configure(self, config: EngineConfig) -> None:
        """Send the process its settings, once, without waiting for it."""
        from ..messages import encode_frame

        with contextlib.suppress(OSError):  # it has exited, which shows when its reply is read
            self.socket.sendall(encode_frame(config))

    def end(self, seconds: float = 0.0) -> int | None:
        """Wait `seconds` for the exit, then kill; return the exit code, or None if even that fails. Blocks."""
        for patience in (seconds, KILL_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(patience)
            self._process.kill()
        return None  # it is stuck in the operating system, for example in a driver that hangs

    def kill(self) -> None:
        """Kill the process and close the socket; does nothing if it has exited."""
        self.end()
        self.socket.close()
