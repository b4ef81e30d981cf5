"""A mixed load for as long as one likes, and what it does to memory, open files and times."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from support.serving import PATIENCE, ServerProcess

CLIENTS = 6
PROBE = {"prompt": "How long does this take", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
"""The request whose times are compared: always the same."""


def _mixed(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Some request, right or wrong, whose prompt was not sent before.

    Of grammars there are a hundred, which are all known after a minute: the engine keeps compiled ones, and a cache
    that fills up is no leak.
    """
    text = " ".join(draw.choice(("sun", "river", "Paris", "42", "été", "dog")) for _ in range(draw.randrange(4, 90)))
    number = draw.randrange(10**9)
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
    schema = {"type": "object", "properties": {f"k{number % 60}": {"enum": [1, 2]}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return draw.choice([
        ("/v1/chat/completions", chat), ("/v1/chat/completions", chat | {"stream": True, "logprobs": True}),
        ("/v1/chat/completions", chat | {"response_format": form, "max_tokens": 30}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": text * 500}]}),
        ("/v1/completions", {"prompt": text, "n": 3, "seed": number}), ("/v1/completions", {"prompt": 7}),
        ("/v1/completions", {"prompt": [text, text[::-1]], "logprobs": 5, "stream": True}),
        ("/v1/responses", {"input": text, "max_output_tokens": 8}), ("/v1/embeddings", {"input": [text, "a"]}),
        ("/v1/messages", {"model": "tiny", **chat}), ("/tokenize", {"prompt": text}), ("/v1/nothing", {}),
        ("/v1/completions", {"prompt": text, "structured_outputs": {"regex": f"[a-z]{{3}}{number % 40}"}}),
    ])  # fmt: skip


@dataclass(slots=True)
class Soak:
    """What was seen.

    Attributes:
        statuses: of all answers; 0 where the client went away.
        times: of the probes: when each began, in seconds from the start, and what it took.
        memory: (time, bytes of the server, bytes of its engine), once a second.
        files: open files of both, likewise.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    times: list[tuple[float, float]] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slopes(self) -> tuple[float, float]:
        """MB per hour that the memory of the server and of its engine grew in the second half, by least squares."""
        times, *sizes = (np.array(column) for column in zip(*self.memory[len(self.memory) // 2 :], strict=True))
        api, engine = (float(np.polyfit(times, size, 1)[0]) * 3600 / 1e6 for size in sizes)
        return api, engine

    def p99(self, third: int) -> float:
        """Seconds of the probes in the first (0), second or last (2) third, its 99th percentile."""
        size = len(self.times) // 3
        part = sorted(seconds for _, seconds in sorted(self.times)[third * size : (third + 1) * size])
        return part[int(0.99 * len(part))]


def memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def open_files(server: ServerProcess) -> int:
    """Of the server and its engine."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server.process.pid, server.engine_pid))


async def _client(http: httpx.AsyncClient, found: Soak, draw: random.Random, began: float, until: float) -> None:
    while time.monotonic() < until:
        path, body = _mixed(draw)
        if draw.random() < 0.1:
            async with http.stream("POST", path, json=body | {"stream": True}) as answer:
                async for _ in answer.aiter_bytes():
                    break
            found.statuses[0] += 1
        else:
            found.statuses[(await http.post(path, json=body)).status_code] += 1
        since = time.monotonic()
        found.statuses[(await http.post("/v1/completions", json=PROBE)).status_code] += 1
        found.times.append((since - began, time.monotonic() - since))


async def soak(server: ServerProcess, seconds: float, seed: int = 6) -> Soak:
    """Run the load for so long."""
    found, began = Soak(), time.monotonic()
    pids = server.process.pid, server.engine_pid

    async def watch() -> None:
        while (now := time.monotonic()) < began + seconds:
            found.memory.append((now - began, *map(memory, pids)))
            found.files.append(open_files(server))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        clients = (_client(http, found, random.Random(seed + n), began, began + seconds) for n in range(CLIENTS))
        await asyncio.gather(watch(), *clients)
    return found
