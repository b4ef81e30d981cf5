"""More than a server can do: what is taken is answered whole, the rest is refused at once, and it stays well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess, wait_for

REQUESTS = 400
SOON = 4.0
"""Seconds for what takes well under one where nothing else runs: these clients themselves keep the machine busy."""
MIB = 2**20


@pytest.fixture(scope="module")
def busy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a short queue."""
    flags = ("--dtype", "float32", "--max-num-seqs", "4", "--max-num-queued-reqs", "8")
    with ServerProcess(tmp_path_factory.mktemp("busy") / "log", str(checkpoint), *flags) as server:
        yield server


async def exchange(server: ServerProcess, data: bytes) -> tuple[int, bytes, float]:
    """Send a whole request; return the status, the answer and the seconds until that was there."""
    url = httpx.URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    since = time.monotonic()
    try:
        writer.write(data)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        if length := re.search(rb"content-length: (\d+)", head):
            answer = await reader.readexactly(int(length[1]))
        else:
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), PATIENCE)
        return int(head.split()[1]), head + answer, time.monotonic() - since
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def request(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def probes(server: ServerProcess) -> Iterator[list[float]]:
    """How long /health takes, asked ten times a second meanwhile."""
    seconds: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            while not over.wait(0.1):
                since = time.monotonic()
                assert client.get("/health").status_code == 200
                seconds.append(time.monotonic() - since)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def test_400_concurrent_requests_are_answered_or_refused(busy: ServerProcess) -> None:
    async def flood() -> list[tuple[int, bytes, float]]:
        def ask(n: int) -> Any:
            fields = {"prompt": f"Request {n}", "max_tokens": 5, "ignore_eos": True, "stream": n % 2 == 0}
            return exchange(busy, request(json.dumps(fields).encode()))

        return await asyncio.gather(*(ask(n) for n in range(REQUESTS)))

    with probes(busy) as health:
        answers = asyncio.run(flood())
    assert {status for status, *_ in answers} == {200, 429}
    for status, answer, seconds in answers:
        if status == 429:
            assert seconds < SOON
            assert 1 <= int(re.search(rb"retry-after: (\d+)", answer)[1]) <= 60  # type: ignore[index]
            assert b'"code":"queue_full"' in answer
        else:
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or b'"completion_tokens":5' in answer
    assert max(health, default=0) < SOON
    own_times = [float(seconds) for seconds in re.findall(r" 429 id=\S+ seconds=([\d.]+)", busy.log)]
    assert len(own_times) == sum(status == 429 for status, *_ in answers)
    slowest = max(seconds for status, _, seconds in answers if status == 200)
    assert max(own_times) < min(SOON, slowest), "a refusal waits for no answer"
    busy.wait_until_idle()
    counted = busy.metrics()
    assert counted.num_requests_waiting == 0


def peak_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_flood_of_large_bodies_has_bounded_memory_and_latency(checkpoint: Path, tmp_path: Path) -> None:
    # Half a million small objects in 1.5 MB, and text: as large in memory as a request gets.
    schema = b'{"type":"object","default":[' + b",".join([b"[]"] * 500_000) + b'],"title":"' + b"x" * (6 * MIB) + b'"}'
    tool = b'{"type":"function","function":{"name":"f","parameters":' + schema + b"}}"
    body = b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"tools":[' + tool + b"]}"
    data = request(body).replace(b"/v1/completions", b"/v1/chat/completions")
    with ServerProcess(tmp_path / "log", str(checkpoint), "--dtype", "float32", cold=True) as server:

        async def flood() -> list[tuple[int, bytes, float]]:
            return await asyncio.gather(*(exchange(server, data) for _ in range(40)))

        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=PATIENCE)
        before = peak_bytes(server)
        with probes(server) as health:
            answers = asyncio.run(flood())
        assert {status for status, *_ in answers} <= {400, 429}, Counter(status for status, *_ in answers)
        assert peak_bytes(server) - before < 900 * MIB
        assert sorted(health)[int(len(health) * 0.99)] < SOON


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_large_bodies_that_never_end_are_not_all_read(checkpoint: Path, tmp_path: Path) -> None:
    """Forty clients hold 8 MiB back by a byte: a few are waited for, and the others refused."""
    body = b'{"prompt":"Hi","max_tokens":1' + b" " * (8 * MIB - 100) + b"}"
    flags = ("--dtype", "float32", "--body-timeout", "8")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags, cold=True) as server:
        before = peak_bytes(server)

        async def flood() -> Counter[int]:
            held = asyncio.gather(*(exchange(server, request(body)[:-1]) for _ in range(40)))
            small = request(b'{"prompt":"Hi","max_tokens":1}')
            while not held.done():
                status, _, seconds = await exchange(server, small)
                assert (status, seconds < SOON) == (200, True)
                await asyncio.sleep(0.05)
            return Counter(status for status, *_ in await held)

        answers = asyncio.run(flood())
        assert answers[429] >= 30
        assert answers[408] == 40 - answers[429]
        assert peak_bytes(server) - before < 150 * MIB
        status, *_ = asyncio.run(exchange(server, request(body)))
        assert status == 200, "there is room again"
        wait_for(lambda: server.metrics().num_requests_running == 0, "the end of it")
