"""Output tokens per second over HTTP, streaming, with several numbers of clients at once.

    python benchmarks/serving.py                      # 150M shape, random weights, 1, 8 and 32 clients
    python benchmarks/serving.py --base-url http://127.0.0.1:8101 --model other   # a peer on the same load

Each client sends its next request when its last one is answered. Prompts are random token ids, so
nothing can be reused between them. One JSON line: tokens per second for each number of clients, their ratio to one
client, time to first token and between tokens, and how busy the machine was with other things.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from checkpoint import SHAPES, write_shape

PROC_STAT = Path("/proc/stat")


@dataclass(slots=True)
class Answer:
    """One request's times, in seconds, and its tokens."""

    first_token: float
    between_tokens: float
    tokens: int


@contextlib.contextmanager
def own_server(shape: str, extra: list[str]) -> Iterator[str]:
    """A server of ours with random weights on a free port; gives its base URL."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        write_shape(Path(name) / shape, shape)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-m", "pyllm", "serve", str(Path(name) / shape), "--load-format", "dummy",
                   "--served-model-name", shape, "--port", str(port), "--log-level", "warning", *extra]  # fmt: skip
        server = subprocess.Popen(command)
        try:
            base = f"http://127.0.0.1:{port}"
            for _ in range(1200):
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with code {server.returncode}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{base}/ready", timeout=5):
                    break
                time.sleep(0.1)
            yield base
        finally:
            server.terminate()
            server.wait(timeout=60)


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """Send one streaming request and time its chunks."""
    start = time.perf_counter()
    times: list[float] = []
    usage: dict[str, int] = {}
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"choices":[]' in line.replace(b" ", b""):
                usage = json.loads(line[6:])["usage"]
            else:
                times.append(time.perf_counter())
    tokens = usage.get("completion_tokens", len(times))
    return Answer(times[0] - start, (times[-1] - times[0]) / max(tokens - 1, 1), tokens)


async def measure(base: str, args: argparse.Namespace, clients: int) -> dict[str, float]:
    """Run the closed loop with `clients` clients."""
    rng = random.Random(os.urandom(8))
    requests = max(args.requests or 0, 2 * clients, 4)
    todo = iter(range(requests))
    answers: list[Answer] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in todo:
            prompt = [rng.randrange(100, args.vocab_size) for _ in range(args.prompt_len)]
            body = {"model": args.model, "prompt": prompt, "max_tokens": args.output_len, "temperature": 0,
                    "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}  # fmt: skip
            answers.append(await ask(session, f"{base}/v1/completions", body))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        wall = time.perf_counter() - start
    return {
        "output_tok_s": round(sum(answer.tokens for answer in answers) / wall, 1),
        "ttft_ms": round(1000 * statistics.median(answer.first_token for answer in answers), 1),
        "tpot_ms": round(1000 * statistics.median(answer.between_tokens for answer in answers), 2),
        "requests": len(answers),
    }


def busy_seconds() -> float:
    """CPU time that the whole machine has used since it started; 0 where that cannot be read (not Linux)."""
    if not PROC_STAT.exists():
        return 0.0
    fields = [int(x) for x in PROC_STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--base-url", help="measure this running server instead of our own")
    parser.add_argument("--model", help="the name to ask it for")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--requests", type=int, help="per number of clients; default twice the clients, at least 4")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("server_args", nargs="*", help="after --: more flags for our own server")
    args = parser.parse_args()
    args.model = args.model or args.shape
    busy, own = busy_seconds(), own_seconds()
    results: dict[str, Any] = {}
    with (
        own_server(args.shape, args.server_args) if not args.base_url else contextlib.nullcontext(args.base_url) as base
    ):
        asyncio.run(measure(base, argparse.Namespace(**vars(args) | {"output_len": 8}), 1))  # warm up
        for clients in args.clients:
            results[str(clients)] = asyncio.run(measure(base, args, clients))
    alone = results[str(args.clients[0])]["output_tok_s"]
    report = {
        "benchmark": "serving",
        "shape": args.shape,
        "prompt_len": args.prompt_len,
        "output_len": args.output_len,
        "clients": results,
        f"ratio_to_{args.clients[0]}": {n: round(r["output_tok_s"] / alone, 2) for n, r in results.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if not args.base_url and PROC_STAT.exists():
        report["other_cpu_s"] = round(busy_seconds() - busy - (own_seconds() - own), 1)  # near 0 on a quiet machine
    print(json.dumps(report))


if __name__ == "__main__":
    main()
