"""The 200M shape of the TR-Hash line: exact against plain torch, fast for 1, 8 and 32 sequences; of gpu_check.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.gpu.gpu_kernels import LIMITS, relative
from pyllm.benchmarks.gpu.gpu_measure import Decode, Machine, prompt_work
from pyllm.benchmarks.limits import prefill_flops, step_bytes
from pyllm.model.backend import Backend
from pyllm.model.config import DeepConfig

BATCHES = (1, 8, 32)
CONTEXT = 256
SECONDS = 90.0
"""After this no further row is begun, so that a slow machine does not wait for all of them."""
Row = dict[str, Any]


def hash_shape(machine: Machine) -> DeepConfig:
    """The published shape, or a tiny one with the same experts in its place."""
    shape = SHAPES["200m-hash"]
    if not machine.dry:
        return shape
    return replace(
        shape, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, vocab_size=64,
        intermediate_size=32, shared_intermediate_size=48,
    )  # fmt: skip


@torch.inference_mode()
def hash_equality(machine: Machine) -> list[Row]:
    """Scores of prompts and of decodes, and a greedy text, in FP32 on this backend and in plain torch."""
    model = machine.model(hash_shape(machine), plain=True, dtype=torch.float32)
    ours, plain = machine.backend(model), Backend()
    context, length, count = (8, 5, 3) if machine.dry else (CONTEXT, 700, 64)
    ids = (torch.arange(length, device=machine.device) * 7919 + 11) % model.config.vocab_size

    def text() -> Tensor:
        return model.generate(ids, max_new_tokens=count, temperature=0.0, eos_token_id=-1)

    def on(backend: Backend, work: Callable[[], Tensor]) -> Tensor:
        model.ops = backend
        return work()

    works: dict[str, Callable[[], Tensor]] = {"two prompts": prompt_work(model, 2, length)}
    for batch in (1, 3) if machine.dry else BATCHES:
        works[f"decodes of {batch}"] = Decode(model, batch, context).scores
    rows = []
    until = time.monotonic() + SECONDS
    for name, work in works.items():
        if time.monotonic() > until:
            rows.append({"what": f"{name}: not reached in the time", "error": "", "ok": True})
            continue
        error = relative(on(ours, work).clone(), on(plain, work))
        rows.append({"what": name, "error": error, "ok": error <= LIMITS[torch.float32]})
    same = torch.equal(on(ours, text), on(plain, text))
    rows.append({"what": f"greedy text of {count} tokens", "error": "", "ok": same})
    machine.clear()
    return rows


@torch.inference_mode()
def hash_goals(machine: Machine, best: dict[str, float], quick: bool) -> list[Row]:
    """Decodes as a share of the copy bandwidth, and prompts as a share of the rate of a large product."""
    config = hash_shape(machine)
    model = machine.model(config)
    context, length = (8, 5) if machine.dry else (CONTEXT, 512)
    rows: list[Row] = []
    until = time.monotonic() + SECONDS
    for batch in (1, 3) if machine.dry else BATCHES:
        if time.monotonic() > until:
            break
        step = Decode(model, batch, context)
        seconds = machine.seconds(machine.captured(step.work) if model.ops.capturable else step.work)
        share = step_bytes(config, batch, context) / seconds / best["copy_bytes_per_s"]
        rows.append(_row(f"decode, {batch} sequences of {context}", seconds, batch, share))
        machine.clear()
    for prompts in (1,) if machine.dry or quick else (1, 8):
        if time.monotonic() > until:
            break
        work = prompt_work(model, prompts, length)
        seconds = machine.seconds(machine.captured(work) if model.ops.capturable else work, repeats=5)
        share = prefill_flops(config, prompts, length) / seconds / best["matmul_flop_per_s"]
        rows.append(_row(f"{prompts} prompts of {length}", seconds, prompts * length, share))
    return rows


def _row(what: str, seconds: float, tokens: int, share: float) -> Row:
    return {"what": what, "ms": 1000 * seconds, "tok/s": tokens / seconds, "share": share}
