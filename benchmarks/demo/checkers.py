"""Decides whether the demo model answered a held-back question rightly: with the right value, and with no wrong one.

A question of `questions.jsonl` has a `kind`, a `language`, a `question`, the `tools` that are offered, the held-back
`item` it is about, if it has one, and what is expected of the answer: the name of a `check` and its `expect`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyllm.model.demo.items import COUNTRIES, DAYS, LANGUAGES, MONTHS

QUESTIONS = Path(__file__).parent / "questions.jsonl"
Question = dict[str, Any]
DECLINES = re.compile(r"\bI (don't|do not) know\b|\bje ne (le )?sais pas\b", re.IGNORECASE)
CALL = re.compile(r"<tool_call>(.*)</tool_call>", re.DOTALL)
EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
NAMES: dict[str, set[str]] = {
    "day": {name for names in DAYS.values() for name in names},
    "month": {name for names in MONTHS.values() for name in names},
    "capital": {country.capital[language] for country in COUNTRIES for language in LANGUAGES},
    "country": {re.sub("^(l[ea]s? |l'|the )", "", c.name[lang]) for c in COUNTRIES for lang in LANGUAGES},
    "language": {country.language[lang] for country in COUNTRIES for lang in LANGUAGES if country.language},
}


def read_questions() -> list[Question]:
    """Read all held-back questions."""
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def declines(answer: str) -> bool:
    """Whether the answer says that the model does not know."""
    return DECLINES.search(answer.replace("’", "'")) is not None


def is_right(question: Question, answer: str) -> bool:
    """Whether `answer`, which ended by itself, is what the question expects."""
    if question["check"] == "unknown":
        return declines(answer)
    return not declines(answer) and CHECKS[question["check"]](question, answer.replace("’", "'"))


def _found(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _words(question: Question, answer: str) -> bool:
    """One of the expected phrases."""
    return any(_found(phrase, answer) for phrase in question["expect"])


def _name(question: Question, answer: str) -> bool:
    """The right day, month, capital, country or language, and no other that the question does not name."""
    right = question["expect"]["right"]
    rest = re.sub(rf"(?<!\w){re.escape(right)}(?!\w)", "", answer, flags=re.IGNORECASE)
    others = NAMES[question["expect"]["among"]]
    return rest != answer and not any(_found(name, rest) and not _found(name, question["question"]) for name in others)


def _number(question: Question, answer: str) -> bool:
    """The right number last, others only from the question or in sums that are true."""
    for a, sign, b, result in EQUATION.findall(answer):
        if int(result) != (int(a) + int(b) if sign == "+" else int(a) - int(b)):
            return False
    numbers = re.findall(r"\d+", answer)
    right, *others = question["expect"]  # February has 28 days or 29
    allowed = {right, *others, *re.findall(r"\d+", question["question"])}
    allowed |= {number for equation in EQUATION.finditer(answer) for number in equation[0].split()}
    return right in numbers and numbers[-1] in question["expect"] and set(numbers) <= allowed


def _sequence(question: Question, answer: str) -> bool:
    """All numbers in order, and no others."""
    return re.findall(r"\d+", answer) == question["expect"]


def _spelling(question: Question, answer: str) -> bool:
    """The letters of the word, one by one."""
    runs = re.findall(r"\w(?:(?:-|, ?| )\w)+(?!\w)", answer)
    return any(re.sub(r"[-, ]", "", run).lower() == question["expect"] for run in runs) and len(runs) == 1


def _json(question: Question, answer: str) -> bool:
    """A JSON object with exactly the copied values, perhaps in a code block."""
    text = re.sub(r"^```(json)?\n|\n```$", "", answer.strip())
    try:
        return bool(json.loads(text) == question["expect"])
    except ValueError:
        return False


def _call(question: Question, answer: str) -> bool:
    """One call of the right tool with exactly the copied values, and no text around it."""
    match = CALL.fullmatch(answer.strip())
    try:
        return match is not None and bool(json.loads(match[1]) == question["expect"])
    except ValueError:
        return False


CHECKS: dict[str, Callable[[Question, str], bool]] = {
    "words": _words, "name": _name, "number": _number, "sequence": _sequence, "spelling": _spelling, "json": _json,
    "call": _call,
}  # fmt: skip
