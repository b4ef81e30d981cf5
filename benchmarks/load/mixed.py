"""How much long prompts that keep arriving disturb streams that run.

    python benchmarks/load/mixed.py                         # 150M shape, 8 streams, prompts of 1,500 tokens

Eight streams run alone, then next to a client that sends long prompts, for one token each, one after another. The
ratio is the 99th percentile of the time between two tokens of a disturbed stream ÷ the undisturbed median.
"""

from __future__ import annotations

import argparse
import asyncio
from itertools import count

import uvloop

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.measure import VOCAB_SIZE, report, served
from pyllm.server.cli.bench import random_prompts
from pyllm.server.cli.load_client import Client, LoadError, Target, closed_loop, quantile


async def streams(target: Target, number: int, output_len: int, prompt_len: int) -> tuple[list[float], int]:
    """Run the streams next to long prompts unless `prompt_len` is 0 -> times between tokens, prompts answered."""
    bodies = [target.body(prompt, output_len) for prompt in random_prompts(number, 32, VOCAB_SIZE)]
    ended = asyncio.Event()
    client = Client(target)

    async def disturb() -> int:
        for answered in count():
            if not prompt_len or ended.is_set():
                return answered
            (prompt,) = random_prompts(1, prompt_len, VOCAB_SIZE)
            answer = await client.ask(target.body(prompt, 1))
            if answer.error is not None:
                raise LoadError(answer.error)
        raise AssertionError("count never ends")

    async def work() -> list[float]:
        try:
            answers, _ = await closed_loop(target, bodies, number)
        finally:
            ended.set()
        # The first gaps belong to the time in which the streams still begin.
        return [gap for answer in answers for gap in answer.gaps[2:]]

    gaps, answered = await asyncio.gather(work(), disturb())
    client.close()
    return gaps, answered


def disturbance(target: Target, number: int, output_len: int, prompt_len: int) -> dict[str, float]:
    """Measure both ways."""
    quiet, _ = uvloop.run(streams(target, number, output_len, 0))
    loud, prompts = uvloop.run(streams(target, number, output_len, prompt_len))
    usual = quantile(quiet, 0.5) or sum(quiet) / len(quiet)  # the median is 0 if most tokens came together
    return {
        "undisturbed_p50_ms": round(1000 * quantile(quiet, 0.5), 2),
        "undisturbed_p99_ms": round(1000 * quantile(quiet, 0.99), 2),
        "disturbed_p50_ms": round(1000 * quantile(loud, 0.5), 2),
        "disturbed_p99_ms": round(1000 * quantile(loud, 0.99), 2),
        "long_prompts": prompts,
        "ratio": round(quantile(loud, 0.99) / usual, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=384)
    parser.add_argument("--prompt-len", type=int, default=1500)
    parser.add_argument("server_args", nargs="*", help="after --: more flags for our server")
    args = parser.parse_args()
    with served(args.shape, *args.server_args) as (target, _):
        result = disturbance(target, args.streams, args.output_len, args.prompt_len)
    report("mixed", {"shape": args.shape, "streams": args.streams, "prompt_len": args.prompt_len} | result)


if __name__ == "__main__":
    main()
