"""Programs that some tests need and a machine may lack: a test without one is skipped, or fails if all are required."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import pytest

OPTION = "--require-components"
PROPERTY = "component"
"""The name under which a test's report lists what it needs."""


@dataclass(frozen=True, slots=True)
class Component:
    """A program under the names that it may have, the other programs and the Python module that it needs."""

    names: tuple[str, ...]
    version: str = "--version"  # the arguments that print it
    others: tuple[str, ...] = ()
    module: str = ""

    def find(self) -> str | None:
        """The program's path; None if anything is missing."""
        complete = all(map(shutil.which, self.others)) and (not self.module or importlib.util.find_spec(self.module))
        return next((path for name in self.names if (path := shutil.which(name))), None) if complete else None

    def show_version(self) -> str:
        """The first line of what the program says of its version."""
        path = self.find()
        if path is None:
            return "missing"
        done = subprocess.run([path, *self.version.split()], capture_output=True, text=True, timeout=60, check=False)
        return (done.stdout + done.stderr).strip().split("\n")[0]


COMPONENTS: Final = {
    "Chromium": Component(("chromium", "chromium-browser", "google-chrome"), module="playwright"),
    "Java": Component(("javac",), "-version", ("java",)),
    "Ray": Component(("ray",), module="ray"),
    "actionlint": Component(("actionlint",)),
    "fish": Component(("fish",)),
    "g++": Component(("g++",)),
    "gguf": Component(("python3",), module="gguf"),
    "hadolint": Component(("hadolint",)),
    "kubectl": Component(("kubectl",), "version --client"),
    "kubernetes-validate": Component(("kubernetes-validate",), module="kubernetes_validate"),
    "node": Component(("node",)),
    "npm": Component(("npm",)),
    "openssl": Component(("openssl",), "version"),
    "promtool": Component(("promtool",)),
    "pyzmq": Component(("python3",), module="zmq"),
    "redis": Component(("redis-server", "valkey-server"), module="redis"),
    "setpriv": Component(("setpriv",), others=("prlimit",)),
    "tmux": Component(("tmux",), "-V"),
    "zsh": Component(("zsh",)),
}
"""By the names that `pytest.mark.needs` takes."""
FIXTURES: Final = {
    "axe": ("npm",), "browser": ("Chromium",), "https_pair": ("openssl",), "java_client": ("Java",),
    "redis": ("redis",), "terminal_of": ("tmux",),
}  # fmt: skip
"""What a test needs because it uses a fixture."""
_required = False


def require(required: bool) -> None:
    """Choose whether a test without its component fails."""
    global _required
    _required = required


def missing(reason: str) -> NoReturn:
    """Skip this test, or fail it if components are required."""
    if _required:
        pytest.fail(f"{reason}, and {OPTION} was given", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def mark(items: Iterable[pytest.Item]) -> None:
    """Give each test the marks of its fixtures, and a property for each component that its report then has."""
    for item in items:
        used = [name for fixture in getattr(item, "fixturenames", ()) for name in FIXTURES.get(fixture, ())]
        if used:
            item.add_marker(pytest.mark.needs(*used))
        item.user_properties += [(PROPERTY, name) for name in sorted(set(needs(item)))]


def needs(item: pytest.Item) -> list[str]:
    """The names of a test's components."""
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def check(item: pytest.Item) -> None:
    """Skip or fail a test that lacks a component."""
    if absent := [name for name in needs(item) if COMPONENTS[name].find() is None]:
        missing(f"{' and '.join(absent)} cannot be found")


def table(stats: dict[str, list[Any]]) -> list[str]:
    """What each component's tests came to, as Markdown."""
    counts = Counter(
        (name, outcome)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in stats.get(outcome, ())
        for key, name in getattr(report, "user_properties", ())
        if key == PROPERTY
    )
    lines = ["| component | version | passed | failed |", "|---|---|---|---|"]
    for name, component in COMPONENTS.items():
        bad = sum(counts[name, outcome] for outcome in ("failed", "error", "skipped"))
        lines.append(f"| {name} | {component.show_version()} | {counts[name, 'passed']} | {bad} |")
    return lines
