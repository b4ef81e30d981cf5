"""The lock files hold all that the product needs, and fit what is declared and what was tested."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-torch.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The image's users name a trace collector or a Redis, and expect their spans and stored responses there.
EXTRAS = [text for name in ("otel", "redis") for text in PROJECT["optional-dependencies"][name]]
DECLARED = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS]


def locked(*files: str) -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package, by its normal name."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    found = re.findall(r"^([\w.-]+)==([\w.+!]+)[^\n]*\n((?: +--hash=\S+[^\n]*\n)*)", text, re.MULTILINE)
    return {canonicalize_name(name): (version, re.findall(r"--hash=(\S+)", rest)) for name, version, rest in found}


def test_lock_lines_are_versions_hashes_or_comments() -> None:
    for name in LOCKS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for line in text.splitlines():
            assert re.fullmatch(
                r"[a-z0-9][\w.-]*==[\w.+]+( ; [^\\]+)? \\| +--hash=sha256:[0-9a-f]{64}( \\)?| *#.*", line
            ), line
        assert not re.search(r"://|--(extra-)?index|--find-links|file:|@ ", text)
    assert all(hashes for _, hashes in locked(*LOCKS).values())


def test_torch_and_its_libraries_have_their_own_lock() -> None:
    torch = set(locked("requirements-torch.lock"))
    assert "torch" in torch
    assert all(name.startswith(("cuda-", "nvidia-")) for name in torch - {"torch", "triton"})
    assert not torch & set(locked("requirements.lock"))


def test_what_is_declared_is_locked_in_an_allowed_version() -> None:
    versions = locked(*LOCKS)
    for requirement in DECLARED:
        assert versions[canonicalize_name(requirement.name)][0] in requirement.specifier


def test_what_the_dependencies_need_is_locked_too() -> None:
    versions, left = locked(*LOCKS), [(requirement, "") for requirement in DECLARED]
    seen = set()
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is needed, but not locked: run `make lock`"
        for chosen in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, chosen))
            with contextlib.suppress(PackageNotFoundError):  # what a build of torch for GPUs needs
                left += [(Requirement(text), chosen) for text in requires(name) or []]
    assert len(seen) > len(DECLARED)


def test_the_locked_versions_are_those_that_were_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip().split("==") for line in lines if not line.startswith("#")]
    tested = {canonicalize_name(name): version for name, version in pins}
    versions = {name: version for name, (version, _) in locked(*LOCKS).items()}
    assert {name: versions[name] for name in versions.keys() & tested} == {
        name: tested[name] for name in versions.keys() & tested
    }, "run `make lock` after a change of constraints.txt"


def test_the_image_installs_by_hash() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&;\n]*)", dockerfile)
    by_hash = [words for words in installs if "--require-hashes" in words]
    assert [name for name in LOCKS if not any(words.rstrip().endswith(f" {name}") for words in by_hash)] == []
    others = [words.strip() for words in installs if "--require-hashes" not in words]
    by_version = [words for words in others if "--no-index" not in words]
    assert by_version == [
        '--no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"',
        *['--constraint constraints.txt "pyllm-deep[$EXTRAS]"'] * 2,
    ]


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The audit's program, and a place for what pip-audit is to say instead of itself."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("AUDIT_REQUIRED", raising=False)
    return module


def answer(monkeypatch: pytest.MonkeyPatch, output: str, errors: str = "") -> list[list[str]]:
    """Let every program that is started say this; the command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        path = next(word.partition("=")[2] for word in command if word.startswith("--requirement="))
        commands.append(Path(path).read_text().splitlines())
        return subprocess.CompletedProcess(command, 1, output, errors)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


KNOWN = {"name": "idna", "version": "3.20", "vulns": []}
UNKNOWN = {"name": "numpy", "skip_reason": "not found"}
FLAWED = {"name": "idna", "version": "3.20", "vulns": [{"id": "X-1", "fix_versions": ["3.21"]}]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([KNOWN], 0, "1 packages, 0 known vulnerabilities"),
        ([KNOWN, UNKNOWN], 0, "Not audited, since the service does not know them: numpy"),
        ([FLAWED, UNKNOWN], 1, "idna 3.20: X-1; fixed in: 3.21"),
        ([UNKNOWN], 0, "SKIPPED"),
        (None, 0, "SKIPPED: pip-audit failed: no network"),
    ],
)
def test_an_audit_that_saw_nothing_is_no_clean_audit(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    packages: list[dict[str, object]] | None, code: int, said: str,
) -> None:  # fmt: skip
    output = json.dumps({"dependencies": packages}) if packages is not None else ""
    commands = answer(monkeypatch, output, "Traceback\nno network")
    assert audit.main() == code
    shown = capsys.readouterr().out
    assert said in shown
    assert commands[0][0] == sys.executable
    assert {line.split("==")[0] for line in commands[1]} == set(locked(*LOCKS))
    monkeypatch.setenv("AUDIT_REQUIRED", "1")
    assert audit.main() == (1 if "SKIPPED" in shown else code), "before a release an audit must be made"
