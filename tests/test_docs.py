"""What the pages name exists: pages, headings, files, tests and flags."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

from pyllm import LLM, DeepForCausalLM, SamplingParams
from pyllm.engine.config import EngineConfig
from pyllm.server.arguments import load_config
from pyllm.server.cli.main import COMMANDS, SHORT
from pyllm.server.flags import BenchConfig, CheckConfig, GenerateConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docker/*/*.md")
    for path in ROOT.glob(pattern)
)
COMMAND_FLAGS = (ServerConfig, GenerateConfig, CheckConfig, BenchConfig)
FLAGS = {field.name for config in COMMAND_FLAGS for field in dataclasses.fields(config)}
OTHER_FLAGS = {"help", "shape", "version"}
"""Flags of the command line itself, and of the benchmarks."""
MIGRATION = "docs/migration.md"
FOLDERS = "server|engine|model|tests|docs|docker|benchmarks"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The address of each heading of a page, as GitHub makes it."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_flags(text: str) -> set[str]:
    """The names of the flags that a text has in code, as in `--no-enable-prefix-caching` or `pyllm x --help`."""
    words = re.findall(r"--([a-z][a-z-]+)", " ".join(re.findall(r"`(-[^`]*)`", text)))
    return {word.removeprefix("no-").replace("-", "_") for word in words}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page: str) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", read(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_classes_exist(page: str) -> None:
    folders = [ROOT / name for name in ("server", "engine", "model")]
    source = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    names = {name for names in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?[(`]", read(page)) for name in names if name}
    assert {name for name in names if not re.search(rf"^ *(class |def |){name}\b", source, re.MULTILINE)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_files_tests_and_flags_exist(page: str) -> None:
    text = read(page)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+|Test\w+)`", text):
        assert re.search(rf"^ *(?:async )?(?:def|class) {name}\b", sources, re.MULTILINE), name
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)", text):
        assert (ROOT / path).exists(), path
    assert named_flags(right_sides(text) if page == MIGRATION else text) <= FLAGS | OTHER_FLAGS


def right_sides(text: str) -> str:
    """A page without the first cells of its tables, which are about other programs."""
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)


def test_commands_to_write_instead_are_commands_of_ours() -> None:
    """The words after `pyllm serve`, `generate`, `run-batch` and `bench` are flags with values that they take."""
    text = right_sides(read(MIGRATION))
    commands = re.findall(r"^pyllm (.*?)(?: +#.*)?$|`pyllm ([^`]+)`", text, re.MULTILINE)
    flags = re.findall(r"`(--[^`]+)`", text)
    assert len(commands) > 5
    assert len(flags) > 30
    for line in [first or second for first, second in commands] + [f"serve {flag}" for flag in flags if " " in flag]:
        name, *words = shlex.split(line)
        cls, _, description = COMMANDS[name]
        load_config(
            cls, [SHORT.get(name, {}).get(word, word) for word in words], {}, program=name, description=description
        )


def test_fields_of_the_library_to_write_instead_exist() -> None:
    text = right_sides(read(MIGRATION))
    for call, arguments in re.findall(r"(SamplingParams|generate|from_pretrained|embed|LLM)\(([^()]*)\)", text):
        surface = {"SamplingParams": SamplingParams, "from_pretrained": DeepForCausalLM.from_pretrained, "LLM": LLM}
        known = {*inspect.signature(surface.get(call) or getattr(LLM, call)).parameters}
        assert set(re.findall(r"(\w+)=", arguments)) <= known | {
            field.name for field in dataclasses.fields(EngineConfig)
        }


def test_the_table_of_flags_is_complete() -> None:
    """One row names every flag of `pyllm serve`."""
    rows = re.findall(r"^\| (`.*?) \|", read("docs/quickstart.md"), re.MULTILINE)
    flags = [name for row in rows for name in sorted(named_flags(row))]
    assert len(flags) == len(set(flags))
    assert set(flags) == {field.name for field in dataclasses.fields(ServerConfig)}
