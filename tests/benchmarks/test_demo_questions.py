"""The questions held back from the demo model's training, and what counts as a right answer to them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pyllm.benchmarks.demo.checkers import is_right, read_questions
from pyllm.model.demo.items import LANGUAGES, is_held_out, pair_is_held_out

KINDS = {
    "greetings", "dates", "capitals", "sums", "counting", "spelling", "help", "json", "tools", "unknown", "known",
}  # fmt: skip
DAY = {"question": "Which day is after Monday?", "check": "name", "expect": {"right": "Tuesday", "among": "day"}}
CAPITAL = {"question": "Capital of Peru?", "check": "name", "expect": {"right": "Lima", "among": "capital"}}
SUM = {"question": "27 and 15?", "check": "number", "expect": ["42"]}
FEBRUARY = {"question": "Days in February?", "check": "number", "expect": ["28", "29"]}
COUNT = {"question": "From 3 to 5", "check": "sequence", "expect": ["3", "4", "5"]}
SPELL = {"question": "Spell cat", "check": "spelling", "expect": "cat"}
JSON = {"question": "JSON", "check": "json", "expect": {"name": "Ada", "age": 3}}
CALL = {"question": "Call", "check": "call", "expect": {"name": "f", "arguments": {"x": "Q7"}}}
HELP = {"question": "A seed?", "check": "words", "expect": ["seed=42"]}
UNKNOWN = {"question": "Who wins?", "check": "unknown", "expect": []}


def test_each_kind_and_language_has_a_hundred_questions() -> None:
    counts = Counter((question["kind"], question["language"]) for question in read_questions())
    assert set(counts) == {(kind, language) for kind in KINDS for language in LANGUAGES}
    assert min(counts.values()) >= 100
    texts = Counter((q["question"], str(q.get("tools"))) for q in read_questions() if q["kind"] != "known")
    assert max(texts.values()) == 1


def test_questions_about_items_ask_for_held_out_ones() -> None:
    for question in read_questions():
        if question["kind"] == "sums":
            assert pair_is_held_out(*map(int, question["item"].split()))
        if question["kind"] == "spelling":
            assert is_held_out("word", question["item"])


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (DAY, "Tuesday comes after Monday.", True),
        (DAY, "Tuesday or Wednesday.", False),
        (DAY, "I don't know. Tuesday?", False),
        (CAPITAL, "The capital of Peru is Lima.", True),
        (CAPITAL, "Paris.", False),
        (SUM, "27 + 15 = 42.", True),
        (SUM, "7 + 5 = 12, 27 + 15 = 42.", True),
        (SUM, "27 + 15 = 43. No: 42", False),
        (SUM, "42 or 41", False),
        (FEBRUARY, "February has 28 days, 29 in a leap year.", True),
        (FEBRUARY, "February has 29 days.", False),
        (COUNT, "3, 4, 5.", True),
        (COUNT, "3, 4, 5, 6.", False),
        (SPELL, "c-a-t.", True),
        (SPELL, "The letters are: c, a, t", True),
        (SPELL, "cat: c-a-t", True),
        (SPELL, "c-a-a-t", False),
        (SPELL, "cat", False),
        (JSON, '{"age": 3, "name": "Ada"}', True),
        (JSON, '```json\n{"name": "Ada", "age": 3}\n```', True),
        (JSON, '{"name": "Ada", "age": "3"}', False),
        (JSON, '{"name": "Ada"', False),
        (CALL, '<tool_call>{"name": "f", "arguments": {"x": "Q7"}}</tool_call>', True),
        (CALL, '<tool_call>{"name": "f", "arguments": {"x": "Q8"}}</tool_call>', False),
        (CALL, "Q7", False),
        (HELP, "Set seed in the request, for example seed=42.", True),
        (HELP, "Set stop in the request.", False),
        (UNKNOWN, "I don’t know that.", True),
        (UNKNOWN, "Je ne sais pas.", True),
        (UNKNOWN, "The red team.", False),
    ],
)
def test_an_answer_is_right_with_the_right_value_only(question: dict[str, Any], answer: str, right: bool) -> None:
    assert is_right(question, answer) is right
