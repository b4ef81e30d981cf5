"""Reads a JSON Schema: finds its parts, resolves references, and combines parts that must hold at once.

A value is described by parts of the schema that must all hold. `expand` resolves their references and combinations, so
that only keywords for single types are left, or an alternative to decide first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from ....engine.errors import RequestError
from ...http.errors import shorten
from .keywords import ALL_TYPES, brief, check_keywords
from .negation import UnsupportedNegationError, negate
from .numbers import Range
from .patterns import Pattern

MAX_STEPS = 30_000  # parts to look at, for all rules together
PARTS_A_STEP = 4  # if only one member of them is needed
SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the schema, without the keywords that have been dealt with."""

    schema: Any = field(compare=False)  # an object or a bool
    path: str  # its unique place, such as `properties.id`; a part derived from a keyword has a ~
    used: frozenset[str] = frozenset()

    def get(self, keyword: str) -> Any:
        """Return the value of a keyword, None without it."""
        return None if keyword in self.used or not isinstance(self.schema, dict) else self.schema.get(keyword)

    def without(self, *keywords: str) -> Part:
        """Return the part without some keywords."""
        return Part(self.schema, self.path, self.used.union(keywords))

    def at(self, *steps: str | int, schema: Any = None) -> Part:
        """Return the part at these keys and indices, or one with this `schema` that is derived from there."""
        inner, path = self.schema, self.path
        for step in steps:
            inner = inner[step] if schema is None else None
            step = brief(step) if isinstance(step, str) else step
            plain = isinstance(step, str) and re.fullmatch(r"[\w$…-]+", step)
            path = (f"{path}.{step}" if path else f"{step}") if plain else f"{path}[{step!r}]"
        return Part(inner, path) if schema is None else Part(schema, f"{path}~")


Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Sets of parts: one of them must hold, in addition to other parts."""

    path: str
    options: list[Parts]
    exclusive: bool = False  # exactly one may hold


class UnsatisfiableError(Exception):
    """No value is valid; the message says where and why."""


class Reader:
    """A schema to enforce; `field` is its name in errors."""

    def __init__(self, schema: dict[str, Any], param: str | None) -> None:
        self._param = param
        self.root = Part(schema, "")
        self._named: dict[str, Part] = {}
        self._patterns: dict[str, Pattern] = {}
        self._left = MAX_STEPS
        self._checked: set[int] = set()
        self._check(self.root)

    def _check(self, part: Part) -> None:
        try:
            for named, name in check_keywords(part.schema, part.path, self._checked):
                self._named.setdefault(name, Part(*named))
        except ValueError as error:
            raise RequestError(f"In the schema, {error}.", param=self._param) from None

    def error(self, path: str, problem: str) -> RequestError:
        """Return the error for a keyword that cannot be enforced."""
        return RequestError(f"In the schema, {shorten(path.replace('~', ''))} {problem}.", param=self._param)

    def too_complex(self) -> RequestError:
        """Return the error for a schema that takes too much work."""
        return RequestError("The schema is too complex: it describes too many combinations.", param=self._param)

    def count(self, steps: int) -> None:
        """Account for work; raise `RequestError` if it is too much."""
        self._left -= steps
        if self._left < 0:
            raise self.too_complex()

    def pattern(self, text: str, path: str) -> Pattern:
        """Return a parsed pattern."""
        if text not in self._patterns:
            try:
                self._patterns[text] = Pattern(text)
            except ValueError as error:
                raise self.error(path, f"cannot be enforced: {error}") from None
        return self._patterns[text]

    def expand(self, parts: Iterable[Part]) -> tuple[Parts, Choice | None]:
        """Resolve references and combinations; raise `UnsatisfiableError` if no value can be valid."""
        found: dict[Part, None] = {}
        seen: set[Part] = set()
        unfolding = Counter[str]()  # the paths of the parts around the current one
        pending: list[Part | str] = [*reversed(tuple(parts))]  # a path ends the parts within it
        while pending:
            part = pending.pop()
            if isinstance(part, str):
                unfolding[part] -= 1
                continue
            self.count(1)
            if part.schema is False:
                raise UnsatisfiableError(f"{part.path or 'it'} is false")
            if part.schema is True or part in seen:
                continue
            seen.add(part)
            inner = self._unfold(part)
            if inner is None:
                found[part] = None
            elif any(unfolding[one.path] and one.path != part.path for one in inner) or inner[0] == part:
                raise UnsatisfiableError(f"{part.path or 'it'} refers to itself")
            else:
                unfolding[part.path] += 1
                pending += [part.path, *reversed(inner)]
        rest = tuple(found)
        for n, part in enumerate(rest):
            if choice := self._choice(part):
                return rest[:n] + rest[n + 1 :], choice
        return rest, None

    def _unfold(self, part: Part) -> list[Part] | None:
        """Return the parts that `part` is made of, None if it is not made of others."""
        if part.get("nullable") is True:
            return None  # a choice: null needs nothing else
        if (target := part.get("$ref")) is not None:
            return [self._resolve(target, part), part.without("$ref")]
        if (all_of := part.get("allOf")) is not None:
            return [part.without("allOf"), *(part.at("allOf", n) for n in range(len(all_of)))]
        if part.get("const") is not None and not isinstance(part.get("const"), SCALARS):
            return [part.without("const"), part.at("const", schema=_exactly(part.get("const")))]
        if (opposite := part.get("not")) is not None:
            try:
                return [part.without("not"), part.at("not", schema=negate(opposite, self._lookup(part)))]
            except UnsupportedNegationError as error:
                raise self.error(part.at("not", schema=True).path, f"cannot be enforced with {error}") from None
        if (condition := part.get("if")) is not None:
            cases = [[condition, part.get("then")], [{"not": condition}, part.get("else")]]
            any_of = [{"allOf": [one for one in case if one is not None]} for case in cases]
            return [part.without("if", "then", "else"), part.at("if", schema={"anyOf": any_of})]
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            if (needs := part.get(keyword)) is not None:
                all_of = [
                    {
                        "anyOf": [
                            {"properties": {name: False}, "!open": True},
                            {"allOf": [{"required": [name]}, _as_schema(need)]},
                        ]
                    }
                    for name, need in needs.items()
                ]
                return [part.without(keyword), part.at(keyword, schema={"allOf": all_of})]
        return None

    def _lookup(self, part: Part) -> Any:
        return lambda reference: self._resolve(reference, part).schema

    def _choice(self, part: Part) -> Choice | None:
        if part.get("nullable") is True:
            null = part.at("nullable", schema={"type": "null"})
            return Choice(part.path, [(part.without("nullable"),), (null,)])
        for keyword in ("anyOf", "oneOf"):
            if (options := part.get(keyword)) is not None:
                base = part.without(keyword)
                each: list[Parts] = [(base, part.at(keyword, n)) for n in range(len(options))]
                return Choice(part.at(keyword, schema=True).path, each, keyword == "oneOf")
        values = part.get("enum")
        if values is None or all(isinstance(value, SCALARS) for value in values):
            return None
        base = part.without("enum")
        plain = [value for value in values if isinstance(value, SCALARS)]
        each = [
            (base, part.at("enum", n, schema=_exactly(v))) for n, v in enumerate(values) if not isinstance(v, SCALARS)
        ]
        return Choice(part.at("enum", schema=True).path, [(base, part.at("enum", schema={"enum": plain})), *each])

    def _resolve(self, reference: str, part: Part) -> Part:
        place, _, fragment = reference.partition("#")
        start = self.root if place in ("", self.root.get("$id"), self.root.get("id")) else self._named.get(place)
        if start is not None and fragment and not fragment.startswith("/"):
            start = self._named.get("#" + fragment)
        try:
            if start is None:
                raise KeyError
            target = start
            for step in unquote(fragment).split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                target = target.at(int(step) if isinstance(target.schema, list) else step)
        except (KeyError, IndexError, ValueError, TypeError):
            target = Part(None, "")
        if not isinstance(target.schema, (dict, bool)):
            raise self.error(part.at("$ref", schema=True).path, f"refers to {shorten(reference)!r}, which is not in it")
        self._check(target)  # unchecked so far, if it is where no keyword expects a schema
        return target

    def types(self, parts: Parts) -> list[str]:
        """Return the types that a value may have; "number" includes integers."""
        found = list(ALL_TYPES)
        for part in parts:
            if (kind := part.get("type")) is not None:
                kinds = [kind] if isinstance(kind, str) else kind
                found = [one for one in found if one in kinds or (one == "number" and "integer" in kinds)]
        return found

    def values(self, parts: Parts) -> list[Any] | None:
        """Return the scalars that a value may be, None for any."""
        found: dict[Any, Any] | None = None
        for part in parts:
            values = part.get("enum")
            if part.schema is not True and "const" in part.schema and "const" not in part.used:
                values = [
                    value
                    for value in (values or [part.schema["const"]])
                    if identity(value) == identity(part.schema["const"])
                ]
            if values is not None:
                mine = {identity(value): value for value in values}
                found = mine if found is None else {key: value for key, value in found.items() if key in mine}
            if (excluded := part.get("!enum")) is not None and found is not None:
                gone = set(map(identity, excluded))
                found = {key: value for key, value in found.items() if key not in gone}
        return None if found is None else list(found.values())

    def range(self, parts: Parts) -> tuple[Range, list[tuple[Fraction, str]]]:
        """Return the range of a number, and the number it must be a multiple of, with its path."""
        found, steps = Range(), []
        for part in parts:
            kind = part.get("type")
            kinds = [kind] if isinstance(kind, str) else kind or ["number"]
            found = found.narrow(Range(whole="number" not in kinds and "integer" in kinds))
            low, high = part.get("minimum"), part.get("maximum")
            above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
            for bound, is_open in ((low, above is True), (None if isinstance(above, bool) else above, True)):
                if bound is not None:
                    found = found.narrow(Range(low=exact(bound), open_low=is_open))
            for bound, is_open in ((high, below is True), (None if isinstance(below, bool) else below, True)):
                if bound is not None:
                    found = found.narrow(Range(high=exact(bound), open_high=is_open))
            if (step := part.get("multipleOf")) is not None:
                steps.append((exact(step), part.at("multipleOf").path))
        return found, steps

    def counts(self, parts: Parts, what: str) -> tuple[int, int | None]:
        """Return the smallest and largest number of `what`: Length, Items or Properties."""
        lows = [int(low) for part in parts if (low := part.get(f"min{what}")) is not None]
        highs = [int(high) for part in parts if (high := part.get(f"max{what}")) is not None]
        return max(lows, default=0), min(highs, default=None)

    def member(self, parts: Parts, name: str, matching: Iterable[str] = ()) -> Parts:
        """Return the parts for the member `name`, which matches these of their patterns."""
        self.count(len(parts) // PARTS_A_STEP)
        return tuple(found for part in parts for found in _member(part, name, matching))

    def item(self, parts: Parts, index: int | None) -> Parts:
        """Return the parts for an array's item; None: for the items after all listed ones."""
        self.count(len(parts) // PARTS_A_STEP)
        return tuple(found for part in parts if (found := _item(part, index)) is not None)


def _member(part: Part, name: str, matching: Iterable[str]) -> Iterator[Part]:
    listed = name in (part.get("properties") or {})
    if listed:
        yield part.at("properties", name)
    for pattern in matching:
        if pattern in (part.get("patternProperties") or {}):
            yield part.at("patternProperties", pattern)
            listed = True
    if not listed and part.get("additionalProperties") is not None:
        yield part.at("additionalProperties")


def listed_items(part: Part) -> str | None:
    """Return the keyword with a schema for each of the first items, None if there is none."""
    if part.get("prefixItems") is not None:
        return "prefixItems"
    return "items" if isinstance(part.get("items"), list) else None


def _item(part: Part, index: int | None) -> Part | None:
    keyword = listed_items(part)
    if keyword and index is not None and index < len(part.get(keyword)):
        return part.at(keyword, index)
    rest = "additionalItems" if keyword == "items" else "items"
    return part.at(rest) if part.get(rest) is not None else None


def _exactly(value: Any) -> dict[str, Any]:
    """Return a schema for one array or object."""
    if isinstance(value, dict):
        members = {name: {"const": item} for name, item in value.items()}
        return {"type": "object", "properties": members, "required": list(value), "additionalProperties": False}
    if isinstance(value, list):
        items = [{"const": item} for item in value]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return {"const": value}


def _as_schema(need: Any) -> Any:
    return {"required": need} if isinstance(need, list) else need


def identity(value: Any) -> Any:
    """Return a key that two scalars share if JSON Schema calls them equal."""
    return (isinstance(value, bool), value) if isinstance(value, (bool, int, float)) else (type(value).__name__, value)


def exact(number: float) -> Fraction:
    """Return the number as its JSON text has it; a float is its shortest decimal."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))
