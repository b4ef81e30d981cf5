"""Mixed load leaves nothing behind: for a few seconds each time, and for two minutes where asked with `-m slow`."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess, children, wait_for
from support.soak import PROBE, Soak, memory, open_files, soak

from pyllm.engine.grammar.compiler import COMPILERS

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in Linux's /proc")
FLAGS = ("--served-model-name", "tiny", "--max-num-seqs", "16", "--num-kv-blocks", "512")
"""So few blocks that all of them have been used before anything is measured."""
REPEATS, LEAST_LEAK = 2000, 1000
"""Requests, and bytes that would be seen if each left so many; `test_leaks.py` sees fewer, in Python's own memory."""


def check(server: ServerProcess, seconds: float) -> Soak:
    """Nothing but answers during the load, and everything freed after it."""
    asyncio.run(soak(server, 3))  # what is loaded when it is first needed
    wait_for(lambda: try_grammars(server) == COMPILERS, "all that compile grammars to run")
    before = server.wait_until_idle()
    files = wait_until_closed(server)
    answer = httpx.post(f"{server.url}/v1/completions", json=PROBE).json()["choices"]
    found = asyncio.run(soak(server, seconds, seed=60))
    assert found.statuses.keys() <= {0, 200, 400, 404}, found.statuses
    assert found.statuses[200] > found.statuses.total() / 2
    after = server.wait_until_idle()
    assert after.kv_cache_usage_perc == before.kv_cache_usage_perc == 0
    assert wait_until_closed(server) <= files
    assert httpx.post(f"{server.url}/v1/completions", json=PROBE).json()["choices"] == answer
    return found


def try_grammars(server: ServerProcess) -> int:
    """Send new grammars at once; return how many processes have been started for them."""

    async def send() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
            bodies = [{"prompt": "x", "max_tokens": 1, "structured_outputs": {"regex": f"{random.random()}"}}
                      for _ in range(8)]  # fmt: skip
            await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))

    asyncio.run(send())
    return len(children(server.engine_pid))


def wait_until_closed(server: ServerProcess) -> int:
    """Open files, once the ended connections are gone, when the number stays."""
    seen: list[int] = []

    def settled() -> int:
        seen.append(open_files(server))
        return seen[-1] if len(seen) > 20 and len(set(seen[-20:])) == 1 else 0

    return int(wait_for(settled, "the number of open files to settle"))


def test_mixed_load_frees_its_memory_blocks_and_files(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", *FLAGS, cold=True) as server:
        check(server, 6)


def memory_after(server: ServerProcess, requests: int) -> list[int]:
    """Of the server and its engine, after so many requests that need nothing new."""
    with httpx.Client(base_url=server.url) as http:
        for _ in range(requests):
            http.post("/v1/completions", json=PROBE).raise_for_status()
    return [memory(pid) for pid in (server.process.pid, server.engine_pid)]


@pytest.mark.slow
def test_soak_keeps_latency_and_memory_flat(tmp_path: Path) -> None:
    """Caches fill up in the first minutes: how little grows in ten is for `benchmarks/faults/chaos.py` to say."""
    with ServerProcess(tmp_path / "log", *FLAGS, cold=True) as server:
        found = check(server, 120)
        assert found.p99(2) <= 1.5 * found.p99(0) + 0.5
        before, after = (memory_after(server, REPEATS) for _ in range(2))
    grown = [now - then for then, now in zip(before, after, strict=True)]
    assert max(grown) < LEAST_LEAK * REPEATS, f"the server and its engine grew by {grown} bytes"
