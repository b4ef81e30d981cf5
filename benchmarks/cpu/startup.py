"""Seconds from the start of the server's process to its first token, and the memory that it takes.

    python benchmarks/cpu/startup.py                       # a checkpoint file of the 150M shape, five starts

The file holds random weights in BF16 and lies in the page cache, as after a restart. Also: the first request against
the second, `pyllm --help`, and the peak memory of all processes after 32 clients at once have filled the KV cache,
against 1.3 x (weights + KV cache) + 400 MB.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from pyllm.benchmarks import checkpoint
from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.measure import VOCAB_SIZE, load, peak_memory_mib, report
from pyllm.server.cli.bench import own_server, random_prompts
from pyllm.server.cli.load_client import LoadError, Target, closed_loop

BLOCKS, BLOCK_SIZE, CLIENTS = 640, 16, 32
"""32 clients with 128 + 128 tokens fill four fifths of these blocks at once, so no request must wait."""


def help_seconds() -> float:
    """How long `pyllm --help` takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pyllm", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_tokens(folder: Path) -> tuple[float, float, float, float]:
    """Start once -> seconds until ready, until the first token, of the first request, of the second."""
    started = time.perf_counter()
    with own_server([str(folder)]) as (base, _):
        ready = time.perf_counter() - started
        target = Target(base, folder.name)
        bodies = [target.body(prompt, 1) for prompt in random_prompts(2, 16, VOCAB_SIZE)]
        answers, _ = uvloop.run(closed_loop(target, bodies, 1))
    for answer in answers:
        if answer.error is not None:
            raise LoadError(answer.error)
    return ready, answers[0].chunks[0] - started, answers[0].first_token, answers[1].first_token


def memory(folder: Path, shape: str) -> dict[str, Any]:
    """Peak memory under load, and its limit."""
    config = SHAPES[shape]
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * BLOCKS * BLOCK_SIZE
    weights = (folder / "model.safetensors").stat().st_size
    flags = [str(folder), "--num-kv-blocks", str(BLOCKS), "--block-size", str(BLOCK_SIZE)]
    with own_server(flags) as (base, process):
        load(Target(base, folder.name), CLIENTS, requests=CLIENTS)
        peak = peak_memory_mib(process.pid)
    limit = 1.3 * (weights + kv) / 2**20 + 400e6 / 2**20
    return {
        "peak_mib": round(sum(peak), 1),
        "limit_mib": round(limit, 1),
        "ratio": round(sum(peak) / limit, 3),
        "processes_mib": peak,
        "weights_mib": round(weights / 2**20, 1),
        "kv_mib": round(kv / 2**20, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / args.shape
        # In a process of its own, so that its memory is freed before anything is measured.
        subprocess.run([sys.executable, checkpoint.__file__, args.shape, str(folder), "--weights"], check=True)
        runs = [first_tokens(folder) for _ in range(args.runs)]
        ready, total, first, second = (statistics.median(column) for column in zip(*runs, strict=True))
        taken = memory(folder, args.shape)
    words = statistics.median(help_seconds() for _ in range(args.runs))
    report("startup", {"shape": args.shape, "runs": args.runs, "ready_s": round(ready, 2),
                       "first_token_s": round(total, 2), "first_request_ms": round(1000 * first, 1),
                       "second_request_ms": round(1000 * second, 1), "help_s": round(words, 3),
                       "memory": taken})  # fmt: skip


if __name__ == "__main__":
    main()
