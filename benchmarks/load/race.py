"""Our server against another one, in turn, on the same load.

    python benchmarks/load/race.py --ours http://127.0.0.1:8000 --peer http://127.0.0.1:8101 --peer-model NAME

Both run already. With `--pids` the one that is not measured is halted (SIGSTOP), since an idle server may take some
processor time too. Each round measures both at every number of clients, and
the one that begins changes from round to round. One JSON line: medians, and the ratio ours ÷ peer. How to start a peer
is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence

from pyllm.benchmarks.measure import family, family_seconds, load, peak_memory_mib, report
from pyllm.server.cli.load_client import Target

SHOWN = ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms")


@contextlib.contextmanager
def halted(pids: Sequence[int]) -> Iterator[None]:
    """These processes and their descendants do nothing meanwhile."""
    members = [member for pid in pids for member in family(pid)]
    try:
        for member in members:
            os.kill(member, signal.SIGSTOP)
        yield
    finally:
        for member in members:
            os.kill(member, signal.SIGCONT)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="URL")
    parser.add_argument("--ours-model", default="150m", metavar="NAME")
    parser.add_argument("--peer", required=True, metavar="URL")
    parser.add_argument("--peer-model", required=True, metavar="NAME")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pids", type=int, nargs=2, default=(), metavar=("OURS", "PEER"), help="process ids")
    args = parser.parse_args()
    targets = {"ours": Target(args.ours, args.ours_model), "peer": Target(args.peer, args.peer_model)}
    size = {"input_len": args.input_len, "output_len": args.output_len}
    used = sum(map(family_seconds, args.pids))
    for target in targets.values():
        load(target, max(args.clients), **size | {"output_len": 8})  # warm up
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for clients in args.clients:
            for name in list(targets)[:: -1 if turn % 2 else 1]:
                other = args.pids[1:] if name == "ours" else args.pids[:1]
                with halted(other):
                    result = load(targets[name], clients, **size)
                runs.setdefault((name, clients), []).append(result)
                print(f"round {turn + 1}: {name}, {clients} clients: {result['output_tok_s']:g} tok/s", file=sys.stderr)
    table = {
        name: {str(n): {key: round(statistics.median(run[key] for run in runs[name, n]), 2) for key in SHOWN}
               for n in args.clients} for name in targets
    }  # fmt: skip
    ratios = {n: round(table["ours"][n]["output_tok_s"] / table["peer"][n]["output_tok_s"], 3) for n in table["ours"]}
    failed = sum(run["failed"] for results in runs.values() for run in results)
    result = {
        **size, "rounds": args.rounds, **table, "ratio": ratios, "failed": failed,
        "peak_memory_mib": [round(sum(peak_memory_mib(pid)), 1) for pid in args.pids],
    }  # fmt: skip
    report("race", result, sum(map(family_seconds, args.pids)) - used)


if __name__ == "__main__":
    main()
