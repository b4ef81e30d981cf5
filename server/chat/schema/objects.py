"""The members of an object: which names it may have, and the valid values of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from .reader import Part, Parts, Reader, UnsatisfiableError

MAX_WORDS = 60  # names up to which a pattern is written as a list
OPENING = ("additionalProperties", "patternProperties", "propertyNames", "!open")


@dataclass(frozen=True, slots=True)
class Members:
    """The members that an object may have."""

    named: list[tuple[str, Parts, bool]]  # name, the parts for its value, whether it is required
    others: list[tuple[list[str], Parts]]  # Lark for a name that is none of the above; the parts for its value


def members_of(reader: Reader, parts: Parts, texts: Callable[[Parts], list[str]], low: int) -> Members:
    """Return the members of an object that has at least `low`; `texts` returns Lark for a string's text."""
    patterns = _patterns(parts)
    required = dict.fromkeys(name for part in parts for name in part.get("required") or ())
    listed = dict.fromkeys([*(name for part in parts for name in part.get("properties") or ()), *required])
    allowed, rules, lengths = _names(reader, parts, texts)
    is_open = not is_closed(parts) or low > len(listed)
    if is_open and allowed is not None:
        listed |= dict.fromkeys(allowed)
        is_open = False
    words = _words(reader, parts, patterns) if is_open else None
    if words is not None and not rules:
        listed |= dict.fromkeys(words)
        is_open = False
    named, known = [], None if allowed is None else set(allowed)
    for name in listed:
        matching = [text for text, path in patterns.items() if _search(reader, text, path, name)]
        value = reader.member(parts, name, matching)
        if (known is not None and name not in known) or not _fits(reader, name, rules, lengths):
            value = (*value, Part(False, f"{parts[0].path}.propertyNames~"))
        named.append((name, value, name in required))
    if not is_open:
        return Members(named, [])
    reader.count(len(patterns) ** 2)  # below, each kind of name excludes all others
    matches = {text: f"({reader.pattern(text, path).terminal})" for text, path in patterns.items()}
    size = f"/(?s:.{{{lengths[0]},{'' if lengths[1] is None else lengths[1]}}})/"
    base = [*rules.values(), *([size] if lengths != (0, None) else [])]
    others = []
    for text in [*patterns, None]:
        value = tuple(found for part in parts if (found := _other(part, text)) is not None)
        keys = [one if pattern == text else f"~{one}" for pattern, one in matches.items()]
        if not any(part.schema is False for part in value):
            others.append(([*keys, *base], value))
    return Members(named, others)


def is_closed(parts: Parts) -> bool:
    """Whether only the listed members are allowed."""
    if any(part.get("unevaluatedProperties") is False for part in parts):
        return not any(part.get(keyword) is not None for part in parts for keyword in OPENING[:2])
    lists = any(part.get("properties") is not None for part in parts)
    return lists and not any(part.get(keyword) is not None for part in parts for keyword in OPENING)


def _names(
    reader: Reader, parts: Parts, texts: Callable[[Parts], list[str]]
) -> tuple[list[str] | None, dict[str, str], tuple[int, int | None]]:
    """Return the demands of propertyNames: the names if they are known, Lark by pattern, and the length."""
    rules = tuple(part.at("propertyNames") for part in parts if part.get("propertyNames") is not None)
    if not rules:
        return None, {}, (0, None)
    try:
        rules, choice = reader.expand(rules)
    except UnsatisfiableError:
        return [], {}, (0, None)
    if choice is not None or any(
        part.get(keyword) is not None for part in rules for keyword in ("format", "!enum", "!pattern")
    ):
        raise reader.error(choice.path if choice else rules[0].path, "cannot be enforced on the names of members")
    values = reader.values(rules)
    if "string" not in reader.types(rules):
        values = []
    patterns = {text: part for part in rules if (text := part.get("pattern")) is not None}
    larks = {text: f"({reader.pattern(text, part.at('pattern').path).terminal})" for text, part in patterns.items()}
    return None if values is None else [v for v in values if isinstance(v, str)], larks, reader.counts(rules, "Length")


def _words(reader: Reader, parts: Parts, patterns: dict[str, str]) -> list[str] | None:
    """Return all names that match one of the patterns if there are few and no other names are allowed."""
    if not patterns or not any(part.get("additionalProperties") is False for part in parts):
        return None
    found: list[str] = []
    for text, path in patterns.items():
        words = reader.pattern(text, path).words(MAX_WORDS)
        if words is None:
            return None
        found += words
    return found


def _other(part: Part, pattern: str | None) -> Part | None:
    """Return a part's schema for the members that match only this pattern, or no pattern."""
    if pattern is not None and pattern in (part.get("patternProperties") or {}):
        return part.at("patternProperties", pattern)
    return part.at("additionalProperties") if part.get("additionalProperties") is not None else None


def _patterns(parts: Parts) -> dict[str, str]:
    """Return the path of each pattern for names."""
    found: dict[str, str] = {}
    for part in parts:
        for text in part.get("patternProperties") or ():
            found.setdefault(text, part.at("patternProperties", text).path)
    return found


def _fits(reader: Reader, name: str, rules: dict[str, str], lengths: tuple[int, int | None]) -> bool:
    low, high = lengths
    if not low <= len(name) <= (len(name) if high is None else high):
        return False
    return all(_search(reader, text, "propertyNames.pattern", name) for text in rules)


def _search(reader: Reader, pattern: str, path: str, text: str) -> bool:
    """Whether a pattern matches somewhere, by an engine without backtracking."""
    reader.count(1)
    try:
        return _searcher(pattern).isinstance_python(text)
    except SchemaError:
        raise reader.error(
            path, f"cannot be compared with the name {text!r}: it has a look-around or a back reference"
        ) from None


@lru_cache(100)
def _searcher(pattern: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
