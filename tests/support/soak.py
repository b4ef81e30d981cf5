"""A mixed load for as long as one likes, and what it does to memory, open files and times."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from support.serving import PATIENCE, ServerProcess, children

CLIENTS = 6
PROBE = {"prompt": "How long does this take", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
"""The request whose times are compared: always the same."""


GRAMMARS = 100
"""Different ones, which are all known after a minute: the engine keeps compiled ones, and a full cache is no leak."""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"place": {"enum": ["here", "there"]}}, "required": ["place"]}}}  # fmt: skip
FORMS: list[Callable[[int], dict[str, Any]]] = [
    lambda n: {"regex": f"[a-z]{{3}}{n}"}, lambda n: {"choice": [f"yes {n}", f"no {n}"]},
    lambda n: {"json": {"type": "object", "properties": {f"k{n}": {"enum": [1, 2]}}, "additionalProperties": False}},
    lambda n: {"grammar": f'start: "a{n}" b\nb: /[0-9]{{1,4}}/'},
]  # fmt: skip


def _mixed(draw: random.Random, grammars: int) -> tuple[str, dict[str, Any]]:
    """Some request, right or wrong, whose prompt was not sent before."""
    text = " ".join(draw.choice(("sun", "river", "Paris", "42", "été", "dog")) for _ in range(draw.randrange(4, 90)))
    seed, number = draw.randrange(10**9), draw.randrange(grammars)
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
    schema = {"type": "object", "properties": {f"k{number}": {"enum": [1, 2]}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return draw.choice([
        ("/v1/chat/completions", chat), ("/v1/chat/completions", chat | {"stream": True, "logprobs": True}),
        ("/v1/chat/completions", chat | {"response_format": form, "max_tokens": 30}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": text * 500}]}),
        ("/v1/chat/completions", chat | {"tools": [WEATHER], "tool_choice": draw.choice(["auto", "required"])}),
        ("/v1/completions", {"prompt": text, "n": 3, "seed": seed}), ("/v1/completions", {"prompt": 7}),
        ("/v1/completions", {"prompt": [text, text[::-1]], "logprobs": 5, "stream": True}),
        ("/v1/completions", {"prompt": text, "prompt_logprobs": 3, "stop": ["x", "river"], "logit_bias": {"300": 2}}),
        ("/v1/responses", {"input": text, "max_output_tokens": 8}), ("/v1/embeddings", {"input": [text, "a"]}),
        ("/v1/messages", {"model": "tiny", **chat}), ("/tokenize", {"prompt": text}), ("/v1/nothing", {}),
        ("/v1/completions", {"prompt": text, "structured_outputs": FORMS[number % len(FORMS)](number)}),
    ])  # fmt: skip


@dataclass(slots=True)
class Soak:
    """What was seen.

    Attributes:
        statuses: of all answers; 0 where the client went away.
        times: of the probes: when each began, in seconds from the start, and what it took.
        memory: (time, bytes of the server, of its engine, and of those that try grammars), once a second.
        files: open files of the server and its engine, likewise.
        batches: how many have ended.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    times: list[tuple[float, float]] = field(default_factory=list)
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    batches: int = 0

    def slopes(self) -> list[float]:
        """MB per hour that the memory of each grew in the second half, by least squares."""
        times, *sizes = (np.array(column) for column in zip(*self.memory[len(self.memory) // 2 :], strict=True))
        return [float(np.polyfit(times, size, 1)[0]) * 3600 / 1e6 for size in sizes]

    def p99(self, third: int) -> float:
        """Seconds of the probes in the first (0), second or last (2) third, its 99th percentile."""
        size = len(self.times) // 3
        part = sorted(seconds for _, seconds in sorted(self.times)[third * size : (third + 1) * size])
        return part[int(0.99 * len(part))]


def memory(pid: int) -> int:
    """Bytes that a process has in memory; 0 once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return 0


def open_files(server: ServerProcess) -> int:
    """Of the server and its engine."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server.process.pid, server.engine_pid))


async def _client(
    http: httpx.AsyncClient, found: Soak, draw: random.Random, grammars: int, began: float, until: float
) -> None:
    while time.monotonic() < until:
        path, body = _mixed(draw, grammars)
        if draw.random() < 0.1:
            async with http.stream("POST", path, json=body | {"stream": True}) as answer:
                async for _ in answer.aiter_bytes():
                    break
            found.statuses[0] += 1
        else:
            answer = await http.post(path, json=body)
            found.statuses[answer.status_code] += 1
            if path == "/v1/responses":
                await _read_again(http, found, answer.json()["id"], draw)
        since = time.monotonic()
        found.statuses[(await http.post("/v1/completions", json=PROBE)).status_code] += 1
        found.times.append((since - began, time.monotonic() - since))


async def _read_again(http: httpx.AsyncClient, found: Soak, name: str, draw: random.Random) -> None:
    """Read a stored response, continue from it, or delete it."""
    path = f"/v1/responses/{name}"
    answer = await draw.choice((
        lambda: http.get(path), lambda: http.get(f"{path}/input_items"), lambda: http.delete(path),
        lambda: http.post("/v1/responses", json={"input": "And?", "previous_response_id": name,
                                                 "max_output_tokens": 8}),
    ))()  # fmt: skip
    found.statuses[answer.status_code] += 1


async def _batches(http: httpx.AsyncClient, found: Soak, until: float) -> None:
    """Run one batch of 40 lines after another, read its answers and delete its files."""
    while time.monotonic() < until:
        bodies = ({"prompt": f"Line {found.batches} {n}", "max_tokens": 4} for n in range(40))
        lines = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": body}
                 for n, body in enumerate(bodies)]  # fmt: skip
        data = "\n".join(map(json.dumps, lines))
        upload = await http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
        batch = (await http.post("/v1/batches", json={"input_file_id": upload.json()["id"], "completion_window": "24h",
                                                      "endpoint": "/v1/completions"})).json()  # fmt: skip
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.5)
            batch = (await http.get(f"/v1/batches/{batch['id']}")).json()
        answers = await http.get(f"/v1/files/{batch['output_file_id']}/content")
        found.statuses[200 if answers.text.count("\n") == 40 else 500] += 1
        for name in (batch["input_file_id"], batch["output_file_id"]):
            found.statuses[(await http.delete(f"/v1/files/{name}")).status_code] += 1
        found.batches += 1


async def soak(
    server: ServerProcess, seconds: float, seed: int = 6, grammars: int = GRAMMARS, batches: bool = False
) -> Soak:
    """Run the load for so long, with this number of different grammars, and batches if the server has a folder."""
    found, began = Soak(), time.monotonic()
    until, pids = began + seconds, (server.process.pid, server.engine_pid)

    async def watch() -> None:
        while (now := time.monotonic()) < until:
            helpers = sum(map(memory, children(pids[1])))
            found.memory.append((now - began, *map(memory, pids), helpers))
            found.files.append(open_files(server))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        clients = (_client(http, found, random.Random(seed + n), grammars, began, until) for n in range(CLIENTS))
        await asyncio.gather(watch(), *clients, *([_batches(http, found, until)] if batches else []))
    return found
