"""The linters that hold the structure: each contract and each rule fails where something breaks it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
PLANTED = {
    "floors: server > engine > model": ("model/parameters.py", "from ..engine import messages"),
    "packages of server": ("server/generation/generation.py", "from ..chat import turn"),
    "packages of engine": ("engine/step/scheduler.py", "from ..runner import model_runner"),
    "packages of model": ("model/network.py", "from .cpu import backend"),
    "endpoints are independent": ("server/api/completions.py", "from . import tokenize"),
    "no torch in server and engine client": ("engine/client/watchdog.py", "import torch"),
    "ray in replicas only": ("server/http/budget.py", "import ray"),
    "no circles": ("server/http/budget.py", "from . import middleware"),
}
"""For each contract, a file and an import that breaks it."""
_spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
assert _spec is not None
assert _spec.loader is not None
house = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(house)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product that import-linter takes for the package."""
    root = tmp_path_factory.mktemp("house") / "pyllm"
    for name in ("server", "engine", "model"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "demo", "static")
        )
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


def _lint(tree: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--config", str(tree / "pyproject.toml")]
    return subprocess.run(
        command, cwd=tree.parent, env={"PYTHONPATH": str(tree.parent)}, capture_output=True, text=True
    )


def test_every_contract_has_a_planted_import(tree: Path) -> None:
    assert {contract["name"] for contract in CONTRACTS} == set(PLANTED)
    done = _lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("typed", [False, True], ids=["run time", "TYPE_CHECKING"])
@pytest.mark.parametrize("name", PLANTED)
def test_contract_fails_on_its_planted_import(tree: Path, name: str, typed: bool) -> None:
    file, line = PLANTED[name]
    path = tree / file
    source = path.read_text(encoding="utf-8")
    planted = f"\n\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n" if typed else f"\n\n{line}\n"
    path.write_text(source + planted, encoding="utf-8")
    try:
        done = _lint(tree)
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{name} BROKEN" in done.stdout


def _complaints(name: str, text: str) -> Iterator[str]:
    yield from house.check_sizes(name, text)
    yield from house.check_words(name, text)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("server/a.py", "x = 1\n" * 401, "401 lines, at most 400"),
        ("server/a.py", "def f():\n" + "    x = 1\n" * 50, "f has 51 lines, at most 50"),
        ("tests/test_a.py", f"def test_{'a' * 56}(): ...\n", "61 characters, at most 60"),
        ("docs/a.md", "Who" + "ever asks", "better"),
        ("tests/test_a.py", "def test_no" + "body_waits(): ...\n", "better"),
    ],
)
def test_broken_rule_is_reported(name: str, text: str, complaint: str) -> None:
    (found,) = _complaints(name, text)
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("server/a.py", '"""One table.\n\n# long: one table reads better whole.\n"""\n' + "x = 1\n" * 400),
        ("server/a.py", "# long: one case a line\ndef f():\n" + "    x = 1\n" * 50),
        ("tests/test_a.py", f"def test_{'a' * 55}(): ...\n"),
        ("docs/a.md", "The request depends on its prefix; retold, besides, amended."),
    ],
)
def test_kept_rule_is_not_reported(name: str, text: str) -> None:
    assert list(_complaints(name, text)) == []


def test_crowded_folders_are_reported() -> None:
    names = [f"server/m{n}.py" for n in range(9)] + [f"model/cpu/m{n}.py" for n in range(14)] + ["server/__init__.py"]
    assert list(house.check_folders(names)) == ["server: 9 modules, at most 8"]
