"""Reads expressions of Prometheus, as far as these name metrics and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
      | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<duration>\$__(?:rate_)?(?:interval|range)\b|(?:\d+(?:ms|[smhdwy]))+)
      | (?P<number>0x[0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_:][\w:]*)
      | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){}\[\],:@])""",
    re.VERBOSE,
)
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = GROUPING | {"and", "or", "unless", "bool", "offset", "inf", "nan"}
FUNCTIONS = {
    "avg", "count", "max", "min", "sum", "rate", "increase", "deriv", "histogram_quantile", "min_over_time",
    "avg_over_time", "vector",
}  # fmt: skip
"""Those that are used; one that is misspelt is none of them."""


def names_and_labels(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Each metric of an expression with the labels of its selector; then "" with all labels grouped or joined by.

    `AssertionError` for what is no PromQL.
    """
    tokens, position = [], 0
    while position < len(expression):
        found = TOKEN.match(expression, position)
        assert found, f"{expression[position:]!r} is no PromQL"
        if found.lastgroup != "space":
            tokens.append((found.lastgroup, found[0]))
        position = found.end()
    assert Counter(text for _, text in tokens if text in "([{") == Counter(
        {")": "(", "]": "[", "}": "{"}[text] for _, text in tokens if text in ")]}"
    ), expression
    grouped: set[str] = set()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        at += 1
        if kind != "name":
            continue
        if text.lower() in GROUPING:
            assert following == "(", expression
            end = tokens.index(("sign", ")"), at)
            grouped |= {label for kind, label in tokens[at:end] if kind == "name"}
            at = end
        elif text.lower() in WORDS or text in FUNCTIONS:
            continue
        else:
            assert following != "(", f"no function {text} in {expression}"
            labels: set[str] = set()
            if following == "{":
                end = tokens.index(("sign", "}"), at)
                labels = {label for kind, label in tokens[at:end] if kind == "name"}
                at = end
            yield text, frozenset(labels)
    yield "", frozenset(grouped)
