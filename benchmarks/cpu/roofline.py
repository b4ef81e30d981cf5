"""How near a decode step comes to the time that memory needs to deliver the bytes that it must read.

    python benchmarks/cpu/roofline.py                      # 150M shape, BF16, batch 1, 8 and 32, context 512

Whole steps of the engine core are timed: scheduling, network, sampling, bookkeeping; no HTTP and no second process.
The ceiling is the read bandwidth measured in this process with the threads that the engine uses. eta = (bytes /
bandwidth) / step time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.cpu.in_process import LLM, greedy, open_llm, read_bandwidth
from pyllm.benchmarks.limits import step_bytes
from pyllm.benchmarks.measure import VOCAB_SIZE, report
from pyllm.engine.messages import EngineRequest


def decode_seconds(llm: LLM, batch: int, context: int, steps: int) -> float:
    """The median time of a step in which every sequence of the batch decodes, around this context."""
    draw = random.Random(0)
    for index in range(batch):
        prompt = [draw.randrange(100, VOCAB_SIZE) for _ in range(context - steps // 2)]
        llm.core.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=greedy(2 * steps)))
    times: list[float] = []
    full = 0
    while len(times) < steps:
        started = time.perf_counter()
        outputs = llm.core.step().outputs
        seconds = time.perf_counter() - started
        full = full + 1 if len(outputs) == batch else 0
        if not llm.core.has_work:
            raise RuntimeError("the sequences have ended before all of them decoded together")
        if full > 2:  # the first ones are still the prompts' ends
            times.append(seconds)
    llm.core.abort([str(index) for index in range(batch)])
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    # All prompts at once, so that the first sequences have not ended when the last begin.
    with open_llm(args.shape, max_num_prefill_tokens=max(args.batch) * args.context) as llm:
        times = {batch: decode_seconds(llm, batch, args.context, args.steps) for batch in args.batch}
    bandwidth = max(bandwidth, read_bandwidth())  # before and after: a ceiling must not be low by chance
    results = {}
    for batch, seconds in times.items():
        size = step_bytes(SHAPES[args.shape], batch, args.context)
        results[str(batch)] = {
            "step_ms": round(1000 * seconds, 2),
            "tok_s": round(batch / seconds, 1),
            "mb_per_step": round(size / 1e6, 1),
            "ceiling_tok_s": round(batch * bandwidth / size, 1),
            "eta": round(size / bandwidth / seconds, 3),
        }
    report("roofline", {"shape": args.shape, "context": args.context, "read_gb_s": round(bandwidth / 1e9, 1),
                        "threads": torch.get_num_threads(), "batch": results})  # fmt: skip


if __name__ == "__main__":
    main()
