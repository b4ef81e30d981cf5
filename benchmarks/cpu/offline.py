"""Output tokens per second of the engine as a library, without HTTP: batch sizes and int8 against BF16.

    python benchmarks/cpu/offline.py                       # 150M shape, BF16 and int8, batch 1, 8 and 32

`LLM.generate` on so many random prompts at once: prefill and decode together. The ceilings of the gain from batching
are those of the bytes: 4.5 and 12.6 at 8 and 32.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.cpu.in_process import LLM, greedy, open_llm
from pyllm.benchmarks.measure import VOCAB_SIZE, report


def output_rate(llm: LLM, batch: int, input_len: int, output_len: int) -> float:
    """Output tokens per second of one call."""
    draw = random.Random(time.monotonic_ns())
    prompts: list[str | list[int]] = [[draw.randrange(100, VOCAB_SIZE) for _ in range(input_len)] for _ in range(batch)]
    started = time.perf_counter()
    completions = llm.generate(prompts, greedy(output_len))
    return sum(len(completion.token_ids) for completion in completions) / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"], help="the first is compared to")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates: dict[str, dict[str, float]] = {}
    for kind in args.quantization:
        with open_llm(args.shape, quantization=kind) as llm:
            output_rate(llm, max(args.batch), 16, 4)  # warm up
            rates[kind] = {}
            for batch in args.batch:
                runs = [output_rate(llm, batch, args.input_len, args.output_len) for _ in range(args.repeats)]
                rates[kind][str(batch)] = round(statistics.median(runs), 1)
    first, alone = args.quantization[0], str(args.batch[0])
    ratios = {
        f"{kind}_to_{first}": {batch: round(rate / rates[first][batch], 2) for batch, rate in rates[kind].items()}
        for kind in args.quantization[1:]
    }
    gain = {kind: {batch: round(rate / of[alone], 2) for batch, rate in of.items()} for kind, of in rates.items()}
    report("offline", {"shape": args.shape, "input_len": args.input_len, "output_len": args.output_len,
                       "threads": torch.get_num_threads(), "output_tok_s": rates, f"ratio_to_batch_{alone}": gain,
                       **ratios})  # fmt: skip


if __name__ == "__main__":
    main()
