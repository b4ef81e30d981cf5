"""Every kind of store for responses, and a Redis that a test can stop and start."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing
from pathlib import Path
from types import TracebackType

import pytest
from support.components import COMPONENTS
from support.serving import PATIENCE, wait_for

STORES = ["memory", "sqlite", pytest.param("redis", marks=pytest.mark.needs("redis"))]
"""For the fixture `store_url`."""
SHARED = STORES[1:]
"""For a test of stores that several servers share: `parametrize("store_url", SHARED, indirect=True)`."""


class Redis:
    """A Redis on a port of its own, which keeps nothing when it ends; it answers between entering and leaving."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        """`options` are further words of its command line."""
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis{'s' if tls else ''}://127.0.0.1:{self.port}/0"
        self._port = "--tls-port" if tls else "--port"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Redis:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        program = COMPONENTS["redis"].find()
        assert program
        words = ["--bind", "127.0.0.1", self._port, str(self.port), "--save", "", "--appendonly", "no"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, *words, "--dir", str(self._folder), *self._options], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip
        wait_for(self._listens, "Redis")

    def _listens(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self._folder / "redis.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)
            self._process = None

    def ask(self, *words: str) -> str:
        """Send one command, and return the first line of the answer."""
        text = f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(text.encode())
            return connection.makefile("rb").readline().decode().strip()
