"""`pyllm bench`: measures a running OpenAI-compatible server, or one that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException

import uvloop

from ...engine.client.launch import python
from ..flags import ENVIRONMENT_PREFIX, OTHER_VARIABLES, BenchConfig, ConfigError
from .load_client import Client, LoadError, Target, closed_loop, summarize

USAGE_ERROR = 2  # the exit code of `pyllm serve` if it cannot start
LOWEST_ID = 100  # lower ids may be special tokens
USUAL_VOCAB_SIZE = 1000  # nearly every model has at least as many
COLUMNS = ("clients", "output tok/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "ITL p50 ms", "ITL p99 ms", "failed")


def bench(config: BenchConfig) -> int:
    """Measure and print; return the exit code, 1 if a request failed. Raises `ConfigError`."""
    counts = _counts(config.concurrency)
    with contextlib.ExitStack() as stack:
        base = config.base_url
        if base is None:
            print("Starting a server ...", file=sys.stderr)
            base, _ = stack.enter_context(own_server(config.model_arguments()))
        try:
            name = config.model if config.base_url is not None else None
            target = Target(base, name or _first_model(base, config.api_key), config.api_key)
            vocab_size = config.vocab_size or _vocab_size(target)
            results = [_measure(config, target, clients, vocab_size) for clients in counts]
        except LoadError as error:
            raise ConfigError(f"{base} cannot be measured. {error}") from None
    if config.json:
        sizes = {"input_len": config.input_len, "output_len": config.output_len}
        print(json.dumps({"model": target.model, **sizes, "results": results}))
    else:
        print(_table(results))
    return 1 if any(result["failed"] for result in results) else 0


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--concurrency must be numbers separated by commas, such as 1,8,32, but got {text!r:.200}.")
    return counts


def _first_model(base: str, api_key: str | None) -> str:
    client = Client(Target(base, "", api_key))
    try:
        return str(json.loads(uvloop.run(client.get("/models")))["data"][0]["id"])
    except OSError as error:
        raise LoadError(f"Fetching /v1/models failed: {error}.") from None
    except (ValueError, LookupError, TypeError):
        raise LoadError("It does not list its models: pass --model NAME.") from None


def _vocab_size(target: Target) -> int:
    """Ask the server how many token ids its model has; assume few if it is not PyLLM."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return int(json.loads(uvloop.run(Client(target).get("/tokenizer_info", below_v1=False)))["vocab_size"])
    return USUAL_VOCAB_SIZE


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Make prompts of random token ids, which no server can have cached."""
    draw = random.Random(os.urandom(8))
    lowest = min(LOWEST_ID, vocab_size // 2)
    return [[draw.randrange(lowest, vocab_size) for _ in range(length)] for _ in range(count)]


def measure_load(
    target: Target, clients: int, *, requests: int, input_len: int, output_len: int, vocab_size: int
) -> dict[str, float]:
    """Run a closed loop of random prompts; return the results of `summarize`, with the number of clients."""
    bodies = [target.body(prompt, output_len) for prompt in random_prompts(requests, input_len, vocab_size)]
    # Faster than asyncio's own loop, which leaves more of the processor to a server on the same machine.
    answers, seconds = uvloop.run(closed_loop(target, bodies, clients))
    return {"clients": clients} | summarize(answers, seconds)


def _measure(config: BenchConfig, target: Target, clients: int, vocab_size: int) -> dict[str, float]:
    size = {"input_len": config.input_len, "vocab_size": vocab_size}
    measure_load(target, 1, requests=1, output_len=min(8, config.output_len), **size)  # warm up
    requests = config.num_requests or max(4, 2 * clients)
    return measure_load(target, clients, requests=requests, output_len=config.output_len, **size)


def _table(results: Sequence[Mapping[str, float]]) -> str:
    keys = [re.sub("[ /]", "_", name.lower()) for name in COLUMNS]  # the names in `summarize`'s result
    rows = [COLUMNS, *([f"{result[key]:g}" for key in keys] for result in results)]
    return "\n".join("  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, COLUMNS, strict=True)) for row in rows)


@contextlib.contextmanager
def own_server(
    flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start `pyllm serve` on a free port, wait until it is ready, yield its base URL and process, and stop it.

    `environment` is added to that of this process. Raises `ConfigError` if the server ends while starting; if it
    has logged why, exits with its code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The flags already include this process's PYLLM_ variables, and those of `serve` could move the server elsewhere.
    kept = [name for name in os.environ if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES]
    inherited = {name: os.environ[name] for name in kept}
    command = [*python(), "-m", "pyllm", "serve", "--log-level", "warning", *flags, "--port", str(port)]
    with subprocess.Popen(command, env=inherited | dict(environment or {}), stdin=subprocess.DEVNULL) as server:
        try:
            while not _is_ready(port):
                if server.poll() == USAGE_ERROR:
                    sys.exit(USAGE_ERROR)  # the server has logged why
                if server.poll() is not None:
                    raise ConfigError(f"The server exited with code {server.returncode} while starting.")
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=60)
            server.kill()  # without effect if it has exited


def _is_ready(port: int) -> bool:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
