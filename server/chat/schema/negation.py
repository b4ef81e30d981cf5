"""The opposite of a JSON Schema, for `not` and `if`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .keywords import ALL_TYPES, is_enforced

# The opposite keyword, for values of the keyword's type.
FLIPPED = {"minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum", "exclusiveMinimum": "maximum"}
FLIPPED |= {"exclusiveMaximum": "minimum"}
COUNTS = {"Length": "string", "Items": "array", "Properties": "object"}
MAX_DEPTH = 20


class UnsupportedNegationError(Exception):
    """A schema has no opposite that can be written; the message names the obstacle."""


def negate(schema: Any, resolve: Callable[[str], Any], depth: int = 0) -> Any:
    """Return a schema for the values that are not valid; raise `UnsupportedNegationError` if none can be written."""
    if depth > MAX_DEPTH:
        raise UnsupportedNegationError("a schema that is so deep")
    if isinstance(schema, bool):
        return not schema
    opposites = [
        _opposite(keyword, value, schema, lambda inner: negate(inner, resolve, depth + 1), resolve)
        for keyword, value in schema.items()
        if keyword.startswith("!") or is_enforced(keyword, value)
    ]
    return {"anyOf": opposites} if opposites else False


def _opposite(
    keyword: str, value: Any, schema: dict[str, Any], opposite: Callable[[Any], Any], resolve: Callable[[str], Any]
) -> Any:
    """Return a schema for the values that a keyword rules out."""
    match keyword:
        case "type":
            kinds = [value] if isinstance(value, str) else value
            if "integer" in kinds and "number" not in kinds:
                raise UnsupportedNegationError("the type 'integer'")
            return {"type": others} if (others := [kind for kind in ALL_TYPES if kind not in kinds]) else False
        case "const" | "enum":
            values = [value] if keyword == "const" else value
            if any(isinstance(one, (dict, list)) for one in values):
                raise UnsupportedNegationError("an array or object as a value")
            return {"!enum": values}
        case "required":
            return {"anyOf": [{"type": "object", "properties": {name: False}, "!open": True} for name in value]}
        case "properties":
            return {"anyOf": [
                {"type": "object", "required": [name], "properties": {name: opposite(one)}, "!open": True}
                for name, one in value.items()
            ]}  # fmt: skip
        case "anyOf":
            return {"allOf": [opposite(one) for one in value]}
        case "allOf":
            return {"anyOf": [opposite(one) for one in value]}
        case "not":
            return value
        case "$ref":
            return opposite(resolve(value))
        case "pattern":
            return {"type": "string", "!pattern": value}
    if keyword in FLIPPED and not any(isinstance(schema.get(name), bool) for name in FLIPPED):
        return {"type": "number", FLIPPED[keyword]: value}
    for what, kind in COUNTS.items():
        if keyword == f"min{what}":
            return {"type": kind, f"max{what}": value - 1} if value else False
        if keyword == f"max{what}":
            return {"type": kind, f"min{what}": value + 1}
    raise UnsupportedNegationError(repr(keyword))
