"""Tests that need a program: skipped without it, or failed if all programs are required."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.components import COMPONENTS, OPTION

ROOT = Path(__file__).resolve().parents[1]


def run_without_programs(folder: Path, *words: str) -> tuple[int, str]:
    """Run the tests that need a program, with an empty `PATH`."""
    command = [sys.executable, "-m", "pytest", "-m", "needs", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_without_programs_their_tests_fail_if_required(tmp_path: Path) -> None:
    code, text = run_without_programs(tmp_path, "tests", OPTION)
    assert code == 1
    assert re.search(r"^\d+ deselected, \d+ errors in", text, re.MULTILINE), text[-2000:]
    for name in COMPONENTS:
        assert re.search(rf"^\| {re.escape(name)} \| missing \| 0 \| [1-9]\d* \|$", text, re.MULTILINE), text[-2000:]


def test_without_programs_their_tests_are_skipped(tmp_path: Path) -> None:
    code, text = run_without_programs(tmp_path, "tests/test_monitoring.py")
    assert code == 0
    assert re.search(r"^\d+ skipped, \d+ deselected in", text, re.MULTILINE), text[-2000:]


def test_no_test_looks_for_programs_by_itself() -> None:
    own = {"components.py", "client_environments.py", "test_clients.py", Path(__file__).name}
    others = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in own]
    assert [path.name for path in others if "shutil.which" in path.read_text(encoding="utf-8")] == []
