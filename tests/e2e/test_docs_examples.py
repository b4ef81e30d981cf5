"""The documents' examples do what they show: each fenced block is run against a real server, in order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.serving import PATIENCE, ServerProcess, environment

from pyllm.server.flags import DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/quickstart.md", "docs/api.md", "docs/migration.md"]
ADDRESS = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Example:
    """A block, and the JSON that is shown as its answer."""

    page: str
    line: int
    language: str
    text: str
    answer: Any = None


def examples(page: str) -> list[Example]:
    """The blocks that can be run: Python, and curl; a JSON block shows the answer of the curl before it.

    The README's first program is run by test_demo.py, which looks at what it prints.
    """
    content = (ROOT / page).read_text(encoding="utf-8")
    found: list[Example] = []
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", content, re.DOTALL | re.MULTILINE):
        language, text = block.groups()
        line = content[: block.start()].count("\n") + 1
        if language == "json":
            before = found.pop()
            found.append(Example(page, before.line, before.language, before.text, json.loads(text)))
        elif language == "python" or (language == "bash" and "curl " in text):
            found.append(Example(page, line, language, text))
    return found


EXAMPLES = [example for page in PAGES for example in examples(page)]


def same_shape(shown: Any, found: Any, place: str = "") -> None:
    """What is shown has the members that are found, and values of the same types; "…" stands for anything."""
    if shown == "…":
        return
    if isinstance(shown, dict):
        assert isinstance(found, dict), place
        assert shown.keys() == found.keys(), place
        for name, value in shown.items():
            same_shape(value, found[name], f"{place}.{name}")
    elif isinstance(shown, list):
        assert isinstance(found, list), place
        for index, (one, other) in enumerate(zip(shown, found, strict=False)):
            same_shape(one, other, f"{place}[{index}]")
    elif place.endswith((".object", ".param", ".code", ".type", ".role", ".owned_by")):
        assert shown == found, place
    else:
        numbers = (int, float)
        assert type(shown) is type(found) or isinstance(shown, numbers) == isinstance(found, numbers), place


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("documented")
    with ServerProcess(folder / "log", "--batch-dir", str(folder / "batches")) as process:
        yield process


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{e.page}:{e.line}" for e in EXAMPLES])
def test_an_example_does_what_it_shows(demo: ServerProcess, tmp_path: Path, example: Example) -> None:
    text = example.text.replace(ADDRESS, demo.url).replace("/path/to/checkpoint", str(DEMO_FOLDER))
    command = [sys.executable, "-W", "error", "-c", text] if example.language == "python" else ["bash", "-ec", text]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    if example.language == "python":
        return
    if "data: " in done.stdout:
        assert done.stdout.endswith("data: [DONE]\n\n")
        return
    answer = json.loads(done.stdout)
    if example.answer is None:
        assert "error" not in answer, answer
    else:
        same_shape(example.answer, answer)


def test_every_page_has_examples() -> None:
    assert {example.page for example in EXAMPLES} == set(PAGES)
