"""Ceilings of a GPU, and how near the network alone comes to them; part of gpu_check.py."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.gpu.gpu_kernels import PAGE, attention_config, randomise
from pyllm.benchmarks.limits import prefill_flops, step_bytes
from pyllm.model import DeepForCausalLM
from pyllm.model.backend import AttentionMetadata, Backend
from pyllm.model.checkpoint.loader import load_checkpoint
from pyllm.model.config import DeepConfig
from pyllm.model.cuda import backend as cuda
from pyllm.model.draw_params import DrawParams
from pyllm.model.fp8 import FP8, has_fp8
from pyllm.model.sampling import SamplingBatch

Work = Callable[[], object]
IN_TURN = {"PDL": False, "launch_pdl": False}
"""How kernels are launched that begin when the one before has ended."""
GOALS: dict[tuple[int, int, torch.dtype], tuple[str, float | str, float | str]] = {
    (1, 512, torch.bfloat16): ("G1", 0.40, 0.33), (32, 512, torch.bfloat16): ("G2", 0.50, 0.45),
    (128, 512, torch.bfloat16): ("G3", 0.60, 0.60), (256, 512, torch.bfloat16): ("G3", 0.60, 0.60),
    (256, 2048, torch.bfloat16): ("G3", 0.65, 0.65), (256, 2048, FP8): ("FP8 KV", "", ""),
}  # fmt: skip
"""(batch, context, dtype of keys and values): (goal, accept on an H100, on an H200)."""


class Machine:
    """Where it runs: a GPU, or the CPU with tiny shapes in its place."""

    def __init__(self, dry: bool, *, has_triton: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.has_triton = has_triton
        self.dtype = torch.float32 if dry else torch.bfloat16
        if dry and has_triton:  # programs run one after another here, and most splits would have no keys
            from pyllm.model.cuda import backend

            backend.MAX_SPLITS = 2

    def describe(self) -> dict[str, Any]:
        """Name, versions and the day."""
        name = platform.processor() or "cpu" if self.dry else torch.cuda.get_device_name(self.device)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        if self.has_triton:
            import triton

            versions["triton"] = triton.__version__
        return {"device": name, **versions, "date": date.today().isoformat()}

    def backend(self, model: DeepForCausalLM) -> Backend:
        """The operations to be checked: on Triton kernels where there are any."""
        return cuda.TritonBackend(model) if self.has_triton and cuda.available(model.config) else Backend()

    def model(self, config: DeepConfig, *, plain: bool = False, dtype: torch.dtype | None = None) -> DeepForCausalLM:
        """A network with random weights."""
        model = DeepForCausalLM(config, dtype=dtype or self.dtype, device=self.device)
        randomise(model)
        if not plain:
            model.ops = self.backend(model)
        return model.eval().requires_grad_(False)

    def shape(self, name: str) -> DeepConfig:
        """A published shape, or a tiny one in its place."""
        return (
            SHAPES[name] if not self.dry else replace(attention_config(2, 1, 16), intermediate_size=64, vocab_size=64)
        )

    def captured(self, work: Work) -> Work:
        """`work` as a CUDA graph."""
        if self.dry:
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        replay: Work = graph.replay
        return replay

    def seconds(self, work: Work, repeats: int = 20, rounds: int = 5) -> float:
        """The median over rounds of the mean time of `work`."""
        if self.dry:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        for _ in range(3):
            work()
        times = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / repeats)
        return statistics.median(times)

    def fits(self, size: float) -> bool:
        """Whether so many bytes are free, with some to spare."""
        return self.dry or size < 0.92 * torch.cuda.mem_get_info(self.device)[0]

    def clear(self) -> None:
        """Give memory back."""
        if not self.dry:
            torch.cuda.empty_cache()


@torch.inference_mode()
def ceilings(machine: Machine) -> dict[str, float]:
    """What this GPU does at best: bytes/s of a copy, operations/s of products, s between kernels of a graph."""
    size, side, count = (1 << 10, 64, 10) if machine.dry else (1 << 31, 8192, 1000)
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy = 2 * size / machine.seconds(partial(target.copy_, source))
    a, b = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    rate = 2 * side**3 / machine.seconds(lambda: torch.mm(a, b))
    number = torch.zeros(1, device=machine.device)

    def many() -> None:
        for _ in range(count):
            number.add_(1.0)

    gap = machine.seconds(machine.captured(many)) / count
    machine.clear()
    return {"copy_bytes_per_s": copy, "matmul_flop_per_s": rate, "graph_kernel_s": gap}


class Decode:
    """A decode step of the network alone: embedding to drawn tokens, all sequences at one context."""

    def __init__(
        self,
        model: DeepForCausalLM,
        batch: int,
        context: int,
        *,
        splits: int | None = None,
        kept: torch.dtype | None = None,
    ) -> None:
        device, pages = model.device, -(-context // PAGE)
        cache = model.new_kv_cache(batch * pages, PAGE, kept)
        tables = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        tables = tables.view(batch, pages).to(device)
        positions = torch.full((batch,), context - 1, device=device)
        slots = tables[:, -1].long() * PAGE + (context - 1) % PAGE
        metadata = AttentionMetadata(
            query_lens=[1] * batch, seq_lens=[context] * batch, num_decodes=batch, slot_mapping=slots,
            block_tables=tables, num_splits=splits,
            seq_lens_device=torch.full((batch,), context, dtype=torch.int32, device=device),
            query_starts=torch.arange(batch + 1, dtype=torch.int32, device=device),
        )  # fmt: skip
        ids = (torch.arange(batch, device=device) * 7919 + 11) % model.config.vocab_size
        greedy = [DrawParams(temperature=0.0)] * batch
        draws = SamplingBatch.build(greedy, [context] * batch, device, full=model.ops.capturable)

        def scores() -> Tensor:
            return model.logits(model(ids, positions, metadata, cache))

        self.scores = torch.inference_mode()(scores)
        self.work = torch.inference_mode()(lambda: model.ops.draw(scores(), draws))


def _kv_bytes(config: DeepConfig, tokens: int, kept: torch.dtype) -> float:
    return 2.0 * kept.itemsize * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


def decode_goals(machine: Machine, best: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    """G1 to G3 and G9, with what they are made of."""
    config = machine.shape("1.5b")
    model, rows = machine.model(config), []
    wide = "H200" in str(machine.describe()["device"])
    steps = list(GOALS.items())
    for (batch, context, kept), (goal, *accept) in [*steps[:2], steps[-1]] if machine.dry else steps:
        if (quick and batch == 128) or (kept == FP8 and not has_fp8(machine.device)):
            continue
        if not machine.fits(_kv_bytes(config, batch * context, kept)):
            rows.append({"goal": goal, "batch": batch, "context": context, "ms": "does not fit"})
            continue
        batch, context = (min(batch, 3), 8) if machine.dry else (batch, context)
        step = Decode(model, batch, context, kept=kept if kept == FP8 else None)
        seconds = machine.seconds(machine.captured(step.work) if model.ops.capturable else step.work)
        eager = machine.seconds(step.work) if batch in (1, 32) else float("nan")
        size = step_bytes(config, batch, context, kept)
        rows.append(
            {"goal": goal, "batch": batch, "context": context, "ms": 1000 * seconds, "tok/s": batch / seconds,
             "eta": size / seconds / best["copy_bytes_per_s"], "accept": accept[wide], "eager ms": 1000 * eager,
             "G9 graph/eager": eager / seconds}
        )  # fmt: skip
        del step
        machine.clear()
    rows += _ablations(machine, config, model, rows[0])
    columns = list(rows[0])
    return [{column: row.get(column, "") for column in columns} for row in rows]


def _ablations(
    machine: Machine, config: DeepConfig, model: DeepForCausalLM, first: dict[str, Any]
) -> list[dict[str, Any]]:
    """The same steps without one thing at a time."""
    context = 8 if machine.dry else 2048
    rows = []
    for name, splits in (("as it is", None), ("no split of keys", 1)):
        step = Decode(model, 1, context, splits=splits)
        seconds = machine.seconds(machine.captured(step.work) if model.ops.capturable else step.work)
        rows.append({"goal": name, "batch": 1, "context": context, "ms": 1000 * seconds})
    if isinstance(model.ops, cuda.TritonBackend):
        for batch in (1, 2 if machine.dry else 32):
            with patch.object(model.ops, "_launch", IN_TURN):
                step = Decode(model, batch, first["context"])
                seconds = machine.seconds(machine.captured(step.work))
            name = "each kernel after the end of the last"
            rows.append({"goal": name, "batch": batch, "context": first["context"], "ms": 1000 * seconds})
    plain = machine.model(config, plain=True)
    for batch in (1, 2 if machine.dry else 32):
        step = Decode(plain, batch, first["context"])
        rows.append(
            {
                "goal": "plain torch",
                "batch": batch,
                "context": first["context"],
                "ms": 1000 * machine.seconds(step.work),
            }
        )
    return rows


def prompt_work(model: DeepForCausalLM, prompts: int, length: int) -> Work:
    """A step that computes whole prompts of one length, and the scores of their last tokens."""
    device, pages = model.device, -(-length // PAGE)
    cache = model.new_kv_cache(prompts * pages, PAGE)
    tables = torch.arange(prompts * pages, dtype=torch.int32, device=device).view(prompts, pages)
    at = torch.arange(length, device=device)
    slots = torch.cat([tables[n][at // PAGE].long() * PAGE + at % PAGE for n in range(prompts)])
    metadata = AttentionMetadata(
        query_lens=[length] * prompts, seq_lens=[length] * prompts, slot_mapping=slots, block_tables=tables,
        seq_lens_device=torch.full((prompts,), length, dtype=torch.int32, device=device),
        query_starts=torch.arange(0, (prompts + 1) * length, length, dtype=torch.int32, device=device),
    )  # fmt: skip
    ids = (torch.arange(prompts * length, device=device) * 7919 + 11) % model.config.vocab_size
    last = torch.arange(1, prompts + 1, device=device) * length - 1
    positions = at.repeat(prompts)

    def work() -> Tensor:
        return model.logits(model(ids, positions, metadata, cache)[last])

    return torch.inference_mode()(work)


@torch.inference_mode()
def prefill_goals(machine: Machine, best: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    """G5: operations of a prompt in the time that it takes, against the rate of one large product."""
    config, rows = machine.shape("1.5b"), []
    model = machine.model(config)
    sizes = [(1, 512, 0.35), (1, 2048, 0.50), (8, 1024, 0.55)]
    for prompts, length, accept in [(2, 5, 0.0)] if machine.dry else sizes:
        work = prompt_work(model, prompts, length)
        times = 3 if quick else 5
        eager = machine.seconds(work, repeats=5, rounds=times)
        captured = machine.captured(work) if model.ops.capturable else work
        seconds = machine.seconds(captured, repeats=5, rounds=times)
        flops = prefill_flops(config, prompts, length)
        share = flops / seconds / best["matmul_flop_per_s"]
        rows.append(
            {"goal": "G5", "prompts": prompts, "tokens": length, "ms": 1000 * seconds,
             "tok/s": prompts * length / seconds, "share": share, "accept": accept, "eager ms": 1000 * eager}
        )  # fmt: skip
    return rows


@torch.inference_mode()
def greedy_equality(machine: Machine, root: Path, quick: bool) -> list[dict[str, Any]]:
    """Greedy texts of both backends in FP32, and the published ones where they are at hand."""
    count, rows = (3 if machine.dry else 64), []
    config = machine.shape("150m")
    exact = machine.model(config, plain=True, dtype=torch.float32)
    prompt = (torch.arange(5 if machine.dry else 300, device=machine.device) * 7919 + 11) % config.vocab_size
    wanted = exact.generate(prompt, max_new_tokens=count, temperature=0.0, eos_token_id=-1)
    exact.ops = machine.backend(exact)
    got = exact.generate(prompt, max_new_tokens=count, temperature=0.0, eos_token_id=-1)
    ok = torch.equal(got, wanted)
    if not ok:  # only two tokens that are as likely as each other may change places
        at = int((got != wanted).nonzero()[0])
        exact.ops = Backend()
        positions = torch.arange(at, device=machine.device)
        scores = exact.logits(exact(wanted[:at], positions, AttentionMetadata.without_cache([at])))[-1]
        ok = bool((scores[wanted[at]] - scores[got[at]]).abs() < 1e-3)
    rows.append({"model": "150m, random", "tokens": count, "ok": ok})
    del exact
    found = next((p for p in (root.parent / "shared/golden", root / "shared/golden") if p.is_dir()), None)
    folders = sorted(p for p in found.iterdir() if (p / "golden.safetensors").is_file()) if found else []
    for folder in folders[:1] if machine.dry else folders[:4] if quick else folders:
        from safetensors.torch import load_file

        truth = load_file(folder / "golden.safetensors")
        model, _ = load_checkpoint(
            folder, network=DeepForCausalLM, dtype=torch.float32, device=machine.device, progress=False
        )
        model.ops = machine.backend(model)
        ids, answer = truth["input_ids"].flatten(), truth["greedy_ids"].flatten().tolist()
        answer = answer[:count]
        text = model.generate(ids, max_new_tokens=len(answer), temperature=0.0, eos_token_id=-1)
        rows.append(
            {"model": folder.name, "tokens": len(answer), "ok": text.flatten().tolist()[len(ids) :] == answer}
        )  # fmt: skip
    return rows


@torch.inference_mode()
def overlap_equality(machine: Machine) -> list[dict[str, Any]]:
    """Whether kernels that begin before the last one has ended give the same bits as those that wait, every time."""
    config, rows = machine.shape("1.5b"), []
    model = machine.model(config)
    assert isinstance(model.ops, cuda.TritonBackend)
    times, context = (1, 8) if machine.dry else (100, 300)
    steps: dict[str, Callable[[], Tensor]] = {}
    for batch in (1, 2) if machine.dry else (1, 24, 48, 200):
        steps[f"decodes of {batch}"] = Decode(model, batch, context).scores
    steps["prompts"] = prompt_work(model, 2, 5 if machine.dry else 700)
    for name, work in steps.items():
        with patch.object(model.ops, "_launch", IN_TURN):
            wanted = work().clone()
        found: list[Tensor] = []

        def note(work: Callable[[], Tensor] = work, found: list[Tensor] = found) -> None:
            found[:] = [work()]

        replay, same = machine.captured(note), True
        replay()
        for _ in range(times):
            found[0].fill_(float("nan"))
            replay()
            same = same and torch.equal(found[0], wanted)
        rows.append({"model": f"1.5b, random, overlapping kernels, {name}", "tokens": times, "ok": same})
    return rows


def profile_steps(machine: Machine, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Where the time of a step goes, kernel by kernel: decodes of several batches, and prompts."""
    from torch.profiler import ProfilerActivity, profile

    config = machine.shape("1.5b")
    model, tables = machine.model(config), {}
    activity = ProfilerActivity.CPU if machine.dry else ProfilerActivity.CUDA
    steps: dict[str, Callable[[], Work]] = {}
    for batch in (1,) if machine.dry else (1, 256) if quick else (1, 32, 256):
        steps[f"a decode step of {batch}"] = lambda batch=batch: Decode(model, batch, 8 if machine.dry else 512).work
    for prompts, length in [] if machine.dry else [(1, 512), (8, 1024)]:
        steps[f"prompts, {prompts} x {length}"] = partial(prompt_work, model, prompts, length)
    for name, make in steps.items():
        work = make()
        work()
        with profile(activities=[activity]) as run:
            work()
            if not machine.dry:
                torch.cuda.synchronize()
        side = "self_cpu_time_total" if machine.dry else "self_device_time_total"
        found = [(getattr(event, side, 0.0), event.count, event.key) for event in run.key_averages()]
        total = sum(each for each, *_ in found) or 1.0
        tables[name] = [
            {"kernel": key[:70], "calls": calls, "us": round(each, 1), "share": round(each / total, 3)}
            for each, calls, key in sorted(found, reverse=True)[:20]
            if each > 0.0
        ]
        machine.clear()
    return tables
