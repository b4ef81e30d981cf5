"""The table of fields without effect as docs/api.md shows it.

PYTHONPATH=.types:tests python tests/support/rules_table.py    # write it into the page
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from pyllm.server.api.rules import RULES
from pyllm.server.http.tolerance import Rule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
BEGIN, END = "<!-- fields-without-effect -->\n", "<!-- end -->\n"
KINDS = {"bookkeeping": "accepted", "hint": "accepted, named", "refused": "refused"}
NAMES = {"/v1/messages/count_tokens": "count", "/v1/chat/completions": "chat"}


def shown(place: str, rule: Rule) -> str:
    """A place with the values that ask for nothing, or with the items that are meant."""
    values = rule.items or tuple(json.dumps(value) for value in rule.nothing)
    return f"`{place}`" + (f" ({', '.join(f'`{value}`' for value in values)})" if values else "")


def table() -> str:
    """The rows: one for each rule and each set of endpoints."""
    endpoints: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, rules in RULES.items():
        for place, rule in rules.table.items():
            endpoints[rule.kind, shown(place, rule)].append(NAMES.get(path, path.rpartition("/")[2]))
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (kind, field), names in endpoints.items():
        rows[kind, ", ".join(names)].append(field)
    order = sorted(rows, key=lambda key: (list(KINDS).index(key[0]), -len(key[1]), key[1]))
    lines = [f"| {KINDS[kind]} | {names} | {', '.join(sorted(rows[kind, names]))} |" for kind, names in order]
    return "\n".join(["| | endpoints | fields (values that ask for nothing) |", "|---|---|---|", *lines, ""])


def written() -> str:
    """The table on the page."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(BEGIN + written() + END, BEGIN + table() + END), encoding="utf-8")
