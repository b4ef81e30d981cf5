"""The table of `benchmarks/faults/defences.py` fits the code, the tests and the page on operations as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyllm.benchmarks.faults.defences import Defence, read_table, take_out

ROOT = Path(__file__).resolve().parents[2]
TABLE = read_table()


def named(defence: Defence) -> str:
    return f"{defence.hazard}: {defence.defence}"


@pytest.mark.parametrize("defence", TABLE, ids=named)
def test_defence_and_its_test_exist(defence: Defence) -> None:
    take_out(defence, (ROOT / defence.file).read_text(encoding="utf-8"))
    path, _, name = defence.test.partition("[")[0].partition("::")
    assert re.search(rf"^((async )?def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


def test_hazards_and_defences_match_the_page() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("| hazard | promise |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert {row.partition(":")[0] for row in rows} == {defence.hazard for defence in TABLE}
    assert len(rows) == len(set(rows)) > 20


def test_no_defence_is_listed_twice() -> None:
    assert len({(d.file, d.text, d.instead, d.test) for d in TABLE}) == len(TABLE)
    assert len({named(defence) for defence in TABLE}) == len(TABLE)
