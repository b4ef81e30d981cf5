"""The program that a machine with a GPU is to run, tried to its end without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu" / "gpu_check.py"
INTERPRETER = ROOT / "tests" / "support" / "triton_interpreter.py"
PARTS = [
    "kernels",
    "ceilings",
    "greedy",
    "decode",
    "flashinfer",
    "prefill",
    "tr-hash, exactness",
    "tr-hash",
    "deterministic",
    "engine",
    "profile of a decode step of 1",
    "serving",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_check_dry_run_finds_nothing_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--dry-run", "--setup", str(INTERPRETER)],
        env=os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["wrong"] == []
    assert all(found[part] for part in PARTS)
    assert all(row["ok"] for row in [*found["kernels"], *found["tr-hash, exactness"]])
    assert found["machine"]["dry_run"]


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(PROGRAM)], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "There is no CUDA device that torch can use" in done.stdout
