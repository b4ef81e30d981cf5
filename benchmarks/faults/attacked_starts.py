"""Starts that go wrong, and signals: what becomes of a server that gets no request at all, or whose log is not read."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE = 20.0  # seconds until a start, or an end, counts as hung
Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def started(checkout: Path, *flags: str, **options: Any) -> Iterator[Process]:
    """A server that may be broken, and nothing of it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyllm").symlink_to(checkout)
        environment = {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        process = subprocess.Popen(
            [sys.executable, "-m", "pyllm", "serve", *flags], env=environment, stdin=subprocess.DEVNULL,
            start_new_session=True, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end(process: Process, seconds: float = PATIENCE) -> str:
    """How a process ends within so many seconds, and how much it said."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "still running"
    lines = (said or b"").decode(errors="replace").strip().splitlines()
    kind = "a traceback" if any("Traceback" in line for line in lines) else f"{len(lines)} line(s)"
    return f"code {process.returncode}, {kind}"


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(number: int, path: str, seconds: float = 5.0) -> int:
    """The status of an answer, 0 without one."""
    connection = http.client.HTTPConnection("127.0.0.1", number, timeout=seconds)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status
    return 0


def wait_until_ready(process: Process, number: int) -> None:
    deadline = time.monotonic() + 60
    while get(number, "/ready") != 200 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def unread_log(checkout: Path) -> str:
    """2,000 requests while nothing reads the log's pipe; then /health, and SIGTERM"""
    number = port()
    read, write = os.pipe()
    try:
        with started(checkout, "--port", str(number), stdout=write, stderr=write) as process:
            os.close(write)
            wait_until_ready(process, number)
            answered = 0
            for _ in range(2000):
                if not get(number, "/v1/models", 2):
                    break
                answered += 1
            health = get(number, "/health")
            process.send_signal(signal.SIGTERM)
            return f"{answered} answered, then /health {health or 'hung'}; SIGTERM: {end(process)}"
    finally:
        os.close(read)


def second_on_a_socket(checkout: Path) -> str:
    """a second server on the Unix socket of a running one"""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "socket"))
        with started(checkout, "--uds", path, stderr=subprocess.DEVNULL) as first:
            deadline = time.monotonic() + 60
            while not Path(path).exists() and first.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            before, mode = os.stat(path).st_ino, oct(os.stat(path).st_mode & 0o777)
            with started(checkout, "--uds", path) as second:
                ended = end(second, 10)
            kept = Path(path).exists() and os.stat(path).st_ino == before
            first.send_signal(signal.SIGTERM)
            first.wait(PATIENCE)
        left = "left behind" if Path(path).exists() else "removed"
        return f"mode {mode}; second: {ended}; the first's file {'kept' if kept else 'taken'}, at its end {left}"


def no_keys(checkout: Path) -> str:
    """YAML with an empty list, text or nothing as api_key"""
    seen: Counter[str] = Counter()
    for value in ("[]", '""', '[""]', "~", "[ ]", "[[]]", "0"):
        number = port()
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "config.yaml")
            config.write_text(f"api_key: {value}\nport: {number}\n")
            with started(checkout, "--config", str(config)) as process:
                deadline = time.monotonic() + PATIENCE
                while process.poll() is None and time.monotonic() < deadline and get(number, "/ready") != 200:
                    time.sleep(0.1)
                is_open = process.poll() is None and get(number, "/v1/models") == 200
                seen["open" if is_open else end(process, 5)] += 1
    return _list(seen)


def odd_files(checkout: Path) -> str:
    """config.json, tokenizer.json or the weights as FIFO, folder, device, nothing, deep JSON, a loop"""
    demo, seen = checkout / "model" / "demo", Counter[str]()

    def make(path: Path, kind: str) -> None:
        match kind:
            case "FIFO":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
            case "empty":
                path.touch()
            case "deep":
                path.write_text("[" * 200_000)
            case "loop":
                path.symlink_to(path)
            case "list":
                path.write_text("[1]")

    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        for kind in ("FIFO", "folder", "device", "empty", "deep", "loop", "list"):
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text, "model")
                shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
                (folder / name).unlink()
                make(folder / name, kind)
                with started(checkout, str(folder), "--port", "0") as process:
                    seen[end(process, 15)] += 1
    return _list(seen)


def signals(checkout: Path) -> str:
    """SIGTERM, SIGINT and SIGHUP at moments of the start"""
    seen: Counter[str] = Counter()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        for moment in (0.05, 0.15, 0.3, 0.6, 0.9, 1.2, 2.0):
            with started(checkout, "--port", "0") as process:
                time.sleep(moment)
                process.send_signal(getattr(signal, name))
                seen[f"{name} {end(process)}"] += 1
    return _list(seen)


def stripping_tokens(checkout: Path) -> str:
    """/tokenize of a chat with 50,000 spaces and an added token that strips; then /health, and SIGTERM"""
    number = port()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text, "model")
        shutil.copytree(checkout / "model" / "demo", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        added = {"id": 5999, "content": "<|strip|>", "special": True, "normalized": False, "single_word": False}
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] != 5999]
        tokenizer["added_tokens"] += [added | {"lstrip": True, "rstrip": True}]
        path.write_text(json.dumps(tokenizer))
        with started(checkout, str(folder), "--port", str(number), stderr=subprocess.DEVNULL) as process:
            wait_until_ready(process, number)
            if process.poll() is not None:
                return f"does not start: code {process.returncode}"
            connection = http.client.HTTPConnection("127.0.0.1", number, timeout=PATIENCE)
            said, since = "no answer", time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                body = json.dumps({"messages": [{"role": "user", "content": " " * 50_000 + "x"}]})
                connection.request("POST", "/tokenize", body, {"content-type": "application/json"})
                said = str(connection.getresponse().status)
            said += f" in {time.monotonic() - since:.1f} s"
            health = get(number, "/health")
            process.send_signal(signal.SIGTERM)
            return f"{said}, /health {health or 'hung'}; SIGTERM: {end(process)}"


def _list(seen: Counter[str]) -> str:
    return "; ".join(f"{count} x {what}" for what, count in seen.items())


STARTS: dict[str, Callable[[Path], str]] = {
    play.__name__: play for play in (unread_log, second_on_a_socket, no_keys, odd_files, signals, stripping_tokens)
}
