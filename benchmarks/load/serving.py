"""Output tokens per second over HTTP, streaming, with several numbers of clients at once.

    python benchmarks/load/serving.py                      # 150M shape, random weights, 1, 8 and 32 clients
    python benchmarks/load/serving.py --runs 3             # medians of three runs
    python benchmarks/load/serving.py -- --quantization int8        # with more flags for our server

Each client sends its next request when its last one is answered. Prompts are random token ids, so nothing can be
reused between them. One JSON line: throughput, times to first token and between tokens, the gain over one client, the
time of 8 requests at once against one after another, and the server's peak memory. `pyllm bench` puts the same load on
any server.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.measure import load, peak_memory_mib, report, served
from pyllm.server.cli.load_client import Target

TOGETHER = 8


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def together_to_alone(target: Target, input_len: int, output_len: int) -> float:
    """Total time of eight requests at once ÷ of eight, one after another."""
    seconds = [
        load(target, clients, requests=TOGETHER, input_len=input_len, output_len=output_len)["seconds"]
        for clients in (TOGETHER, 1)
    ]
    return seconds[0] / seconds[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("server_args", nargs="*", help="after --: more flags for our server")
    args = parser.parse_args()
    size = {"input_len": args.input_len, "output_len": args.output_len}
    with served(args.shape, *args.server_args) as (target, process):
        rounds = [[load(target, clients, **size) for clients in args.clients] for _ in range(args.runs)]
        together = statistics.median(together_to_alone(target, **size) for _ in range(args.runs))
        memory = round(sum(peak_memory_mib(process.pid)), 1) if os.path.isdir("/proc") else None
    results = {
        str(clients): medians(runs) for clients, runs in zip(args.clients, zip(*rounds, strict=True), strict=True)
    }
    first = str(args.clients[0])
    gain = {n: round(each["output_tok_s"] / results[first]["output_tok_s"], 2) for n, each in results.items()}
    report("serving", {"shape": args.shape, "server_args": args.server_args, **size, "runs": args.runs,
                       "clients": results, f"ratio_to_{first}": gain,
                       "8_together_to_8_alone": round(together, 3), "peak_memory_mib": memory})  # fmt: skip


if __name__ == "__main__":
    main()
