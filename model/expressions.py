"""Finds regular expressions of a tokenizer with which a hostile text would take far too long."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator

from tokenizers import Regex, normalizers

KINDS = (" ", "\n", "a", "A", "1", "!", "'", "中", "\u0301")
"""One character of each kind that expressions distinguish. Texts repeat one of them, or two in turn."""
OTHERS = ("\t", "\r\n", "\u00a0", "é", "가", "🎉", "_", "-", "/", "111,", "a1 ", "Aa ", "'s ")
ENDS = ("", "!", "a", "\n", "1")
LENGTHS = (16, 32, 64, 128, 256, 1024)
LONGER = (4096, 16384)  # for texts whose time seems to grow too fast
SUSPICIOUS, SLOW = 5.5, 10  # times as long for a text of four times the length; 4 is linear, 16 is quadratic
NOTICEABLE = 0.001  # seconds; shorter times are rounded up to this, so that chance decides nothing
MAX_SECONDS = 0.25  # for one of these texts
MAX_TOTAL = 2.0  # for all texts; an ordinary expression takes 0.02 to 0.2
TRIES = 3
MAX_PARTS = 24

_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "d": "1", "s": " ", "w": "a", "D": "a", "S": "!", "W": "!",
               "L": "a", "Lu": "A", "Lt": "A", "M": "\u0301", "N": "1", "P": "!", "Han": "中"}  # fmt: skip
"""Characters that escapes and classes match."""
_SYNTAX = re.compile(
    r"\\[pP]\{\^?(?P<kind>\w+)\}|\\(?P<escaped>.)"
    r"|\(\?(?:<?[=!>]|<\w+>|[a-z-]*[:)])|\{\d*,?\d*\}|[\[\]().*+?|^$]",
    re.DOTALL,
)


def find_slow(expressions: Iterable[str]) -> tuple[str, str] | None:
    """Return an expression that takes more than linear time, and the repeated text that shows it; None if none does.

    A search cannot be interrupted. The library ends it only after ten million steps at one place, with a panic. So the
    texts grow from a few characters, and the first one that takes far longer than its length allows decides.
    """
    deadline = time.thread_time() + MAX_TOTAL
    for expression in expressions:
        search = normalizers.Replace(Regex(expression), "")
        for unit, end in _texts(expression):
            if _is_slow(search, unit, end):
                return expression, unit
            if time.thread_time() > deadline:
                return None
    return None


def _is_slow(search: normalizers.Normalizer, unit: str, end: str) -> bool:
    """Return whether the time for a text of `unit` grows faster than its length."""
    times: dict[int, float] = {}

    def measure(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length] + end
        times[length] = min(_seconds(search, text), times.get(length, math.inf))
        return times[length]

    for length in LENGTHS + LONGER:
        shorter = length // 4
        if measure(length) > MAX_SECONDS:
            return True
        if times[length] > SLOW * max(times.get(shorter, 0), NOTICEABLE):
            for _ in range(TRIES):
                measure(shorter)
                measure(length)
            if times[length] > SLOW * max(times[shorter], NOTICEABLE):
                return True
        if length >= LENGTHS[-1] and times[length] < SUSPICIOUS * times[shorter]:
            return False
    return False


def _seconds(search: normalizers.Normalizer, text: str) -> float:
    """Return the processor time of one search, infinity if the library panics."""
    start = time.thread_time()
    try:
        search.normalize_str(text)
    except BaseException as error:
        if not is_panic(error):
            raise
        return math.inf
    return time.thread_time() - start


def is_panic(error: BaseException) -> bool:
    """Return whether this is a panic of the library, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _texts(expression: str) -> Iterator[tuple[str, str]]:
    """Yield the repeated part and the end of each text: ends of any one character, then parts of the expression."""
    parts = _parts(expression)
    required = "".join(parts)
    characters = list(dict.fromkeys(required))[:MAX_PARTS]
    pairs = map("".join, itertools.combinations(KINDS, 2))
    units = [*KINDS, *OTHERS, *characters, *pairs, *parts, *(f"{part} " for part in parts), required]
    for unit, end in itertools.product(dict.fromkeys(filter(None, units)), ENDS):
        yield unit, end + required if end else ""


def _parts(expression: str) -> list[str]:
    """List the texts between the operators of an expression, with each class replaced by one of its characters."""
    plain = _SYNTAX.sub(_character, expression)
    return list(dict.fromkeys(part for part in plain.split("\0") if part))[:MAX_PARTS]


def _character(found: re.Match[str]) -> str:
    kind, escaped = found["kind"], found["escaped"]
    if kind:
        return _CHARACTERS.get(kind) or _CHARACTERS.get(kind[0], "a")
    if escaped:
        return _CHARACTERS.get(escaped, "\0" if escaped.isalnum() else escaped)
    return "\0"
