"""How near computing prompts comes to this machine's rate of matrix products.

    python benchmarks/cpu/prefill.py                       # 150M shape, BF16: 1x512, 1x128, 1x2047, 8x512 tokens

From the requests' arrival in the engine core until each has its first token; every prompt is new. The ceiling is the
best rate of square BF16 products in this process with the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import random

import torch

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.cpu.in_process import LLM, greedy, matmul_rate, median_seconds, open_llm
from pyllm.benchmarks.measure import VOCAB_SIZE, report
from pyllm.engine.messages import EngineRequest
from pyllm.model import DeepForCausalLM
from pyllm.model.config import DeepConfig


def prompt_flops(config: DeepConfig, tokens: int) -> float:
    """Multiplications and additions of one prompt of `tokens` tokens.

    Two for each weight of each token, where a token passes one expert and the LM head is needed for the last token
    only; and causal attention: each token's queries times half the keys on average, and the same for the values.
    """
    model = DeepForCausalLM(config, device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    head = sizes.pop("lm_head", 0) or sizes["embed_tokens"]
    sizes.pop("embed_tokens")
    weights = sum(size / config.experts if name.endswith(("gate_up", "down")) else size for name, size in sizes.items())
    attention = 4 * config.hidden_size * (tokens + 1) / 2 * config.num_hidden_layers
    return tokens * (2 * weights + attention) + 2 * head


def prefill_seconds(llm: LLM, prompts: int, tokens: int, repeats: int) -> float:
    """The median time to the first token of all of them."""
    names = itertools.count()
    draw = random.Random(0)

    def work() -> None:
        for _ in range(prompts):
            ids = [draw.randrange(100, VOCAB_SIZE) for _ in range(tokens)]
            request = EngineRequest(request_id=str(next(names)), prompt_token_ids=ids, params=greedy(1))
            llm.core.add_request(request)
        while llm.core.has_work:
            llm.core.step()

    return median_seconds(work, repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--sizes", nargs="+", default=["1x512", "1x128", "1x2047", "8x512"], help="PROMPTSxTOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ceiling = matmul_rate(torch.bfloat16)
    with open_llm(args.shape) as llm:
        times = {size: prefill_seconds(llm, *map(int, size.split("x")), args.repeats) for size in args.sizes}
    ceiling = max(ceiling, matmul_rate(torch.bfloat16))  # before and after: a ceiling must not be low by chance
    results = {}
    for size, seconds in times.items():
        prompts, tokens = map(int, size.split("x"))
        rate = prompts * prompt_flops(SHAPES[args.shape], tokens) / seconds
        results[size] = {
            "ms": round(1000 * seconds, 1),
            "prompt_tok_s": round(prompts * tokens / seconds),
            "gflop_s": round(rate / 1e9, 1),
            "ratio": round(rate / ceiling, 3),
        }
    report("prefill", {"shape": args.shape, "matmul_gflop_s": round(ceiling / 1e9, 1),
                       "threads": torch.get_num_threads(), "prompts": results})  # fmt: skip


if __name__ == "__main__":
    main()
