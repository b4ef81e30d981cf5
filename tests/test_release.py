"""What a release is checked for, and the workflow that makes one."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yaml"
JOBS = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
_spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
assert _spec is not None
assert _spec.loader is not None
release = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(release)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree and the built files of version 1.2.3."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-12-01\n")
    overlay = tmp_path / "docker" / "kubernetes" / "overlays" / "cpu" / "kustomization.yaml"
    overlay.parent.mkdir(parents=True)
    overlay.write_text("images:\n  - {name: pyllm, newTag: 1.2.3-cpu}\n")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "pyllm_deep-1.2.3.tar.gz").touch()
    with zipfile.ZipFile(tmp_path / "dist" / "pyllm_deep-1.2.3-cp311-abi3-manylinux_2_34_x86_64.whl", "w") as file:
        for name in release.KERNELS:
            file.writestr(name, b"")
    return tmp_path


def problems(tree: Path, tag: str = "v1.2.3") -> str:
    return "\n".join(release.problems(tree, tag, tree / "dist"))


def test_a_release_that_fits_its_tag_has_no_problems(tree: Path) -> None:
    assert problems(tree) == ""


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.4", "release"])
def test_a_tag_of_another_version_is_refused(tree: Path, tag: str) -> None:
    assert f"The tag is {tag}, but pyproject.toml has the version 1.2.3: v1.2.3 is expected." in problems(tree, tag)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n", "CHANGELOG.md has no section [1.2.3]"),
        ("docker/kubernetes/overlays/cpu/kustomization.yaml", "newTag: 1.2.2-cpu", "names the image of version 1.2.2."),
        ("dist/pyllm_deep-1.2.2.tar.gz", "", "should hold one source archive and one wheel of version 1.2.3"),
    ],
)
def test_a_file_that_does_not_fit_is_reported(tree: Path, name: str, text: str, problem: str) -> None:
    (tree / name).write_text(text)
    assert problem in problems(tree)


@pytest.mark.parametrize("name", ["cp311-abi3-linux_x86_64", "cp311-cp311-manylinux_2_34_x86_64", "py3-none-any"])
def test_a_wheel_of_a_wrong_name_or_without_all_kernels(tree: Path, name: str) -> None:
    (path,) = tree.glob("dist/*.whl")
    path.unlink()
    with zipfile.ZipFile(tree / "dist" / f"pyllm_deep-1.2.3-{name}.whl", "w") as file:
        file.writestr(min(release.KERNELS), b"")
    found = problems(tree)
    assert "is not named as a package index takes it" in found
    assert "lacks compiled kernels" in found


def test_the_steps_of_the_workflow_are_commands_that_exist() -> None:
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    assert len(commands) > 5
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        words = shlex.split(command.replace("<<<", " "))
        words = words[1:] if "=" in words[0] else words
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[0] == "python3":
            assert (ROOT / words[1]).is_file(), command
            done = subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, capture_output=True, text=True)
            assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", done.stdout))
        else:
            assert words[0] == "docker" or (ROOT / words[0]).is_file(), command


def test_nothing_is_uploaded_before_the_checks() -> None:
    assert JOBS["packages"]["needs"] == JOBS["images"]["needs"] == "check"
    assert JOBS["publish"]["needs"] == ["packages", "images"]
    for job in JOBS.values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert step.get("uses", "actions/").startswith("actions/"), "only the forge's own"


def lint(text: str) -> str:
    done = subprocess.run(["actionlint", "-no-color", "-"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == bool(done.stdout), done.stderr
    return done.stdout


@pytest.mark.needs("actionlint")
def test_actionlint_finds_nothing_in_the_workflow() -> None:
    assert lint(WORKFLOW.read_text(encoding="utf-8")) == ""


@pytest.mark.needs("actionlint")
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("matrix.target", "matrix.targets", "expression"),
        ("needs: check", "needs: checks", "job-needs"),
        ("runs-on: ubuntu-22.04", "runs-on: ubuntu-2204", "runner-label"),
        ("timeout-minutes", "timeout_minutes", "syntax-check"),
        ("path: dist, if-no", "folder: dist, if-no", "action"),
        ("contents: read", "contents: reading", "permissions"),
    ],
)
def test_actionlint_finds_a_planted_mistake(old: str, new: str, rule: str) -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    assert old in text
    assert f"[{rule}]" in lint(text.replace(old, new, 1))
