"""What the prefix cache gains when prompts begin alike, and what it costs when they do not.

    python benchmarks/load/prefix.py                        # 150M shape, prefix of 512 tokens, tail of 32

Gain: time to first token over HTTP of a prompt whose prefix was just seen ÷ that of a prompt never seen. Cost: output
tokens per second of 8 clients with random prompts, cache on ÷ off, on two servers that take turns.
"""

from __future__ import annotations

import argparse
import statistics

import uvloop

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.measure import VOCAB_SIZE, load, report, served
from pyllm.server.cli.bench import random_prompts
from pyllm.server.cli.load_client import Answer, LoadError, Target, closed_loop

# Small enough that the first requests go through all of it: else the cache, which forgets last what was used last, is
# charged for memory that the system provides for the first time, and that costs any server the same in the end.
POOL = ("--kv-cache-memory-bytes", "64MiB")
OFF = "--no-enable-prefix-caching"


def first_tokens(target: Target, prefix_len: int, tail_len: int) -> tuple[Answer, Answer]:
    """One new prefix with two tails, one after the other -> the answers."""
    (prefix,) = random_prompts(1, prefix_len, VOCAB_SIZE)
    bodies = [target.body(prefix + tail, 1) for tail in random_prompts(2, tail_len, VOCAB_SIZE)]
    answers, _ = uvloop.run(closed_loop(target, bodies, 1))
    for answer in answers:
        if answer.error is not None:
            raise LoadError(answer.error)
    return answers[0], answers[1]


def gain(target: Target, prefix_len: int, tail_len: int, rounds: int) -> dict[str, float]:
    """Median times to first token, cold and with the prefix in the cache."""
    pairs = [first_tokens(target, prefix_len, tail_len) for _ in range(rounds)]
    cold, warm = (statistics.median(answer.first_token for answer in kind) for kind in zip(*pairs, strict=True))
    cached = min(second.cached_tokens for _, second in pairs)
    return {"cold_ttft_ms": round(1000 * cold, 1), "warm_ttft_ms": round(1000 * warm, 1),
            "ratio": round(warm / cold, 3), "cached_tokens": cached}  # fmt: skip


def cost(on: Target, off: Target, clients: int, output_len: int, rounds: int) -> dict[str, float]:
    """Median throughput without any hit, and how much of it the cache takes."""
    rates: list[list[float]] = [[], []]
    for turn in range(2 * rounds):
        which = (turn + turn // 2) % 2  # on, off, off, on, …: whatever drifts hits both alike
        result = load((on, off)[which], clients, output_len=output_len)
        rates[which].append(result["output_tok_s"])
    with_cache, without = map(statistics.median, rates)
    return {"on_tok_s": with_cache, "off_tok_s": without, "loss": round(1 - with_cache / without, 4)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--prefix-len", type=int, default=512)
    parser.add_argument("--tail-len", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with served(args.shape, *POOL) as (on, _), served(args.shape, *POOL, OFF) as (off, _):
        warm = gain(on, args.prefix_len, args.tail_len, 2 * args.rounds)
        lost = cost(on, off, args.clients, args.output_len, args.rounds)
    report("prefix", {"shape": args.shape, "prefix_len": args.prefix_len, "tail_len": args.tail_len,
                      "hits": warm, "no_hits": {"clients": args.clients} | lost})  # fmt: skip


if __name__ == "__main__":
    main()
