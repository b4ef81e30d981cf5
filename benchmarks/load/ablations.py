"""What each part of the engine is worth: the same measurements with one part off at a time.

    python benchmarks/load/ablations.py                     # 150M shape; a table, then one JSON line

Every row is a server of its own. Columns: output tokens per second with 1, 8 and 32 clients; time to first token with
a cached prefix of 512 tokens ÷ cold; 99th percentile between tokens of 8 streams while prompts of 1,500 tokens arrive ÷
the undisturbed median.
"""

from __future__ import annotations

import argparse

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.load.mixed import disturbance
from pyllm.benchmarks.load.prefix import gain
from pyllm.benchmarks.measure import load, report, served

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as shipped": ([], {}),
    "no prefix cache": (["--no-enable-prefix-caching"], {}),
    "no chunked prefill": (["--max-num-prefill-tokens", "2048"], {}),
    "no native kernels": ([], {"PYLLM_CPU_ISA": "none"}),
    "int8": (["--quantization", "int8"], {}),
}
"""Flags and environment of each row's server."""


def row(shape: str, variant: str, clients: list[int], output_len: int) -> dict[str, float]:
    """One variant's figures."""
    flags, environment = VARIANTS[variant]
    with served(shape, *flags, environment=environment) as (target, _):
        result = {f"{n} clients": load(target, n, output_len=output_len)["output_tok_s"] for n in clients}
        result["prefix"] = gain(target, 512, 32, 5)["ratio"]
        result["mixed"] = disturbance(target, 8, 2 * output_len, 1500)["ratio"]
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-len", type=int, default=128)
    args = parser.parse_args()
    rows = {}
    for variant in args.variants:
        rows[variant] = row(args.shape, variant, args.clients, args.output_len)
        if len(rows) == 1:
            print("| | " + " | ".join(rows[variant]) + " |\n|---" * 1 + "|---" * len(rows[variant]) + "|", flush=True)
        print(f"| {variant} | " + " | ".join(f"{value:g}" for value in rows[variant].values()) + " |", flush=True)
    report("ablations", {"shape": args.shape, "output_len": args.output_len, "variants": rows})


if __name__ == "__main__":
    main()
