"""Which block shapes are fastest on this GPU: every operation of a layer under many of them.

    python benchmarks/gpu/gpu_tune.py              # all cases; OUT or --json names where the JSON goes
    python benchmarks/gpu/gpu_tune.py --only decode --dry-run

Each operation runs through all layers of the 1.5B shape, so that no weight is in the cache when it is read, as a CUDA
graph. What is shipped (model/cuda/blocks.py) stands first, then the fastest. Kernels are compiled by many processes
beforehand; a shape that a GPU has no room for is left out. Microseconds are for one layer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `pyllm` need not be installed
from benchmarks.gpu.gpu_check import SETUP_HELP, prepare

Blocks = Any
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size: how it is called on a model, what its shapes may be, and how much it must read."""

    name: str
    method: str
    make: Callable[[Any], Work]
    candidates: tuple[Blocks, ...]
    bytes: float = 0.0


def grid(**choices: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Every combination."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def linear_shapes(tokens: int, kind: str) -> tuple[Blocks, ...]:
    """For products of few tokens, and for the velocity's, of any."""
    rows = (16 if tokens <= 16 else 32,)
    if kind == "velocity" and tokens > 1024:
        shapes = grid(BLOCK_M=(64, 128), BLOCK_N=(64,), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(3, 4))
    elif kind == "velocity":
        shapes = grid(BLOCK_M=(16, 32), BLOCK_N=(16, 32, 64), BLOCK_K=(128, 256), num_warps=(4,), num_stages=(3, 4))
    elif kind == "lm_head":
        shapes = grid(BLOCK_M=rows, BLOCK_N=(64, 128), BLOCK_K=(128,), num_warps=(2, 4), num_stages=(3,))
    else:
        inner = (128, 256) if kind == "dynamics_in" else (256, 512)
        shapes = grid(BLOCK_M=rows, BLOCK_N=(16, 32), BLOCK_K=inner, num_warps=(2, 4), num_stages=(3, 5))
    return tuple(
        shape
        for shape in shapes
        if (shape["BLOCK_N"] + 2 * shape["BLOCK_M"]) * shape["BLOCK_K"] * 2 * (shape["num_stages"] - 1) <= 210 << 10
    )


def gemv_shapes(inner: int) -> tuple[Blocks, ...]:
    """For products of single tokens."""
    shapes = grid(BLOCK_N=(2, 4, 8, 16), BLOCK_K=(inner,), num_warps=(2, 4, 8))
    return tuple(shape for shape in shapes if 32 <= shape["BLOCK_N"] * inner // 32 // shape["num_warps"] <= 256)


def expert_shapes(tokens: int) -> tuple[Blocks, ...]:
    """For the experts' products; columns of gate, of down."""
    if tokens <= 64:
        rows: tuple[int, ...] = (max(16, 1 << (tokens - 1).bit_length()),)
        shapes = grid(N=(16, 32), BLOCK_M=rows, BLOCK_K=(128, 256), num_warps=(2, 4), num_stages=(3, 5))
    elif tokens <= 512:
        shapes = grid(N=(32, 64), BLOCK_M=(32, 64, 128), BLOCK_K=(128,), num_warps=(4, 8), num_stages=(3, 4))
    else:
        shapes = grid(N=(64, 128), BLOCK_M=(64, 128), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(3, 4))
    found = []
    for shape in shapes:
        columns = shape.pop("N")
        size = (2 * columns + shape["BLOCK_M"]) * shape["BLOCK_K"] * 2 * (shape["num_stages"] - 1)
        if size <= 200 << 10 and (tokens > 64 or size >= 12 << 10):
            found.append((columns, columns, shape))
            if tokens > 512 and columns == 64:
                found.append((64, 128, shape))
    return tuple(found)


def cases() -> Iterator[Case]:
    """All of them, on the 1.5B shape."""
    import torch
    import torch.nn.functional as F

    from pyllm.benchmarks.gpu.gpu_kernels import PAGE
    from pyllm.model.backend import AttentionMetadata
    from pyllm.model.fp8 import FP8

    def inputs(model: Any, *shape: int, dtype: Any = torch.float32) -> Any:
        generator = torch.Generator(model.device).manual_seed(3)
        return torch.randn(shape, generator=generator, device=model.device).to(dtype)

    def linear(model: Any, tokens: int, kind: str) -> Work:
        ops, size = model.ops, model.config.hidden_size
        x, mu = inputs(model, tokens, size), inputs(model, tokens, size, dtype=model.dtype)
        both = inputs(model, tokens, 2 * size, dtype=model.dtype)

        def work() -> None:
            for layer in model.layers:
                if kind == "kqv" and layer.index:
                    ops._small(both, layer.kqv_proj)
                elif kind == "o":
                    ops._small(mu, layer.o_proj)
                elif kind == "dynamics_in":
                    ops._small(x, layer.dynamics_in, (x, layer.controller_v))
                elif kind == "velocity":
                    ops._small(x, layer.controller_v)
                elif kind == "lm_head":
                    ops._small(x, model.lm_head)
                elif kind == "kqv in cuBLAS" and layer.index:
                    F.linear(both, layer.kqv_proj)

        return work

    def experts(model: Any, tokens: int) -> Work:
        x, mu = inputs(model, tokens, model.config.hidden_size), inputs(model, tokens, model.config.hidden_size)
        ids = (torch.arange(tokens, device=model.device) * 7919 + 11) % model.config.vocab_size

        def work() -> None:
            for layer in model.layers:
                model.ops.routed_mlp(layer, x, ids, mu)

        return work

    def attention(model: Any, new: int, sequences: int, context: int, kept: torch.dtype | None = None) -> Work:
        config, device = model.config, model.device
        pages = -(-context // PAGE)
        cache = model.new_kv_cache(sequences * pages, PAGE, kept)
        order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        tables = order.view(sequences, pages).to(device)
        at = torch.arange(context - new, context, device=device)
        slots = torch.cat([tables[n][at // PAGE].long() * PAGE + at % PAGE for n in range(sequences)])
        metadata = AttentionMetadata(
            query_lens=[new] * sequences, seq_lens=[context] * sequences, num_decodes=sequences * (new == 1),
            slot_mapping=slots, block_tables=tables,
            seq_lens_device=torch.full((sequences,), context, dtype=torch.int32, device=device),
            query_starts=torch.arange(sequences + 1, dtype=torch.int32, device=device) * new,
        )  # fmt: skip
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        kqv = inputs(model, sequences * new, width, dtype=torch.float32 if new == 1 else model.dtype)
        angles = at.repeat(sequences)[:, None].float() * model.inv_freq
        rope = angles.cos(), angles.sin()

        def work() -> None:
            step = model.ops._prepared(metadata, device)
            for layer in model.layers:
                model.ops._paged(layer, kqv, rope, cache[layer.index], step, metadata.num_decodes)

        return work

    def dynamics(model: Any, tokens: int) -> Work:
        size = model.config.hidden_size
        x, h, velocity = (inputs(model, tokens, size) for _ in range(3))

        def work() -> None:
            model.ops._above = None
            for layer in model.layers:
                model.ops.dynamics(layer, x, h, velocity)

        return work

    products = {"kqv": (4096, 4096), "o": (2048, 2048), "dynamics_in": (2176, 2048), "lm_head": (32000, 2048)}
    for tokens, (kind, shape) in itertools.product((1, 4, 8, 32), products.items()):
        make, size = partial(linear, tokens=tokens, kind=kind), 2.0 * shape[0] * shape[1]
        if tokens <= 4 and kind != "lm_head":
            yield Case(f"gemv {kind} {tokens}", "gemv", make, gemv_shapes(4096 if kind == "kqv" else 2048), size)
        else:
            yield Case(f"linear {kind} {tokens}", "linear", make, linear_shapes(tokens, kind), size)
    for tokens in (256, 8192):
        make = partial(linear, tokens=tokens, kind="velocity")
        yield Case(f"linear velocity {tokens}", "linear", make, linear_shapes(tokens, "velocity"))
    for tokens in (1, 8, 32, 64):
        yield Case(f"cuBLAS kqv {tokens}", "", partial(linear, tokens=tokens, kind="kqv in cuBLAS"), (), 2.0 * 4096**2)
    for tokens in (1, 4, 8, 32, 48, 64, 256, 512, 2048, 8192):
        size = 4 * (1 - 0.75**tokens) * 3 * 2048 * 1408 * 2
        make = partial(experts, tokens=tokens)
        if tokens <= 4:
            yield Case(f"gemv experts {tokens}", "gemv", make, gemv_shapes(2048), size)
        else:
            yield Case(f"experts {tokens}", "experts", make, expert_shapes(tokens), size)
    shapes = tuple(grid(BLOCK_N=(32, 64, 128), num_warps=(2, 4, 8), num_stages=(2, 3, 5)))
    for batch, context in ((1, 512), (8, 512), (32, 512), (48, 512), (256, 512), (1, 2048), (256, 2048)):
        for kept in (torch.bfloat16, FP8):
            how = {"new": 1, "sequences": batch, "context": context, "kept": kept}
            size = 2.0 * batch * context * 8 * 128 * kept.itemsize
            name = f"decode {batch} x {context} {str(kept)[6:]}"
            yield Case(name, "decode", partial(attention, **how), shapes, size)
    prompts = tuple(grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)))
    for sequences, length in ((1, 512), (1, 2048), (8, 1024)):
        make = partial(attention, new=length, sequences=sequences, context=length)
        yield Case(f"prompt {sequences} x {length}", "prompt", make, prompts)
    moves = tuple(grid(BLOCK_M=(16, 32, 64), BLOCK_N=(16, 32, 64), num_warps=(4, 8)))
    for tokens in (1, 256, 512, 8192):
        yield Case(f"dynamics {tokens}", "dynamics", partial(dynamics, tokens=tokens), moves)


def _forced(ops: Any, method: str, blocks: Blocks | None) -> None:
    """Let a method of the shapes in use say `blocks` whatever it is asked; None is what is shipped."""
    if blocks is None:
        vars(ops._blocks).pop(method, None)
    else:
        setattr(ops._blocks, method, lambda *_: blocks)


def main() -> int:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of cases' names")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--no-compile", action="store_true", help="all kernels are compiled already")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--setup", type=Path, help=SETUP_HELP)
    args = parser.parse_args()
    prepare(args.dry_run, args.setup)
    import torch

    from pyllm.benchmarks.gpu.gpu_measure import Machine

    machine = Machine(args.dry_run, has_triton=True)
    config = machine.shape("1.5b")
    if args.compile or args.dry_run:
        config = replace(config, num_hidden_layers=2)
    chosen = [case for case in cases() if not args.only or case.name.startswith(tuple(args.only))]
    if args.dry_run:
        chosen = [replace(case, candidates=case.candidates[:1]) for case in chosen if case.name.endswith((" 1", " 8"))]
    if args.compile:
        mine, every = map(int, args.compile.split("/"))
        model = machine.model(config)
        # Long contexts need much memory and no other kernels.
        jobs = [(case, blocks) for case in chosen if " 2048" not in case.name for blocks in (None, *case.candidates)]
        with torch.inference_mode():
            for case, blocks in jobs[mine::every]:
                _forced(model.ops, case.method, blocks)
                with contextlib.suppress(Exception):  # the measuring run tells
                    case.make(model)()
                    torch.cuda.synchronize()
                _forced(model.ops, case.method, None)
        return 0
    if not args.no_compile and not args.dry_run:
        command = [sys.executable, *sys.argv, "--compile"]
        running = [subprocess.Popen([*command, f"{n}/{args.jobs}"]) for n in range(args.jobs)]
        for process in running:
            process.wait()
    model, found = machine.model(config), []
    for case in chosen:
        rows = []
        with torch.inference_mode():
            work = case.make(model)
            for blocks in (None, *case.candidates):
                _forced(model.ops, case.method, blocks)
                try:
                    seconds = machine.seconds(machine.captured(work), 3, 3) / config.num_hidden_layers
                except Exception as error:
                    rows.append({"blocks": blocks, "us": float("inf"), "error": str(error)[:80]})
                else:
                    rows.append({"blocks": blocks, "us": 1e6 * seconds, "GB/s": case.bytes / seconds / 1e9})
                _forced(model.ops, case.method, None)
        shipped, *others = rows
        others.sort(key=lambda row: row["us"])
        found.append({"case": case.name, "shipped": shipped, "others": others})
        for row in (shipped, *others[:3]):
            print(f"{case.name:24} {row['us']:8.2f} us {row.get('GB/s', 0.0):7.0f} GB/s  {row['blocks']}", flush=True)
        machine.clear()
    folder = os.environ.get("OUT")
    path = args.json or (Path(folder) / "gpu_tune.json" if folder else None)
    if path is not None:
        path.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
