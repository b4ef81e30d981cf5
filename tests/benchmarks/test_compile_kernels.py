"""Every kernel compiles ahead of time, as it is launched, for GPUs that are not here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "compile_kernels.py"


@functools.cache
def compiled(*options: str) -> dict[int, set[str]]:
    """The kernels by target that the tool compiled, in a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        command = [sys.executable, str(TOOL), *options, "--json", str(table)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        kernels: dict[int, set[str]] = {}
        for row in json.loads(table.read_text()):
            kernels.setdefault(row["target"], set()).add(row["kernel"])
    return kernels


@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_kernel_compiles_and_fits(target: int) -> None:
    some = ("--targets", "80", "100", "--steps", "decode 1", "mixed 2048")
    assert compiled(*(("--targets", "90") if target == 90 else some))[target] == {
        "embed", "norm", "linear", "rotate", "decode", "combine", "prefill", "dynamics", "route", "sort", "gate_up",
        "down", "draw", "logprobs",
    }  # fmt: skip


@pytest.mark.parametrize("target", [80, 90])
def test_deterministic_steps_share_compiled_kernels(target: int) -> None:
    steps = ("--steps", "decode 1", "decode 48", "mixed 2048")
    kernels = compiled("--targets", "80", "90", "--deterministic", *steps)[target]
    assert not kernels & {"decode", "combine"}, "decodes are computed as prompts of one token"


def test_fp8_attention_compiles_where_fp8_exists() -> None:
    attention = {"rotate", "decode", "combine", "prefill"}
    options = ("--targets", "89", "90", "100", "120", "--kv-cache-dtype", "fp8", "--kernels", *sorted(attention))
    assert compiled(*options) == dict.fromkeys([89, 90, 100, 120], attention)
