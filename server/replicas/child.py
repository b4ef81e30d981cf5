"""The server of one replica: `pyllm serve` as it is, a child process on a private Unix socket."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..flags import ENVIRONMENT_PREFIX, OTHER_VARIABLES
from .cores import Cores, claim_cores
from .relay import fetch

POLL_SECONDS = 0.05
KEPT_LINES = 20  # of the end of the log
SENTENCE = "pyllm: "  # begins the line in which a command says why it cannot start


class ReplicaStartError(RuntimeError):
    """The server of a replica has ended before it was ready; the message is its own sentence."""


class ServerChild:
    """Starts, watches and stops a server with these settings, on `cores` of its own if there are so many."""

    def __init__(self, settings: Mapping[str, Any], cores: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pyllm-"))  # of mode 0700
        self.socket = str(self._folder / "http")
        # A file rather than arguments, which every user of the machine can see: it may hold keys.
        self._config = self._folder / "flags.json"
        self._config.touch(mode=0o600)
        self._config.write_text(json.dumps(settings), encoding="utf-8")
        self._cores = claim_cores(cores) if cores else Cores()
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        numbers, node = self._cores.numbers, self._cores.node
        own = [str(Path(__file__).with_name("pinned.py")), str(os.getpid()), ",".join(map(str, numbers)) or "-"]
        own.append("-" if node is None else str(node))
        server = [sys.executable, "-m", "pyllm", "serve", "--config", str(self._config), "--uds", self.socket]
        # Its own group: a Ctrl-C at the terminal is for the command, which then drains the replicas.
        self._process = subprocess.Popen(
            [sys.executable, *own, *server], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=_environment(len(numbers) or cores), start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="read replica's log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Write the server's log to this process's, and keep the end of it."""
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for data in stdout:
                line = data.decode("utf-8", "replace")
                self._lines.append(line.rstrip())
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(line)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    async def wait_ready(self) -> None:
        """Wait until it accepts requests; raise `ReplicaStartError` if it ends instead."""
        while self.is_alive:
            with contextlib.suppress(OSError):
                if (await fetch(self.socket, "/ready"))[0] == 200:
                    self._config.unlink(missing_ok=True)  # would stay if this process is killed
                    return
            await asyncio.sleep(POLL_SECONDS)
        self._reader.join(1.0)
        said = [line.removeprefix(SENTENCE) for line in self._lines if line.startswith(SENTENCE)]
        reason = said[-1] if said else " ".join(self._lines)[-500:]
        self._clean()
        raise ReplicaStartError(reason or f"The server ended with code {self._process.returncode}.")

    async def check(self) -> None:
        """Raise an error if it cannot serve."""
        if not self.is_alive:
            raise RuntimeError(f"The server has ended with code {self._process.returncode}.")
        status, _ = await fetch(self.socket, "/health")
        if status != 200:
            raise RuntimeError("The engine has stopped.")

    async def stop(self, seconds: float) -> None:
        """Let running requests finish, for `seconds` at most, and end it."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, seconds)
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._reader.join(1.0)
        self._clean()

    def _clean(self) -> None:
        self._cores.release()
        shutil.rmtree(self._folder, ignore_errors=True)


def _environment(threads: int) -> dict[str, str]:
    """This process's environment without settings of pyllm, which the file has, with as many threads as cores."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES
    }  # fmt: skip
    return kept | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
