"""The table of `benchmarks/faults/defences.py` fits the code, the tests and the page on operations as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyllm.benchmarks.faults.defences import Defence, read_table, remove

ROOT = Path(__file__).resolve().parents[2]
TABLE = read_table()


@pytest.mark.parametrize("defence", TABLE, ids=lambda defence: defence.hazard)
def test_defence_and_its_test_exist(defence: Defence) -> None:
    remove(defence, (ROOT / defence.file).read_text(encoding="utf-8"))
    path, _, name = defence.test.partition("[")[0].partition("::")
    assert re.search(rf"^((async )?def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


def test_hazards_and_defences_match_the_page() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("| hazard | promise |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert {row.partition(":")[0] for row in rows} == {defence.hazard for defence in TABLE}
    assert len(rows) == len(set(rows)) > 20
