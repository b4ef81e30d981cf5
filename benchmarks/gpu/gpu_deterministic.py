"""The deterministic mode: bits that no company changes, and what they cost; part of gpu_check.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm.benchmarks.gpu.gpu_kernels import PAGE, check_all
from pyllm.benchmarks.gpu.gpu_measure import Decode, Machine
from pyllm.model import DeepForCausalLM
from pyllm.model.backend import AttentionMetadata, Backend
from pyllm.model.cuda import backend as cuda

ACCEPT = 0.70
Part = tuple[int, int, int]
"""(text, first token, token behind the last)."""


def deterministic(model: DeepForCausalLM) -> Backend:
    """The operations of the mode."""
    return cuda.TritonBackend(model, deterministic=True)


class Texts:
    """Random texts of one length, and steps that compute parts of them."""

    def __init__(self, model: DeepForCausalLM, count: int, length: int) -> None:
        self._model, self._pages = model, -(-length // PAGE)
        generator = torch.Generator(model.device).manual_seed(7)
        shape = (count, length)
        self._ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)
        self._cache = model.new_kv_cache(count * self._pages, PAGE)

    @torch.inference_mode()
    def step(self, parts: list[Part]) -> list[Tensor]:
        """Logits of the last token of each part; parts of one token come first."""
        device = self._ids.device
        at = [torch.arange(begin, end, device=device) for _, begin, end in parts]
        lengths, ends = [len(places) for places in at], [end for *_, end in parts]
        starts = torch.tensor([0, *lengths], device=device).cumsum(0)
        tables = torch.tensor([text for text, *_ in parts], device=device)[:, None] * self._pages
        metadata = AttentionMetadata(
            query_lens=lengths, seq_lens=ends, num_decodes=lengths.count(1),
            slot_mapping=torch.cat([n * self._pages * PAGE + on for (n, *_), on in zip(parts, at, strict=True)]),
            block_tables=(tables + torch.arange(self._pages, device=device)).to(torch.int32),
            seq_lens_device=torch.tensor(ends, dtype=torch.int32, device=device), query_starts=starts.to(torch.int32),
        )  # fmt: skip
        ids = torch.cat([self._ids[n][places] for (n, *_), places in zip(parts, at, strict=True)])
        hidden = self._model(ids, torch.cat(at), metadata, self._cache)
        return list(self._model.logits(hidden[starts[1:] - 1]))


def same_bits(machine: Machine, model: DeepForCausalLM, batches: list[int], length: int) -> dict[str, bool]:
    """Whether the last token of a text has the same scores however it is computed."""
    texts = Texts(model, max(batches), length)
    before = [(n, 0, length - 1) for n in range(max(batches))]
    room = 8192 // length + 1
    for n in range(0, len(before), room):
        texts.step(before[n : n + room])
    alone = texts.step([(0, length - 1, length)])[0]
    found = {}
    for batch in batches[1:]:
        order = [*range(1, batch // 2 + 1), 0, *range(batch // 2 + 1, batch)]
        among = texts.step([(n, length - 1, length) for n in order])[batch // 2]
        found[f"same bits at batch 1 and {batch}"] = torch.equal(among, alone)
    found["same bits as the end of a prompt"] = torch.equal(texts.step([(0, 0, length)])[0], alone)
    third = length // 3
    cuts = [(0, third), (third, third + 1), (third + 1, length - 2), (length - 2, length)]
    for cut in cuts:
        last = texts.step([(0, *cut)])[0]
    found["same bits in odd chunks"] = torch.equal(last, alone)
    mixed = texts.step([(0, length - 1, length), (1, 0, length)])[0]
    found["same bits next to a prompt"] = torch.equal(mixed, alone)
    del texts
    machine.clear()
    return found


def deterministic_goals(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """G13: equal bits, and the speed as a share of the default's."""
    if not machine.has_triton:
        return []
    model = machine.model(machine.shape("1.5b"))
    default, fixed = model.ops, deterministic(model)
    batches, context = ([1, 3], 9) if machine.dry else ([1, 2, 17, 33, 65, 128], 513)
    model.ops = fixed
    rows: list[dict[str, Any]] = [
        {"goal": "G13", "what": what, "value": float(same), "accept": 1.0}
        for what, same in same_bits(machine, model, batches, context).items()
    ]
    steps = [(1, 512), (128, 512)] if quick else [(1, 512), (32, 512), (128, 512), (256, 512), (1, 4096)]
    for batch, length in [(2, 8)] if machine.dry else steps:
        seconds = []
        for ops in (default, fixed):
            model.ops = ops
            step = Decode(model, batch, length)
            seconds.append(machine.seconds(machine.captured(step.work)))
            del step
            machine.clear()
        what = f"decode ÷ default, batch {batch}, context {length}"
        accept = ACCEPT if length == 512 else ""
        rows.append({"goal": "G13", "what": what, "value": seconds[0] / seconds[1], "accept": accept})
    length = 5 if machine.dry else 2048
    seconds = []
    for ops in (default, fixed):
        model.ops = ops
        texts = Texts(model, 1, length)
        seconds.append(machine.seconds(lambda: texts.step([(0, 0, length)]), repeats=5))  # noqa: B023 - used at once
    rows.append(
        {"goal": "G13", "what": f"prompt of {length} ÷ default", "value": seconds[0] / seconds[1], "accept": ""}
    )
    return rows


def check_deterministic(machine: Machine) -> list[str]:
    """Every operation of the mode against plain torch, on the few most important cases: what is wrong."""
    if not machine.has_triton:
        return []
    checks, _ = check_all(machine.device, deterministic, quick=True, dry=machine.dry, seconds=30.0)
    return [f"deterministic {c.name} in {c.dtype} at {c.shape}: error {c.error:.3g}" for c in checks if not c.ok]
