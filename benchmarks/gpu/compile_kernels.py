"""Compile every Triton kernel as it will be launched, for GPUs that need not be here, and show what each costs.

    python benchmarks/gpu/compile_kernels.py [--targets 80 90 100] [--shapes 1.5b 150m] [--dtypes bfloat16]
    python benchmarks/gpu/compile_kernels.py --deterministic
    python benchmarks/gpu/compile_kernels.py --kv-cache-dtype fp8 --kernels rotate decode prefill --targets 89 90

The network runs on tensors without memory ("meta"), and each launch is compiled instead of made, so what is compiled is
what is shipped. Registers and spills are per thread, shared memory per program in KiB. Exits with 1 if a kernel spills
more than `MAX_SPILL` bytes or needs more shared memory than its GPU has, or if a deterministic step needs one that the
first step did not: then an operation is not the same program for any number of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.model import AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.cuda import sampling as triton_sampling
from pyllm.model.cuda.backend import TritonBackend
from pyllm.model.draw_params import DrawParams
from pyllm.model.fp8 import FP8
from pyllm.model.sampling import SamplingBatch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may have, by GPU generation."""
MAX_SPILL = 32
WANTED_SHAPES = SHAPES | {
    "350m": DeepConfig(
        vocab_size=32000, hidden_size=1280, intermediate_size=3456, num_attention_heads=16, num_key_value_heads=4
    ),
    "20m": DeepConfig(
        vocab_size=32000, hidden_size=320, intermediate_size=896, num_attention_heads=8, num_key_value_heads=4
    ),
    "medium": DeepConfig(
        vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4
    ),
}
STEPS = {
    "decode 1": [1],
    "decode 8": [1] * 8,
    "decode 24": [1] * 24,
    "decode 48": [1] * 48,
    "decode 256": [1] * 256,
    "prefill 512": [512],
    "mixed 2048": [1] * 64 + [1984],
}
PAGE = 16


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one GPU generation: who needs it first, its constants, and what it takes."""

    kernel: str
    target: int
    first_used: str
    constants: str
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: float

    @property
    def fits(self) -> bool:
        """Whether it can be launched, and does not live in spilled registers."""
        return self.shared <= SHARED_LIMIT[self.target] and self.spilled <= MAX_SPILL


class _Device:
    """Replaces the driver of a GPU that is not installed."""

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches_compile(
    target: int, found: dict[str, tuple[JITFunction[Any], Any, str]], user: list[str], kernels: list[str]
) -> Iterator[None]:
    """Within it, a launch compiles and notes the kernel by its hash, with who needed it; of all kernels or of some."""
    plain = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(number > 0 for number in grid), f"{self.__name__}: empty grid {grid}"
        if kernels and _name(self) not in kernels:
            return
        kernel = plain(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, (self, kernel, user[0]))

    driver.set_active(_Device(target))  # type: ignore[arg-type]
    with patch.object(JITFunction, "run", compile_only):
        yield


def _name(function: JITFunction[Any]) -> str:
    return str(function.__name__).removesuffix("_kernel")


def compile_all(
    target: int, shapes: list[str], dtypes: list[str], steps: list[str], kernels: list[str], kept: torch.dtype | None,
    deterministic: bool,
) -> list[Compiled]:  # fmt: skip
    """Every kernel that these networks launch in these steps, compiled for one GPU generation."""
    found: dict[str, tuple[JITFunction[Any], Any, str]] = {}
    user = [""]
    with launches_compile(target, found, user, kernels), torch.inference_mode():
        for shape in shapes:
            for dtype in dtypes:
                config = replace(WANTED_SHAPES[shape], num_hidden_layers=2)
                model = DeepForCausalLM(config, dtype=getattr(torch, dtype), device="meta")
                model.ops = TritonBackend(model, target // 10, deterministic=deterministic)
                for step in steps:
                    user[0] = f"{shape} {'fp32 ' if dtype == 'float32' else ''}{step}"
                    _step(model, STEPS[step], kept)
                user[0] = shape
                _sample(config.vocab_size)
    return [_described(function, kernel, target, who) for function, kernel, who in found.values()]


def _step(model: DeepForCausalLM, lengths: list[int], kept: torch.dtype | None) -> None:
    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = sum(lengths)
    metadata = AttentionMetadata(
        query_lens=lengths, seq_lens=lengths, num_decodes=lengths.count(1), block_tables=ints(len(lengths), 128),
        slot_mapping=ints(tokens, dtype=torch.int64), seq_lens_device=ints(len(lengths)),
        query_starts=ints(len(lengths) + 1),
    )  # fmt: skip
    ids = ints(tokens, dtype=torch.int64)
    model.logits(model(ids, ids, metadata, model.new_kv_cache(256, PAGE, kept))[: len(lengths)])


def _sample(vocab: int) -> None:
    rows = 4
    params = DrawParams(top_k=5, top_p=0.9, min_p=0.1, seed=1)
    batch = SamplingBatch.build([params] * rows, [1] * rows, torch.device("meta"))
    logits = torch.empty(rows, vocab, device="meta")
    triton_sampling.draw(logits, batch)
    triton_sampling.draw(logits, replace(batch, top_k=None, top_p=None, min_p=None))
    triton_sampling.logprobs(logits, batch.seed, 5)


def _described(function: JITFunction[Any], kernel: Any, target: int, who: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names = [parameter.name for parameter in function.params]
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if names[path[0]].isupper()}
    metadata = kernel.metadata
    return Compiled(
        kernel=_name(function), target=target, first_used=who,
        constants=" ".join(f"{name}={value}" for name, value in constants.items()), num_warps=metadata.num_warps,
        num_stages=metadata.num_stages, registers=numbers["REG"], spilled=max(numbers["STACK"], numbers["LOCAL"]),
        shared=round(metadata.shared / 1024, 1),
    )  # fmt: skip


def main() -> int:
    """Print the table; 1 if a kernel does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_LIMIT)
    parser.add_argument("--shapes", nargs="+", default=["1.5b"], choices=WANTED_SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--deterministic", action="store_true", help="the kernels of that mode")
    parser.add_argument("--kernels", nargs="+", default=[], help="only these, such as decode")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    table: list[Compiled] = []
    for target in options.targets:
        kept = FP8 if options.kv_cache_dtype == "fp8" else None
        table += compile_all(
            target, options.shapes, options.dtypes, options.steps, options.kernels, kept, options.deterministic
        )
    later = tuple(options.steps[1:]) if options.deterministic else ()
    late = [row for row in table if row.first_used.endswith(later)]
    for row in table:
        mark = "  <-- does not fit" if not row.fits else "  <-- not the first step's" if row in late else ""
        print(
            f"sm_{row.target} {row.kernel:10} {row.first_used:18} warps {row.num_warps} stages {row.num_stages} "
            f"regs {row.registers:3} spilled {row.spilled:4} shared {row.shared:6}  {row.constants}{mark}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in table], indent=1))
    return int(bool(late) or not all(row.fits for row in table))


if __name__ == "__main__":
    sys.exit(main())
