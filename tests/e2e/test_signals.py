"""Signals that stop a server, at any moment of its life, and what is left of its processes then."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest
from support.serving import FOREVER, PATIENCE, ServerProcess, children, environment, is_running, posted, wait_for

STOPPING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MOMENTS = (
    0,
    0.03,
    0.06,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.65,
    0.8,
    1,
    1.3,
    1.7,
    2.2,
)  # seconds, of a start that takes 2


def catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal itself."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> number - 1 & 1)
    return False


@contextlib.contextmanager
def start(checkpoint: Path, log: IO[bytes], *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has only just been started."""
    command = [*words, sys.executable, "-m", "pyllm", "serve", str(checkpoint), "--dtype", "float32", "--port", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()) as process:
        try:
            wait_for(lambda: catches(process.pid, signal.SIGTERM), "the interpreter to start")
            yield process
        finally:
            process.kill()


def family(pid: int) -> list[int]:
    """A process with its children and theirs."""
    return [pid, *(grandchild for child in children(pid) for grandchild in family(child))]


def wait_until_gone(pids: list[int]) -> None:
    wait_for(lambda: not any(map(is_running, pids)), "all processes to end")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process handles is read from Linux's /proc")
def test_a_signal_at_any_moment_of_the_start_ends_it_with_code_0(checkpoint: Path, tmp_path: Path) -> None:
    for n, moment in enumerate(MOMENTS):
        number = STOPPING[n % 3]
        with (tmp_path / "log").open("w+b") as log, start(checkpoint, log) as process:
            time.sleep(moment)
            processes = family(process.pid)
            # Half of them get it as from a supervisor or a terminal: all processes at once.
            for pid in processes if n % 2 else processes[:1]:
                os.kill(pid, number)
            code = process.wait(PATIENCE)
            wait_until_gone(processes)
            log.seek(0)
            text = log.read().decode()
        assert code == 0, (number, moment, text)
        assert "Traceback" not in text
        assert "Ready after" in text or len(text.splitlines()) <= 1


def test_no_engine_outlives_a_server_killed_while_it_starts(checkpoint: Path, tmp_path: Path) -> None:
    for n, moment in enumerate(MOMENTS[::3]):
        with (tmp_path / "log").open("wb") as log, start(checkpoint, log) as process:
            engines = wait_for(lambda pid=process.pid: children(pid), "the engine to start")
            time.sleep(moment)
            os.kill(process.pid, (signal.SIGKILL, signal.SIGQUIT, signal.SIGABRT)[n % 3])
            assert process.wait(PATIENCE) < 0
            wait_until_gone(engines)


def test_an_engine_that_hangs_ends_with_a_server_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), faults="hang@zz", exit_code=-9, cold=True) as server:
        engine = server.engine_pid
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi"}, headers={"x-request-id": "zz"}, timeout=1)
        server.process.kill()
        wait_until_gone([engine])


def test_a_hang_up_drains_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint)) as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", timeout=PATIENCE,
            json={"prompt": "Hi", "max_tokens": 300, "stream": True, "ignore_eos": True},
        ) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGHUP)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(PATIENCE) == 0
    assert "Stopping on SIGHUP (which reloads nothing); requests in flight: 1" in server.log


def test_a_server_under_nohup_ignores_hang_ups(checkpoint: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b") as log, start(checkpoint, log, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: b"Ready after" in Path(log.name).read_bytes(), "the server to be ready")
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert b"Stopping on SIGTERM" in Path(log.name).read_bytes()


def test_signals_that_stop_nothing_leave_the_server_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    """The engine leaves the decision to the server, and a pause of either harms no request."""
    with ServerProcess(tmp_path / "log", str(checkpoint), cold=True) as server:
        engine = server.engine_pid
        for pid, number in [(engine, number) for number in STOPPING] + [(server.process.pid, signal.SIGPIPE)]:
            os.kill(pid, number)
        for pid in (server.process.pid, engine):
            with posted(server, max_tokens=200, stream=True) as connection:
                connection.settimeout(PATIENCE)
                assert connection.recv(1)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(pid, signal.SIGCONT)
                text = b""
                while b"[DONE]" not in text:
                    text += connection.recv(65536)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_third_signal_waits_for_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), exit_code=1) as server:
        processes = family(server.process.pid)
        with posted(server, stream=True, max_tokens=FOREVER) as connection:
            assert connection.recv(1)
            os.kill(server.engine_pid, signal.SIGSTOP)  # it takes no notice of its end
            for _ in range(3):
                server.process.terminate()
                time.sleep(0.1)
            assert server.process.wait(PATIENCE) == 1
        wait_until_gone(processes)
