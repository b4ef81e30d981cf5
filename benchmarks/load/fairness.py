"""How long one client waits for its first token while another has 500 requests in the server.

    python benchmarks/load/fairness.py                      # the demo model, with fair scheduling and without

The small client asks once a second, alone and then next to the greedy one, whose 500 requests are renewed as they end:
with long answers, so that all of `--max-num-seqs` is taken, or with long prompts, so that the token budget is. A client
that has no first token when the time is up counts with the time that it has waited. The goal is a p99 of at most three
times the p99 alone and three loaded steps. `most_steps` is the same without the machine's speed: the most engine steps
between a question and its token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import uvloop

from pyllm.benchmarks.checkpoint import SHAPES, write_shape
from pyllm.benchmarks.measure import report
from pyllm.server.cli.bench import own_server
from pyllm.server.cli.load_client import Client, LoadError, Target, quantile

GREEDY, SMALL = "greedy-key", "small-key"
LOADS = {"long answers": (1, 300), "long prompts": (50, 4)}  # times that a sentence is repeated, tokens to generate
SENTENCE = "The quick brown fox jumps over the lazy dog. "


async def small_client(target: Target, asks: int, seconds: float) -> tuple[list[float], list[float]]:
    """Ask once in `seconds` -> seconds to each first token, or until the end; engine steps until each answer."""
    taken: list[float] = []

    async def ask(number: int) -> float:
        client = Client(target)
        before, _ = await asyncio.to_thread(steps, target.base_url)
        try:
            answer = await client.ask(target.body(f"Question {number} of {time.time()}", 1))  # type: ignore[arg-type]
        finally:
            client.close()
        if answer.error is not None:
            raise LoadError(answer.error)
        taken.append((await asyncio.to_thread(steps, target.base_url))[0] - before)
        return answer.first_token

    sent, tasks = list[float](), list[asyncio.Task[float]]()
    for number in range(asks):
        sent.append(time.perf_counter())
        tasks.append(asyncio.create_task(ask(number)))
        await asyncio.sleep(seconds)
    waits = []
    for since, task in zip(sent, tasks, strict=True):
        waits.append(task.result() if task.done() else time.perf_counter() - since)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return waits, taken


async def greedy_client(target: Target, number: int, repeats: int, output_len: int) -> None:
    """Keep `number` requests in the server until cancelled."""
    serial = count()

    async def work() -> None:
        client = Client(target)
        try:
            while True:
                prompt = f"{next(serial)} {SENTENCE * repeats}"
                body = {"model": target.model, "prompt": prompt, "max_tokens": output_len, "ignore_eos": True}
                answer = await client.ask(json.dumps(body).encode())  # not streamed: this program has little to do
                if (answer.error or "").startswith("status"):
                    raise LoadError(answer.error or "")
        finally:
            client.close()

    await asyncio.gather(*(work() for _ in range(number)))


def steps(base: str) -> tuple[float, float]:
    """Return the number of engine steps so far and their seconds."""
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        text = answer.read().decode()
    number, seconds = (
        float(re.search(rf"^pyllm:engine_step_seconds_{name}{{[^}}]*}} (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("count", "sum")
    )
    return number, seconds


async def measure(base: str, model: str, args: argparse.Namespace) -> dict[str, object]:
    """Measure the small client alone and next to each load."""
    small, greedy = Target(base, model, SMALL), Target(base, model, GREEDY)
    await small_client(small, 2, 0.5)
    idle, _ = await small_client(small, args.asks, args.seconds)
    result: dict[str, object] = {
        "idle_p50_ms": round(1000 * quantile(idle, 0.5), 1),
        "idle_p99_ms": round(1000 * quantile(idle, 0.99), 1),
    }
    for name, (repeats, output_len) in LOADS.items():
        load = asyncio.create_task(greedy_client(greedy, args.requests, repeats, output_len))
        await asyncio.sleep(args.settle)
        before = await asyncio.to_thread(steps, base)
        waits, taken = await small_client(small, args.asks, args.seconds)
        after = await asyncio.to_thread(steps, base)
        if load.done():
            load.result()
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        step = (after[1] - before[1]) / max(after[0] - before[0], 1)
        goal = 3 * quantile(idle, 0.99) + 3 * step
        result[name] = {
            "p50_ms": round(1000 * quantile(waits, 0.5), 1),
            "p99_ms": round(1000 * quantile(waits, 0.99), 1),
            "step_ms": round(1000 * step, 1),
            "answered": len(taken),
            "most_steps": int(max(taken, default=0)),
            "goal_ms": round(1000 * goal, 1),
            "met": quantile(waits, 0.99) <= goal,
        }
        await asyncio.sleep(1)
    return result


@contextlib.contextmanager
def model_of(shape: str) -> Iterator[tuple[list[str], str]]:
    """Yield the flags for a model, and its name."""
    if shape == "demo":
        yield [], "pyllm-demo"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder) / shape, shape)
        yield [str(Path(folder) / shape), "--load-format", "dummy"], shape


def main() -> None:
    """Measure and print one line for each way of scheduling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo")
    parser.add_argument("--requests", type=int, default=500, help="of the greedy client, at a time")
    parser.add_argument("--asks", type=int, default=10, help="of the small client, alone and next to each load")
    parser.add_argument("--seconds", type=float, default=1.0, help="from one of these to the next")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds until the load counts")
    parser.add_argument("server_args", nargs="*", help="after --: more flags for our server")
    args = parser.parse_args()
    for flag in ("--fair-scheduling", "--no-fair-scheduling"):
        with model_of(args.shape) as (flags, model):
            keys = ["--api-key", GREEDY, "--api-key", SMALL]
            with own_server([*flags, flag, *keys, *args.server_args]) as (base, _):
                result = uvloop.run(measure(base, model, args))
        report("fairness", {"fair": flag == "--fair-scheduling", "requests": args.requests} | result)


if __name__ == "__main__":
    main()
