"""What gets installed, and how little of it an import loads."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess

from pyllm.model.cpu.library import SETS, file_of, find_obstacle

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


def _build_wheel(source: Path, target: Path, **variables: str) -> Path:
    """Build a wheel without a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, check=False,
        env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a clean copy of the tree."""
    source = _copy(tmp_path_factory.mktemp("source") / "pyllm")
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.glob("dist/*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheels(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of the tree, made with a compiler, and one of the source archive, made without."""
    folder = tmp_path_factory.mktemp("wheels")
    source = _copy(folder / "pyllm")
    project = source / "pyproject.toml"  # optimising the kernels would take three times as long
    project.write_text(project.read_text(encoding="utf-8").replace('"-O3"', '"-O0"'), encoding="utf-8")
    return {
        "tree": _build_wheel(source, folder / "tree"),
        "archive": _build_wheel(archive, folder / "archive", CC="/bin/false", CXX="/bin/false"),
    }


@pytest.fixture(params=["tree", "archive"])
def wheel(request: pytest.FixtureRequest, wheels: dict[str, Path]) -> list[str]:
    """The names in a wheel."""
    with zipfile.ZipFile(wheels[request.param]) as file:
        return file.namelist()


def test_a_wheel_is_for_every_version_of_python_from_the_first(wheels: dict[str, Path]) -> None:
    assert {path.name.split("-")[2:4] == ["cp311", "abi3"] for path in wheels.values()} == {True}
    assert PROJECT["project"]["requires-python"] == ">=3.11"


@pytest.mark.needs("g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
@pytest.mark.parametrize("name", SETS)
def test_the_wheel_has_the_compiled_kernels(name: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels["tree"]) as file:
        path = file.extract(f"pyllm/model/cpu/{file_of(name).name}", tmp_path)
    assert find_obstacle(name).startswith("this processor") or ctypes.CDLL(path).pyllm_layout() > 0
    symbols = Path(path).read_bytes()
    assert b"PyModule" not in symbols  # nothing of one version of Python
    assert b"_Py_" not in symbols


@pytest.mark.needs("g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
def test_a_library_has_no_instruction_of_a_larger_set(wheels: dict[str, Path], tmp_path: Path) -> None:
    """It would be an illegal one there, and only in the function that has it."""

    def larger(name: str) -> list[str]:
        with zipfile.ZipFile(wheels["tree"]) as file:
            path = file.extract(f"pyllm/model/cpu/{file_of(name).name}", tmp_path)
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        return re.findall(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b", code)

    assert larger("avx2") == []
    assert larger("avx512_bf16")


def test_the_source_archive_makes_the_same_wheel(wheels: dict[str, Path]) -> None:
    def contents(path: Path) -> dict[str, int]:
        with zipfile.ZipFile(path) as file:
            return {
                item.filename: item.CRC for item in file.infolist() if not item.filename.endswith((".so", "RECORD"))
            }

    assert contents(wheels["tree"]) == contents(wheels["archive"])


def test_the_wheel_serves_its_model_and_its_pages(wheels: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels["tree"]) as file:
        file.extractall(tmp_path / "site")
    body = {"messages": [{"role": "user", "content": "What is the capital of Italy?"}], "temperature": 0}
    with ServerProcess(tmp_path / "log", cold=True, PYTHONPATH=str(tmp_path / "site")) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
        assert "Rome" in answer["choices"][0]["message"]["content"]
        page = httpx.get(server.url).raise_for_status().text
        for path in ["docs", *re.findall(r'(?:src|href)="(static/[^"]+)"', page)]:
            assert httpx.get(f"{server.url}/{path}").status_code == 200, path


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
    assert len([name for name in wheel if name.endswith(".so")]) <= len(SETS)  # those that could be compiled


def test_the_source_archive_holds_all_that_the_wheel_is_made_of(archive: Path) -> None:
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    rest = {"LICENSE", "README.md", "pyproject.toml", "py.typed", "model/demo/model.safetensors"}
    assert _program() | _static() | _kernels() | rest <= names


@pytest.mark.slow
@pytest.mark.needs("g++")
@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux")
def test_make_dist_makes_a_wheel_that_package_indexes_take(tmp_path: Path) -> None:
    copy = _copy(tmp_path / "pyllm")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    done = subprocess.run(
        ["make", "dist", f"TOOLS={tmp_path / 'tools'}"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (copy / "dist").iterdir())
    assert len(names) == 2
    assert re.fullmatch(r"pyllm_deep-[\d.]+-cp311-abi3-manylinux_2_\d\d_\w+\.whl", names[0])
    assert re.fullmatch(r"pyllm_deep-[\d.]+\.tar\.gz", names[1])
    with zipfile.ZipFile(copy / "dist" / names[0]) as file:
        assert {f"pyllm/model/cpu/{file_of(name).name}" for name in SETS} <= set(file.namelist())


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
