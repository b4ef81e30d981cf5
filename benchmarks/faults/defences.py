"""Remove the defence against each hazard of docs/operations.md, one at a time, and check that its test then fails.

    python benchmarks/faults/defences.py                      # all of them, some minutes
    python benchmarks/faults/defences.py --only "client|key"  # those whose hazard, function or test matches
    python benchmarks/faults/defences.py --list

`defences.toml` names one function for each hazard, the body that it gets without its defence, and the test that must
fail then. Everything happens in a copy of the checkout in a temporary folder. Every test passes there first; then a
defence counts as shown if its test fails by its own assertion or timeout. A test that cannot be collected, or whose
fixtures fail before it, shows nothing. The exit code is 1 if any defence is not shown.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".toml")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
PLUGIN = "pyllm.benchmarks.faults.defences"
REPORTS, FOLDER = "DEFENCES_REPORTS", "DEFENCES_FOLDER"
"""Variables of the environment: where a test run writes what became of each test; and which copy a process is of."""
SECONDS = 40
"""A test's time limit, fixtures included. Those that end by themselves take less than half of it."""
BROKEN = re.compile(r"(E  *)?(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError)\b")
"""How a test fails that shows only that the defence was removed in a wrong way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """An entry of the table."""

    hazard: str  # the row of docs/operations.md
    function: str  # path:name, of the function that defends
    without: str  # the function's body without the defence
    test: str  # the test that must fail then

    @property
    def file(self) -> str:
        """The function's file, from the root of the checkout."""
        return self.function.partition(":")[0]


def read_table() -> list[Defence]:
    """Read all entries."""
    rows: dict[str, dict[str, str]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [Defence(hazard=hazard, **entry) for hazard, entry in rows.items()]


def remove(defence: Defence, source: str) -> str:
    """Return the file's text without the defence; raise `ValueError` if the function is not in it."""
    body: list[ast.stmt] = ast.parse(source).body
    function: ast.AST | None = None
    for name in defence.function.partition(":")[2].split("."):
        found = [node for node in body if getattr(node, "name", None) == name]
        if len(found) != 1:
            raise ValueError(f"{defence.function} is in its file {len(found)} times")
        (function,) = found
        body = function.body  # type: ignore[attr-defined]
    indent = " " * body[0].col_offset
    lines = source.split("\n")
    lines[body[0].lineno - 1 : body[-1].end_lineno] = textwrap.indent(defence.without.strip("\n"), indent).split("\n")
    without = "\n".join(lines)
    compile(without, defence.file, "exec")
    return without


# ---- A plugin for the pytest processes ----


def pytest_configure() -> None:
    """Let hypothesis report the first failure that it finds: shrinking takes longer than a test may."""
    from hypothesis import Phase, settings

    settings.register_profile("defences", phases=[Phase.generate], database=None)
    settings.load_profile("defences")


def pytest_runtest_logreport(report: Any) -> None:
    """Write down one phase of one test."""
    said = getattr(report.longrepr, "reprcrash", None)
    text = said.message if said is not None else str(report.longrepr or "")
    first = next((line for line in text.splitlines() if line.strip()), "")
    with Path(os.environ[REPORTS]).open("a", encoding="utf-8") as sink:
        sink.write(json.dumps([report.nodeid, report.when, report.outcome, first]) + "\n")


# ---- The program ----


@dataclass(frozen=True, slots=True)
class Part:
    """What became of a test's setup, call or teardown."""

    test: str
    when: str
    outcome: str
    said: str


class Copy:
    """A copy of the checkout, which every process started here imports as the package."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT, symlinks=True)
        (folder / "packages").mkdir()
        (folder / "packages" / "pyllm").symlink_to(self.root)
        self._reports = folder / "reports"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYLLM_", "PYTEST_"))}
        self._environment = kept | {
            "PYTHONPATH": str(folder / "packages"), "OMP_NUM_THREADS": "1", REPORTS: str(self._reports),
            FOLDER: str(folder),
        }  # fmt: skip

    def run(self, tests: Sequence[str], seconds: float = SECONDS, *, first: bool = False) -> list[Part]:
        """Run tests, perhaps up to the first failure; what became of them."""
        self._reports.write_text("")
        options = ["-q", "-p", "no:cacheprovider", "-p", PLUGIN, "-m", "", f"--timeout={seconds}"]
        options += ["-x"] if first else []
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=self.root, env=self._environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        hung = False
        try:
            process.wait(len(tests) * seconds + 40)
        except subprocess.TimeoutExpired:  # in native code, where pytest's own limit cannot reach it
            process.kill()
            process.wait()
            hung = True
        finally:
            self._end_what_is_left()
        phases = [Part(*json.loads(line)) for line in self._reports.read_text(encoding="utf-8").splitlines()]
        if hung and phases and phases[-1].when != "teardown":
            phases.append(Part(phases[-1].test, "teardown", "failed", "it hangs"))
        return phases

    def _end_what_is_left(self) -> None:
        """End the processes that tests have started and a missing defence has left."""
        mark = f"{FOLDER}={self._environment[FOLDER]}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    @contextlib.contextmanager
    def without(self, defence: Defence) -> Iterator[None]:
        """Remove the defence from the copy."""
        path = self.root / defence.file
        source = path.read_text(encoding="utf-8")
        path.write_text(remove(defence, source), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(source, encoding="utf-8")

    def check_imports(self) -> None:
        """Raise `RuntimeError` unless a server's process and its engine's both are of this copy."""
        line = "import os as _os, sys as _sys; print('of', _os.getpid(), __file__, file=_sys.stderr)\n"
        path = self.root / "__init__.py"
        source = path.read_text(encoding="utf-8")
        path.write_text(source + line, encoding="utf-8")
        command = [sys.executable, "-m", "pyllm", "generate", "Hi", "--max-tokens", "1"]
        done = subprocess.run(command, cwd="/", env=self._environment, capture_output=True, text=True, check=False)
        path.write_text(source, encoding="utf-8")
        found = re.findall(r"^of (\d+) (.*)$", done.stderr, re.MULTILINE)
        if len({pid for pid, _ in found}) < 2 or any(Path(file).resolve() != path.resolve() for _, file in found):
            raise RuntimeError(f"the processes are not of the copy: {done.stderr[-2000:]}")


def of_test(phases: Sequence[Part], test: str) -> list[Part]:
    """The phases of a test, or of all its variants."""
    return [phase for phase in phases if phase.test == test or phase.test.startswith((test + "[", test + "::"))]


def passed(phases: Sequence[Part]) -> bool:
    """Whether a test has run and nothing of it failed."""
    return any(phase.when == "call" for phase in phases) and all(phase.outcome == "passed" for phase in phases)


def skipped(phases: Sequence[Part]) -> bool:
    """Whether a test cannot run on this machine."""
    return (
        bool(phases)
        and all(phase.when != "call" or phase.outcome == "skipped" for phase in phases)
        and any(phase.outcome == "skipped" for phase in phases)
    )


def failure(phases: Sequence[Part]) -> str:
    """The first line of what a test failed by; "" where it did not, or for no reason that counts."""
    for phase in phases:
        if phase.outcome == "failed" and phase.when != "setup" and not BROKEN.match(phase.said):
            return phase.said
    return ""


def show(copy: Copy, chosen: Sequence[Defence]) -> Counter[str]:
    """Remove each defence and print what its test said; count the tests that failed, were skipped or showed nothing."""
    tests = list(dict.fromkeys(defence.test for defence in chosen))
    print(f"{len(chosen)} defences, {len(tests)} tests; first these, with every defence in place", flush=True)
    phases = copy.run(tests, 4 * SECONDS)
    verdicts: Counter[str] = Counter()
    for defence in chosen:
        began = time.monotonic()
        before = of_test(phases, defence.test)
        if not (passed(before) or skipped(before)):
            before = of_test(copy.run([defence.test], 4 * SECONDS), defence.test)  # again, alone
        if passed(before):
            with copy.without(defence):
                without = of_test(copy.run([defence.test], first=True), defence.test)
            found = failure(without)
            verdict = "fails" if found else "NOT SHOWN"
            said = found or "; ".join(f"{p.when} {p.outcome}: {p.said}" for p in without if p.said) or "it passes"
        else:
            verdict, said = ("skipped", before[0].said) if skipped(before) else ("NOT SHOWN", "it fails in any case")
        verdicts[verdict] += 1
        print(f"{defence.hazard} | {defence.function} | {defence.test.rpartition('::')[2]} | "
              f"{verdict} ({time.monotonic() - began:.0f} s): {said[:160]}", flush=True)  # fmt: skip
    return verdicts


def main() -> int:
    """Show the chosen defences; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression; the case does not count")
    parser.add_argument("--list", action="store_true", help="name them and do nothing")
    args = parser.parse_args()
    only = re.compile(args.only, re.IGNORECASE)
    chosen = [d for d in read_table() if only.search(f"{d.hazard} {d.function} {d.test}")]
    if args.list:
        for defence in chosen:
            print(f"{defence.hazard} | {defence.function} | {defence.test}")
        return 0
    for defence in chosen:
        remove(defence, (ROOT / defence.file).read_text(encoding="utf-8"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="defences-") as folder:
        copy = Copy(Path(folder).resolve())
        copy.check_imports()
        verdicts = show(copy, chosen)
    verdict_counts = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items())
    minutes = (time.monotonic() - began) / 60
    print(f"{len(chosen)} defences; without them: {verdict_counts}; {minutes:.0f} min")
    return 1 if verdicts["NOT SHOWN"] else 0


if __name__ == "__main__":
    sys.exit(main())
