"""Every kernel compiles ahead of time, as it is launched, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "benchmarks" / "compile_kernels.py"


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_every_kernel_compiles_and_fits(target, tmp_path):
    """In a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--targets", target, "--json", str(tmp_path / "table.json")]
    if target != "90":
        command += ["--steps", "decode 1", "mixed 2048"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((tmp_path / "table.json").read_text())
    kernels = {row["kernel"] for row in table}
    assert kernels == {
        "embed", "norm", "linear", "rotate", "decode", "combine", "prefill", "dynamics", "route", "sort", "gate_up",
        "down", "draw", "logprobs", "penalties", "remember",
    }  # fmt: skip
