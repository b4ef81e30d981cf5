"""The keywords of JSON Schema that have an effect, and the shape of their values."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from ...http.errors import shorten

ALL_TYPES = ("null", "boolean", "number", "string", "array", "object")
SUBSCHEMAS = {
    "additionalItems",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
}
SUBSCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
SUBSCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
COUNTS = {f"{bound}{what}" for bound in ("min", "max") for what in ("Length", "Items", "Properties")}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
TEXTS = {"pattern", "format", "$ref", "$id", "id", "$anchor", "$schema"}
FLAGS = {"uniqueItems", "nullable"}
ENFORCED = {
    *SUBSCHEMAS, *SUBSCHEMA_LISTS, *SUBSCHEMA_MAPS, *COUNTS, *NUMBERS, *TEXTS, *FLAGS, "items", "const", "enum", "type",
    "required", "dependentRequired", "dependencies",
}  # fmt: skip
# Keywords, of any draft, that constrain a value and cannot be enforced.
REFUSED = {
    "contains", "minContains", "maxContains", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "extends", "disallow",
    "divisibleBy", "formatMinimum", "formatMaximum", "formatExclusiveMinimum", "formatExclusiveMaximum",
}  # fmt: skip
MAX_KEYWORD = 40  # characters of one that may be misspelled
MAX_STEP = 60  # characters of a name in a path
LISTED = "must be a list of different strings"


def brief(name: str) -> str:
    """Return a member's name as a step of a path: every part below it repeats it, so a long one is cut and hashed."""
    return name if len(name) <= MAX_STEP else f"{name[:MAX_STEP]}…{hash(name) & 2**48 - 1:x}"


def is_enforced(keyword: str, value: Any) -> bool:
    """Whether a keyword with this value constrains the valid values."""
    return keyword in ENFORCED and (value is not None or keyword == "const")


def check_keywords(schema: Any, path: str, checked: set[int]) -> Iterator[tuple[tuple[Any, str], str]]:
    """Yield the schemas with an id or an anchor of their own, as ((schema, path), name).

    Any other keyword is an annotation, as JSON Schema has it, unless it looks like a misspelling; null has no effect.
    Raises `ValueError` with the place of a keyword that cannot be enforced, or of a value that its keyword cannot have.
    `checked` collects the `id` of each schema, which is then skipped.
    """
    pending: list[tuple[Any, str]] = [(schema, path)]
    while pending:
        node, path = pending.pop()
        if isinstance(node, bool) or id(node) in checked:
            continue
        if not isinstance(node, dict):
            raise ValueError(f"{path} must be an object or a boolean, but is {shorten(repr(node))}")
        checked.add(id(node))
        for keyword, value in node.items():
            where = f"{path}.{keyword}" if path else keyword
            if refusal := _refusal(keyword):
                raise ValueError(f"{path or 'the root'} {refusal}")
            if not is_enforced(keyword, value):
                continue
            if problem := _problem(keyword, value):
                raise ValueError(f"{shorten(where)} {problem}")
            if keyword in SUBSCHEMAS or (keyword == "items" and not isinstance(value, list)):
                pending.append((value, where))
            elif keyword in SUBSCHEMA_LISTS or keyword == "items":
                pending += [(item, f"{where}[{n}]") for n, item in enumerate(value)]
            elif keyword in SUBSCHEMA_MAPS or keyword == "dependencies":
                inner = ((one, f"{where}.{brief(name)}") for name, one in value.items() if not isinstance(one, list))
                pending += inner
        for keyword, sign in (("$id", ""), ("id", ""), ("$anchor", "#")):
            if isinstance(name := node.get(keyword), str):
                yield (node, path), sign + name


@lru_cache(1000)
def _refusal(keyword: str) -> str:
    """Return why a keyword that is not enforced cannot be ignored, "" if it can."""
    if keyword in REFUSED or keyword.startswith("!"):  # as derived schemas have them
        return f"has the unsupported keyword {shorten(keyword)!r}"
    near = [] if keyword in ENFORCED or len(keyword) > MAX_KEYWORD else get_close_matches(keyword, ENFORCED, 1, 0.87)
    return f"has the unknown keyword {keyword!r}, which may be meant as {near[0]!r}" if near else ""


def _problem(keyword: str, value: Any) -> str:
    """Return the problem with a keyword's value, "" for none."""
    shown = shorten(repr(value))
    if keyword in SUBSCHEMA_LISTS and not (isinstance(value, list) and (value or keyword == "prefixItems")):
        return f"must be a list of schemas, but is {shown}"
    if keyword in SUBSCHEMA_MAPS | {"dependencies", "dependentRequired"} and not isinstance(value, dict):
        return f"must be an object, but is {shown}"
    if keyword in COUNTS and not (isinstance(value, (int, float)) and value >= 0 and value == int(value)):
        return f"must be a whole number that is not negative, but is {shown}"
    if keyword in TEXTS and not isinstance(value, str):
        return f"must be a string, but is {shown}"
    if keyword in FLAGS and not isinstance(value, bool):
        return f"must be true or false, but is {shown}"
    if keyword in NUMBERS:
        draft4 = keyword.startswith("exclusive") and isinstance(value, bool)
        if not draft4 and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"must be a number, but is {shown}"
        if keyword == "multipleOf" and value <= 0:
            return f"must be greater than 0, but is {shown}"
    if keyword == "enum" and not (isinstance(value, list) and value):
        return "must be a list of at least one value"
    if keyword == "type":
        kinds = value if isinstance(value, list) and value else [value]
        wrong = [kind for kind in kinds if kind not in (*ALL_TYPES, "integer")]
        return f"is {shorten(repr(wrong[0]))}, which is not a type of JSON" if wrong else ""
    lists = [value] if keyword == "required" else list(value.values()) if keyword == "dependentRequired" else []
    if keyword == "dependencies":
        lists = [one for one in value.values() if isinstance(one, list)]
    return "" if all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in lists) else LISTED
