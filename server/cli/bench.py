"""`pyllm bench`: how fast a running OpenAI-compatible server is, or one of our own that is started for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import TypeVar

import uvloop

from ...engine.client.launch import python
from ..flags import ENVIRONMENT_PREFIX, BenchConfig, ConfigError, ServerConfig
from .load_client import Client, LoadError, Target, closed_loop, summarize

Result = TypeVar("Result")
LOWEST_ID = 100
"""Ids below may be special tokens."""
COLUMNS = {
    "clients": "clients",
    "output tok/s": "output_tok_s",
    "TTFT p50 ms": "ttft_p50_ms",
    "TTFT p99 ms": "ttft_p99_ms",
    "TPOT p50 ms": "tpot_p50_ms",
    "ITL p50 ms": "itl_p50_ms",
    "ITL p99 ms": "itl_p99_ms",
    "failed": "failed",
}


def bench(config: BenchConfig) -> int:
    """Measure and print; return the exit code, 1 when a request failed.

    Raises:
        ConfigError: the server cannot be measured; one plain sentence.
    """
    counts = _counts(config.concurrency)
    with contextlib.ExitStack() as stack:
        base = config.base_url
        if base is None:
            print("Starting a server ...", file=sys.stderr)
            base, _ = stack.enter_context(own_server(config.model_arguments()))
        try:
            name = config.model if config.base_url is not None else None
            target = Target(base, name or _first_model(base, config.api_key), config.api_key)
            results = [_measure(config, target, clients) for clients in counts]
        except LoadError as error:
            raise ConfigError(f"{base} cannot be measured. {error}") from None
    if config.json:
        print(json.dumps({"model": target.model, "input_len": config.input_len, "output_len": config.output_len,
                          "results": results}))  # fmt: skip
    else:
        print(_table(results))
    return 1 if any(result["failed"] for result in results) else 0


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(
            f"--concurrency must be numbers of clients with commas between, as 1,8,32, got {text!r:.200}."
        )
    return counts


def _first_model(base: str, api_key: str | None) -> str:
    client = Client(Target(base, "", api_key))
    try:
        return str(json.loads(run(client.get("/models")))["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise LoadError("It does not list its models: name one.") from None


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random token ids, so that no server can have seen one before."""
    draw = random.Random(os.urandom(8))
    return [[draw.randrange(LOWEST_ID, vocab_size) for _ in range(length)] for _ in range(count)]


def measure_load(
    target: Target, clients: int, *, requests: int, input_len: int, output_len: int, vocab_size: int
) -> dict[str, float]:
    """Run a closed loop of random prompts -> what `summarize` says, and the number of clients.

    Raises:
        LoadError: no request succeeded.
    """
    bodies = [target.body(prompt, output_len) for prompt in random_prompts(requests, input_len, vocab_size)]
    answers, seconds = run(closed_loop(target, bodies, clients))
    return {"clients": clients} | summarize(answers, seconds)


def _measure(config: BenchConfig, target: Target, clients: int) -> dict[str, float]:
    size = {"input_len": config.input_len, "vocab_size": config.vocab_size}
    measure_load(target, 1, requests=1, output_len=min(8, config.output_len), **size)  # warm up
    requests = config.num_requests or max(4, 2 * clients)
    return measure_load(target, clients, requests=requests, output_len=config.output_len, **size)


def _table(results: Sequence[Mapping[str, float]]) -> str:
    rows = [list(COLUMNS), *([f"{result[key]:g}" for key in COLUMNS.values()] for result in results)]
    return "\n".join("  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, COLUMNS, strict=True)) for row in rows)


def run(work: Coroutine[None, None, Result]) -> Result:
    """Run in an event loop that takes as little as can be from the server beside it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@contextlib.contextmanager
def own_server(
    flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of ours on a free port, ready, and stopped at the end -> its base URL and its process.

    Args:
        flags: of `pyllm serve`.
        environment: variables beside those of this process.

    Raises:
        ConfigError: it does not start; it has said why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Settings of ours in the environment are in the flags already, and those of `serve` could move the server away.
    ours = {ENVIRONMENT_PREFIX + f.name.upper() for f in dataclasses.fields(ServerConfig)}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    command = [*python(), "-m", "pyllm", "serve", "--log-level", "warning", *flags, "--port", str(port)]
    server = subprocess.Popen(command, env=inherited | dict(environment or {}), stdin=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        while not _is_ready(port):
            if server.poll() is not None:
                raise ConfigError(f"The server ended at its start, with code {server.returncode}.")
            time.sleep(0.02)
        yield base, server
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
