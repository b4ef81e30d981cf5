"""A real server process, started as a user starts it, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.warm import Process

PATIENCE = 180.0
"""Seconds until a wait is given up: no test is about time, and the machine may be busy with other things."""
FOREVER = 8000
"""Tokens that take so many steps that an abort is seen long before."""


def environment() -> dict[str, str]:
    """This process's environment without settings of pyllm, and with one thread per process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
    return kept | {"OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float | None = None) -> Any:
    """The first true value of `condition`; `AssertionError` naming `what` if it does not come in time."""
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    pause = 0.01
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)  # each look takes processor time from what is awaited
    return value


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and the state of each process."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True)
    return {int(pid): (int(parent), state) for pid, parent, state in map(str.split, listing.stdout.splitlines())}


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return [child for child, (parent, _) in _processes().items() if parent == pid]
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended while we looked
            found += map(int, path.read_text().split())
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    if not Path("/proc/self/stat").exists():
        return not _processes().get(pid, (0, "Z"))[1].startswith("Z")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


class Metrics(dict[tuple[str, str], float]):
    """Values by name without the prefix, and by `finished_reason` where there is one."""

    def __getattr__(self, name: str) -> float:
        return self[name, ""]


class ServerProcess:
    """`pyllm serve` on a free port; ready on entering, stopped and looked through for failures on leaving.

    Args:
        log: file for all that it says.
        arguments: of `pyllm serve`.
        exit_code: what it must end with.
        port: where it listens; 0 is a free one.
        cold: whether it starts as a user starts it, not from libraries that are loaded.
        faults: what goes wrong in its engine, in the language of `support/faults.py`; then the log may have tracebacks.
        variables: of its environment, besides this process's own.
    """

    def __init__(
        self, log: Path, *arguments: str, exit_code: int = 0, port: int = 0, faults: str = "", cold: bool = False,
        **variables: str,
    ) -> None:  # fmt: skip
        self._log = log
        self._exit_code = exit_code
        self._signs_of_failure = () if faults else ("Traceback", "Warning:", "Exception")
        program = [str(Path(__file__).with_name("faults.py")), "serve", faults] if faults else ["-m", "pyllm", "serve"]
        command = [sys.executable, *program, *arguments, "--port", str(port)]
        with log.open("wb") as sink:
            self.process = (subprocess.Popen if cold else Process)(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=log.parent,
                env=environment() | variables,
            )  # fmt: skip

    def __enter__(self) -> ServerProcess:
        try:
            self.url = wait_for(self._announced_url, "the server's address in its log")
            wait_for(lambda: httpx.get(f"{self.url}/ready").status_code == 200, "the server to be ready")
        except BaseException:
            self._kill()
            raise
        return self

    def _announced_url(self) -> str | None:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.log}"
        found = re.search(r"on (https?://127\.0\.0\.1:\d+\S*)/v1", self.log)
        return found[1] if found else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self._kill()
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self._kill()
        assert code == self._exit_code, self.log
        for sign_of_failure in self._signs_of_failure:
            assert sign_of_failure not in self.log, self.log

    def _kill(self) -> None:
        orphans = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in orphans:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        """All that it has said so far."""
        return self._log.read_text(errors="replace")

    def settled_log(self) -> str:
        """All that it has said so far, with the last line, which comes a moment late."""
        mark = uuid.uuid4().hex
        httpx.get(f"{self.url}/version", headers={"x-request-id": mark}, timeout=PATIENCE)
        wait_for(lambda: mark in self.log, "the log")
        return self.log

    @property
    def engine_pid(self) -> int:
        """The process id of its engine."""
        return min(children(self.process.pid))  # it is started first; what tries grammars comes when it is needed

    def metrics(self) -> Metrics:
        """What /metrics says now."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").raise_for_status().text)
        samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
        return Metrics({(s.name.removeprefix("pyllm:"), s.labels.get("finished_reason", "")): s.value for s in samples})

    def wait_until_idle(self) -> Metrics:
        """The metrics, once nothing runs, waits or holds memory."""

        def idle() -> Metrics | None:
            now = self.metrics()
            busy = now.num_requests_running or now.num_requests_waiting or now.kv_cache_usage_perc
            return None if busy else now

        return wait_for(idle, "the engine to be idle")


def run_command(
    *words: str, typed: str | None = None, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `pyllm WORDS` to its end; `typed` is its standard input, and `variables` are added to its environment."""
    command = [sys.executable, "-m", "pyllm", *words]
    with Process(
        command, stdin=subprocess.DEVNULL if typed is None else subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", cwd=cwd, env=environment() | variables,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(typed, timeout=PATIENCE)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextlib.contextmanager
def posted(server: ServerProcess, key: str = "none", **fields: Any) -> Iterator[socket.socket]:
    """A completion request that has been sent, but whose answer is not read; leaving hangs up."""
    body = json.dumps({"prompt": "Hi", "max_tokens": FOREVER, "ignore_eos": True} | fields).encode()
    url = httpx.URL(server.url)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        yield connection


def wait_for_load(server: ServerProcess, *, running: int, waiting: int = 0) -> None:
    def reached() -> bool:
        now = server.metrics()
        return (now.num_requests_running, now.num_requests_waiting) == (running, waiting)

    wait_for(reached, f"{running} running and {waiting} waiting requests")
