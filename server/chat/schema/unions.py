"""Alternatives that exclude each other: `oneOf` as a grammar.

A value may be written only if exactly one option accepts it. Most options are distinguished by a member with a const or
an enum. If that member is optional, the grammar requires it; if one option requires a member that another does not
mention, the grammar forbids it in the other.
"""

from __future__ import annotations

from typing import Any

from .objects import is_closed
from .reader import Choice, Part, Parts, Reader, UnsatisfiableError, exact, identity

MAX_OPTIONS = 100
MAX_DEPTH = 6
MAX_STEPS = 10_000  # comparisons for one oneOf
Limits = list[dict[str, Any]]  # schemas that must hold in addition


def separate(reader: Reader, choice: Choice, rest: Parts) -> list[Parts]:
    """Return the options of a oneOf, restricted so that no value satisfies two; raise `RequestError`."""
    options = [option for option in choice.options if _is_possible(reader, (*rest, *option))]
    if len(options) > MAX_OPTIONS:
        raise reader.error(choice.path, f"has {len(options)} options; the limit is {MAX_OPTIONS}")
    found, separator = [], _Separator(reader)
    for n, option in enumerate(options):
        limits: dict[str, Part] = {}
        for m, other in enumerate(options):
            more = separator.apart((*rest, *option), (*rest, *other)) if n != m else []
            if more is None:
                first, second = sorted((option[-1].path, other[-1].path))
                problem = f"cannot be enforced, because one value may satisfy both {first} and {second}"
                raise reader.error(choice.path, f"{problem}: use anyOf, or distinguish them by a const")
            limits |= {str(schema): Part(schema, f"{choice.path}~{schema}") for schema in more}
        found.append((*option, *limits.values()))
    return found


def _is_possible(reader: Reader, parts: Parts) -> bool:
    try:
        reader.expand(parts)
    except UnsatisfiableError:
        return False
    return True


class _Separator:
    """Finds a distinction between two sets of values."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._steps = 0

    def apart(self, one: Parts, other: Parts, depth: int = 0) -> Limits | None:
        """Return further limits on `one` so that none of its values satisfies `other`; None if none are known."""
        self._steps += 1
        if depth > MAX_DEPTH or self._steps > MAX_STEPS:
            return None
        try:
            mine, choice = self._reader.expand(one)
            pairs = [((*mine, *option), other) for option in choice.options] if choice else []
            if choice is None:
                theirs, choice = self._reader.expand(other)
                pairs = [(mine, (*theirs, *option)) for option in choice.options] if choice else []
        except UnsatisfiableError:
            return []
        if choice is not None:
            return _joined(self.apart(*pair, depth + 1) for pair in pairs)
        kinds = self._reader.types(theirs)
        return _joined(self._same_kind(k, mine, theirs, depth) for k in self._reader.types(mine) if k in kinds)

    def _same_kind(self, kind: str, one: Parts, other: Parts, depth: int) -> Limits | None:
        if kind in ("array", "object"):
            if self._reader.values(one) is not None or self._reader.values(other) is not None:
                return []
            return self._arrays(one, other, depth) if kind == "array" else self._objects(one, other, depth)
        mine, theirs = self._values(kind, one), self._values(kind, other)
        if mine is not None:
            if theirs is None and kind == "number":
                limits, _ = self._reader.range(other)
                theirs = [value for value in mine if exact(value) in limits]
            elif theirs is None:
                low, high = self._reader.counts(other, "Length")
                theirs = [value for value in mine if low <= len(value) <= (len(value) if high is None else high)]
            both = [value for value in mine if identity(value) in map(identity, theirs)]
            return [{"!enum": both}] if both else []
        if theirs is not None:
            return [{"!enum": theirs}] if theirs else []
        if kind == "number":
            (limits, _), (others, _) = self._reader.range(one), self._reader.range(other)
            return [] if limits.narrow(others).is_empty else None
        return [] if self._counts_differ(one, other, "Length") else None

    def _values(self, kind: str, parts: Parts) -> list[Any] | None:
        """Return the values of a kind that are allowed, None for any."""
        types = {"null": (type(None),), "boolean": (bool,), "number": (int, float), "string": (str,)}[kind]
        known: dict[str, list[Any]] = {"null": [None], "boolean": [False, True]}
        values = self._reader.values(parts)
        if values is None:
            values = known.get(kind)
        return None if values is None else [v for v in values if type(v) in types]

    def _counts_differ(self, one: Parts, other: Parts, what: str) -> bool:
        (low, high), (least, most) = self._reader.counts(one, what), self._reader.counts(other, what)
        return (high is not None and high < least) or (most is not None and most < low)

    def _arrays(self, one: Parts, other: Parts, depth: int) -> Limits | None:
        if self._counts_differ(one, other, "Items"):
            return []
        common = min(self._reader.counts(one, "Items")[0], self._reader.counts(other, "Items")[0], 20)
        pairs = ((self._reader.item(one, n), self._reader.item(other, n)) for n in range(common))
        return [] if any(self.apart(*pair, depth + 1) == [] for pair in pairs) else None

    def _objects(self, one: Parts, other: Parts, depth: int) -> Limits | None:
        if self._counts_differ(one, other, "Properties"):
            return []
        mine, theirs = _required(one), _required(other)
        listed = _listed(one)
        missing = [name for name in theirs if name not in mine]
        if is_closed(one) and any(name not in listed for name in missing):
            return []
        optional = None
        for name in dict.fromkeys([*mine, *listed, *_listed(other), *theirs]):
            pair = _member(self._reader, one, name), _member(self._reader, other, name)
            if pair[1] and not any(part.schema is False for part in pair[0]) and self.apart(*pair, depth + 1) == []:
                if name in mine:
                    return []
                optional = optional or name
        if optional is not None:
            return [{"required": [optional]}]
        return [{"properties": {missing[0]: False}, "!open": True}] if missing else None


def _joined(limits: Any) -> Limits | None:
    """Return all limits, None if one is unknown."""
    found: Limits = []
    for more in limits:
        if more is None:
            return None
        found += more
    return found


def _required(parts: Parts) -> list[str]:
    return [name for part in parts for name in part.get("required") or ()]


def _listed(parts: Parts) -> list[str]:
    return [name for part in parts for name in part.get("properties") or ()]


def _member(reader: Reader, parts: Parts, name: str) -> Parts:
    """Return the known limits of a member; a part with patterns may have more."""
    certain = [
        part for part in parts if part.get("patternProperties") is None or name in (part.get("properties") or ())
    ]
    return reader.member(tuple(certain), name)
