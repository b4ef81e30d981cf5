"""What a grammar costs the step that it is in.

    python benchmarks/cpu/structured_output.py             # 150M shape, batch 8: 0, 1 and 8 of them constrained

The batches take turns, so that a busy moment of the machine meets all of them. The constrained ones follow a JSON
schema that lasts as long as the run. Steps in which prompts are computed are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.cpu.in_process import LLM, open_llm
from pyllm.benchmarks.measure import report
from pyllm.engine.messages import EngineRequest, SamplingParams

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "count", "kind", "tags"],
    "additionalProperties": False,
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": {
    "type": "array", "items": ITEM, "minItems": 1000, "x-guidance": {"whitespace_pattern": " "},
}}]})  # fmt: skip


def step_seconds(llm: LLM, batch: int, constrained: int, tokens: int, seed: int) -> list[float]:
    """Times of the steps of one batch in which every sequence decodes."""
    core = llm.core
    for i in range(batch):
        params = SamplingParams(
            max_tokens=tokens, seed=seed + i, ignore_eos=True, grammar=GRAMMAR if i < constrained else None
        )
        core.add_request(EngineRequest(request_id=str(i), prompt_token_ids=[100 + i] * 16, params=params))
    times = []
    while core.has_requests:
        core.wait_for_work()
        decoding = len(core.scheduler.running) == batch
        started = time.perf_counter()
        core.step()
        if decoding:
            times.append(time.perf_counter() - started)
    return times[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    counts = (0, 1, args.batch)
    times: dict[int, list[float]] = {count: [] for count in counts}
    with open_llm(args.shape) as llm:
        for count in counts:
            step_seconds(llm, args.batch, count, 8, 0)
        for turn in range(args.rounds):
            for count in counts:
                times[count] += step_seconds(llm, args.batch, count, args.tokens, 100 * turn)
    medians = {count: statistics.median(times[count]) for count in counts}
    report("structured_output", {
        "shape": args.shape, "batch": args.batch, "rounds": args.rounds,
        "step_ms": {f"{count} constrained": round(1000 * medians[count], 3) for count in counts},
        "ratio": {f"{count} constrained": round(medians[count] / medians[0], 3) for count in counts[1:]},
    })  # fmt: skip


if __name__ == "__main__":
    main()
