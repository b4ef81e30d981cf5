"""What the pages on security and reliability name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = ("docs/security.md", "docs/reliability.md", "docker/monitoring/README.md", "SECURITY.md")
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
TESTS = {
    name for text in SOURCES for name in re.findall(r"^(?: *(?:async )?def |)(test_\w+|Test\w+)\b", text, re.MULTILINE)
}  # fmt: skip
FLAGS = re.findall(r"^    (\w+): .*flag\(", (ROOT / "server" / "flags.py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_test_flag_and_page_that_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+|Test\w+)`", text)) <= TESTS
    for path in re.findall(r"\]\(([^)#:]+)", text):
        assert ((ROOT / page).parent / path).exists(), path
    for path in re.findall(r"`((?:tests|docker)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    named = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)", text)}
    assert {name.removeprefix("no_") for name in named} <= set(FLAGS)
