"""What gets installed, and how little of it an import loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_installed() -> None:
    floors = [path.parent for path in ROOT.glob("*/__init__.py")]
    folders = [path.parent for floor in floors for path in floor.rglob("__init__.py")]
    names = [".".join(("pyllm", *folder.relative_to(ROOT).parts)) for folder in [ROOT, *folders]]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(names)


def _program() -> set[str]:
    """Every module of the product, in every package."""
    folders = [folder for top in ("server", "engine", "model") for folder in (ROOT / top).rglob("__init__.py")]
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.parent.glob("*.py")}


def _static() -> set[str]:
    """What the server sends as it is."""
    folder = ROOT / "server" / "api" / "static"
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}


def _kernels() -> set[str]:
    """The C++ sources of the CPU's kernels."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "model" / "cpu" / "kernels").iterdir()}


def test_the_libraries_of_the_page_are_those_of_their_packages() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "vendor.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def _copy(target: Path) -> Path:
    """A clean copy of the tree."""
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist")
    return Path(shutil.copytree(ROOT, target, ignore=unwanted))


@pytest.fixture(scope="module", params=["with a compiler", "without a compiler"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a clean copy of the tree, without a network."""
    source, target = _copy(tmp_path_factory.mktemp("source") / "pyllm"), tmp_path_factory.mktemp("wheel")
    compiler = {"CC": "/bin/false", "CXX": "/bin/false"} if request.param == "without a compiler" else {}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, check=False,
        env=os.environ | compiler,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_program_and_the_demo_model(wheel: list[str]) -> None:
    assert {f"pyllm/{name}" for name in _program() | {"__init__.py", "__main__.py", "py.typed"}} <= set(wheel)
    assert {f"pyllm/{name}" for name in _static()} <= set(wheel)
    licences = {f"licenses/{name}" for name in _static() | {"LICENSE"} if name.endswith("LICENSE")}
    assert licences <= {name.partition(".dist-info/")[2] for name in wheel}
    demo = {name.removeprefix("pyllm/model/demo/") for name in wheel if name.startswith("pyllm/model/demo/")}
    assert demo == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pyllm"}
    folders = {name.split("/")[1] for name in wheel if name.startswith("pyllm/") and name.count("/") > 1}
    assert folders == {"server", "engine", "model"}
    assert not [name for name in wheel if "/train" in name or "corpus" in name]
    assert len([name for name in wheel if name.endswith(".so")]) <= 1  # the kernels, where they could be compiled


def test_the_source_archive_holds_all_that_the_wheel_is_made_of(tmp_path: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    source = _copy(tmp_path / "pyllm")
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.glob("dist/*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    rest = {"LICENSE", "README.md", "pyproject.toml", "py.typed", "model/demo/model.safetensors"}
    assert _program() | _static() | _kernels() | rest <= names


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pyllm", ("torch", "fastapi", "uvicorn", "huggingface_hub", "safetensors")),
        ("pyllm.server.cli.main", ("torch", "fastapi", "uvicorn", "tokenizers")),
        ("pyllm.server.app", ("torch", "huggingface_hub")),
        ("pyllm.server.serve", ("torch", "huggingface_hub")),
        ("pyllm.engine.client.async_engine", ("torch", "fastapi")),
    ],
)
def test_an_import_stays_light(module: str, absent: tuple[str, ...]) -> None:
    program = f"import {module}, sys; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == ""
