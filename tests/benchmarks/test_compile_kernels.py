"""Every kernel compiles ahead of time, as it is launched, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "compile_kernels.py"


def kernels_of(tmp_path: Path, *options: str) -> set[str]:
    """What the tool compiled, in a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), *options, "--json", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((tmp_path / "table.json").read_text())
    return {row["kernel"] for row in table}


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_every_kernel_compiles_and_fits(target, tmp_path):
    steps = [] if target == "90" else ["--steps", "decode 1", "mixed 2048"]
    assert kernels_of(tmp_path, "--targets", target, *steps) == {
        "embed", "norm", "linear", "rotate", "decode", "combine", "prefill", "dynamics", "route", "sort", "gate_up",
        "down", "draw", "logprobs",
    }  # fmt: skip


@pytest.mark.parametrize("target", ["80", "90"])
def test_deterministic_steps_share_compiled_kernels(target, tmp_path):
    kernels = kernels_of(
        tmp_path, "--targets", target, "--deterministic", "--steps", "decode 1", "decode 48", "mixed 2048"
    )
    assert not kernels & {"decode", "combine"}, "decodes are computed as prompts of one token"


def test_fp8_attention_compiles_where_fp8_exists(tmp_path):
    attention = {"rotate", "decode", "combine", "prefill"}
    options = ["--targets", "89", "90", "100", "120", "--kv-cache-dtype", "fp8", "--kernels", *attention]
    assert kernels_of(tmp_path, *options) == attention
