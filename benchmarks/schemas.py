"""The list of 2,000 JSON Schemas that structured output is checked with: what clients really send, of twelve kinds.

The list follows from `SEED` alone, and `DIGEST` holds it fixed: a change of this file or of pydantic's output shows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, Optional, Union
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import _decimal_validation_pattern

SEED = 20261130
NUM_SCHEMAS = 2000
DIGEST = "02ec22bdc1c9bf10311c12ffd927f9408d219b4a6ed873158b3ab62f8835e218"
Schema = dict[str, Any]
Draw = random.Random

WORDS = ["name", "kind", "price", "größe", "x_y", "note", "id", "city", "tags", "type", "value", 'q"t', "unit", "state"]
PATTERNS = [
    "^[a-z]{1,6}$",
    "^\\d{3}-\\d{2}$",
    "^(red|green|blue)$",
    "^[A-F0-9]{2,8}$",
    "^(?=.*\\d)[a-z0-9]{4,8}$",
    "^v\\d+$",
]
ANNOTATIONS = [
    "path", "binary", "password", "byte", "decimal", "regex", "uri-reference", "json-pointer", "int32", "int64",
    "float",
    "double", "phone", "color", "iri", "idn-email", "relative-json-pointer", "uri-template", "file-path", "currency",
]  # fmt: skip


class Color(Enum):
    RED = "red"
    GREEN = "green"


def _names(draw: Draw, low: int, high: int) -> list[str]:
    return draw.sample([word for word in WORDS if word.isidentifier()], draw.randint(low, high))


def _model(draw: Draw, fields: dict[str, Any]) -> Schema:
    """A pydantic model's schema; a third of them forbid other members, as OpenAI's helpers write them."""
    config = ConfigDict(extra="forbid") if draw.random() < 0.4 else ConfigDict()
    return create_model(f"Model{draw.randint(0, 9)}", __config__=config, **fields).model_json_schema()


def _scalar(draw: Draw) -> Any:
    low = draw.randint(-50, 50)
    return draw.choice([
        Annotated[int, Field(ge=low, le=low + draw.choice([0, 3, 900]))], Annotated[float, Field(gt=low, lt=low + 1)],
        Annotated[str, Field(max_length=draw.randint(1, 12))], bool, Literal["a", "b"], Color, int, date,
        Annotated[str, Field(pattern=draw.choice(PATTERNS[:4]))], Annotated[float, Field(ge=0, multiple_of=0.5)],
    ])  # fmt: skip


def _fields(draw: Draw, low: int, high: int) -> dict[str, Any]:
    return {name: (_scalar(draw), ... if draw.random() < 0.7 else None) for name in _names(draw, low, high)}


def discriminated_union(draw: Draw) -> Schema:
    key, number = draw.choice(["kind", "type", "op"]), draw.randint(2, 4)

    def options(prefix: str, key: str, number: int) -> list[Any]:
        return [
            create_model(f"{prefix}{n}", **{**_fields(draw, 0, 2), key: (Literal[f"{prefix.lower()}{n}"], ...)})
            if draw.random() < 0.8 else
            create_model(f"{prefix}{n}", **{key: (Literal[f"{prefix.lower()}{n}", f"or{n}"], f"or{n}")})
            for n in range(number)
        ]  # fmt: skip

    choices = options("Cat", key, number)
    if draw.random() < 0.3:
        inner = Annotated[Union[tuple(options("Sub", "color", 2))], Field(discriminator="color")]  # noqa: UP007
        choices[0] = create_model("Cat0", **{key: (Literal["cat0"], ...), "sub": (inner, ...)})
    union: Any = Annotated[Union[tuple(choices)], Field(discriminator=key)]  # noqa: UP007
    shape = draw.choice(["field", "list", "optional", "inline"])
    if shape == "field":
        return _model(draw, {"pet": (union, ...), **_fields(draw, 0, 1)})
    if shape == "list":
        return _model(draw, {"pets": (Annotated[list[union], Field(min_length=1, max_length=3)], ...)})
    if shape == "optional":
        return _model(draw, {"pet": (Optional[union], None)})  # noqa: UP045
    members = [
        {"type": "object", "properties": {key: draw.choice([{"const": f"c{n}"}, {"enum": [f"c{n}", f"d{n}"]}]),
         "n": {"type": "integer", "minimum": 0, "maximum": n}}, "required": [key]} for n in range(number)
    ]  # fmt: skip
    return {"oneOf": members, "discriminator": {"propertyName": key}}


def decimals(draw: Draw) -> Schema:
    digits = draw.randint(1, 3)
    kinds: list[Any] = [
        Decimal, Annotated[Decimal, Field(ge=0, le=1000)], Annotated[Decimal, Field(gt=0)],
        Annotated[Decimal, Field(max_digits=digits + 4, decimal_places=digits)], Optional[Decimal],  # noqa: UP045
        Annotated[Decimal, Field(gt=Decimal("-0.001"), lt=Decimal("0.001"))],
    ]  # fmt: skip
    if draw.random() < 0.5:
        return _model(draw, {name: (draw.choice(kinds), ...) for name in _names(draw, 1, 3)})
    # As pydantic wrote them up to 2.12, and as it writes them when asked to.
    limited = rf"(?:\d{{0,{digits}}}|(?=[\d.]{{1,{digits + 3}}}0*$)\d{{0,{digits}}}\.\d{{0,2}}0*$)"
    patterns = [rf"^(?!^[-+.]*$)[+-]?0*{end}" for end in (r"\d*\.?\d*$", rf"\d*\.?\d{{0,{digits}}}0*$", limited)]
    patterns += [_decimal_validation_pattern(digits + 2, digits, False), _decimal_validation_pattern(None, None, False)]
    properties = {name: {"anyOf": [{"type": "number", "minimum": -digits}, {"type": "string", "pattern": pattern}]}
                  for name, pattern in zip(_names(draw, 2, 2), draw.sample(patterns, 2), strict=True)}  # fmt: skip
    return {"type": "object", "properties": properties, "required": list(properties)}


def dates(draw: Draw) -> Schema:
    kinds: list[Any] = [date, datetime, time, timedelta, UUID, Optional[date], Optional[datetime]]  # noqa: UP045
    if draw.random() < 0.3:
        form = draw.choice(
            ["date", "time", "date-time", "duration", "ipv4", "ipv6", "email", "hostname", "uuid", "uri"]
        )
        return {"type": "array", "items": {"type": "string", "format": form}, "minItems": 1, "maxItems": 2}
    return _model(draw, {name: (draw.choice(kinds), ...) for name in _names(draw, 1, 3)})


def nested_optionals(draw: Draw) -> Schema:
    def layer(depth: int) -> type[BaseModel]:
        fields: dict[str, Any] = {
            name: (Optional[_scalar(draw)], draw.choice([None, ...])) for name in _names(draw, 0, 2)  # noqa: UP045
        }  # fmt: skip
        if depth:
            inner = layer(depth - 1)
            fields["inner"] = (draw.choice([Optional[inner], Optional[list[inner]], inner]), None)  # noqa: UP045
        return create_model(f"Layer{depth}", **fields)

    return layer(draw.randint(1, 4)).model_json_schema()


def big_ids(draw: Draw) -> Schema:
    def number() -> int:
        return draw.choice([1, 1, -1]) * draw.randrange(10 ** draw.randint(16, 30))

    big = number()
    shape = draw.choice(["enum", "const", "bounds", "open", "exclusive", "multiple", "literal"])
    if shape == "literal":
        values = tuple(number() for _ in range(3))
        return _model(
            draw, {"id": (Literal[values], ...), "ids": (Annotated[list[Literal[values]], Field(max_length=2)], [])}
        )
    schema: Schema = {
        "enum": {"enum": [number() for _ in range(draw.randint(1, 4))] + draw.choice([[], ["x", None]])},
        "const": {"const": big}, "bounds": {"type": "integer", "minimum": big, "maximum": big + draw.randrange(10**9)},
        "open": {"type": draw.choice(["integer", "number"]), draw.choice(["minimum", "maximum"]): big},
        "exclusive": {"type": "integer", "exclusiveMinimum": big, "exclusiveMaximum": big + 2 + draw.randrange(99)},
        "multiple": {"type": "integer", "minimum": 0, "multipleOf": abs(big) or 1, "maximum": abs(big) * 5},
    }[shape]  # fmt: skip
    return {"type": "object", "properties": {"id": schema}, "required": ["id"], "additionalProperties": False}


def openapi_fragment(draw: Draw) -> Schema:
    base = {"type": "object", "properties": {"id": {"type": "integer", "format": "int64", "example": 10,
            "minimum": draw.randint(0, 9)}, "name": {"type": "string", "example": "doggie",
            "maxLength": draw.randint(1, 20), "nullable": draw.random() < 0.5}},
            "required": ["name"], "xml": {"name": "pet"}}  # fmt: skip
    status = {"type": "string", "enum": ["available", "pending", "sold"], "description": "status in the store"}
    more = {
        "type": "object",
        "properties": {
            "status": status,
            "photo": {"type": "string", "format": "uri", "maxLength": 60},
            "weight": {
                "type": "number",
                "format": draw.choice(["float", "double"]),
                "minimum": 0,
                "exclusiveMinimum": True,
            },
        },
    }
    shape = draw.choice(["allOf", "nullable", "plain", "oneOf", "map", "anyOf"])
    definitions = {"Base": base, "Status": status, "More": more}
    body: Schema = {
        "allOf": {"allOf": [{"$ref": "#/definitions/Base"}, more, {"required": ["status"]}]},
        "nullable": {"type": "object", "properties": {"pet": {"nullable": True,
        "allOf": [{"$ref": "#/definitions/Base"}]},
                     "status": {**status, "nullable": True, "enum": [*status["enum"], None]}}, "required": ["pet"]},
        "plain": {"type": "object", "properties": {"pet": {"$ref": "#/definitions/Base", "description": "The pet."},
                  "more": more, "code": {"type": "integer", "format": "int32", "readOnly": True}}},
        "oneOf": {"oneOf": [
            {"allOf": [{"$ref": "#/definitions/Base"}, {"properties": {"pet": {"enum": [kind]}}, "required": ["pet"]}]}
            for kind in ("cat", "dog")], "discriminator": {"propertyName": "pet", "mapping": {"cat": "#/x",
            "dog": "#/y"}}},
        "map": {"type": "object", "additionalProperties": {"$ref": "#/definitions/Status"}, "maxProperties": 4},
        "anyOf": {"anyOf": [{"$ref": "#/definitions/Base"}, {"$ref": "#/definitions/Status"}, {"type": "null"}]},
    }[shape]  # fmt: skip
    return {**body, "definitions": definitions, "externalDocs": {"url": "https://example.com"}, "x-order": 3}


def recursive(draw: Draw) -> Schema:
    limit, name = {"maxItems": draw.randint(0, 2)}, draw.choice(WORDS[:5])
    shape = draw.choice(["tree", "list", "expression", "root", "mutual"])
    value = draw.choice([{"type": "integer", "minimum": draw.randint(0, 9)}, {"enum": [1, "x", None]},
                         {"type": "string", "maxLength": draw.randint(1, 9)}])  # fmt: skip
    if shape == "root":
        return {"type": "object", "properties": {name: value, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
                "required": [name, "next"], "additionalProperties": False}  # fmt: skip
    node: Schema = {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
    if shape == "tree":
        node["properties"]["children"] = {"type": "array", "items": {"$ref": "#/$defs/node"}, **limit}
    elif shape == "list":
        node["properties"]["next"] = {"$ref": "#/$defs/node", "description": "the rest"}
    elif shape == "mutual":
        other = {"type": "object", "properties": {"node": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
        node["properties"]["other"] = {"$ref": "#/$defs/other"}
        return {"$defs": {"node": node, "other": other}, "$ref": "#/$defs/node"}
    else:
        leaf = {
            "type": "object",
            "properties": {"op": {"const": "number"}, "n": value},
            "required": ["op", "n"],
        }
        pair = {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1, "maxItems": 2}
        plus = {
            "type": "object",
            "properties": {"op": {"enum": ["plus", "minus"]}, "of": pair},
            "required": ["op", "of"],
        }
        node = {"oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/plus"}], "discriminator": {"propertyName": "op"}}
        return {"$defs": {"node": node, "leaf": leaf, "plus": plus}, "$ref": "#/$defs/node"}
    return {
        "$defs": {"node": node},
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
    }


def arrays(draw: Draw) -> Schema:
    low = draw.randint(0, 3)
    item = draw.choice([
        {"type": "integer", "minimum": -5, "maximum": 70}, {"type": "string", "maxLength": 5}, {"enum": ["a", 2, None]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, {"type": ["number", "null"]},
        {"type": "object", "properties": {"x": {"type": "number", "minimum": 0}}, "required": ["x"]},
    ])  # fmt: skip
    shape = draw.choice(["items", "prefix", "set", "open", "draft7", "pydantic"])
    if shape == "items":
        return {"type": "array", "items": item, "minItems": low, "maxItems": low + draw.randint(0, 4)}
    if shape == "prefix":
        return {
            "type": "array",
            "prefixItems": [item, {"type": "boolean"}],
            "items": False,
            "minItems": draw.randint(0, 2),
        }
    if shape == "draft7":
        return {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [item,
        {"type": "null"}],
                "additionalItems": draw.choice([False, {"type": "boolean"}]), "minItems": 1, "maxItems": 3}  # fmt: skip
    if shape == "set":
        return {"type": "array", "items": {"enum": ["red", "green", "blue", 7]}, "uniqueItems": True, "minItems": low}
    if shape == "open":
        return {"type": "array", "items": item, "uniqueItems": False}
    return _model(draw, {"a": (Annotated[list[_scalar(draw)], Field(min_length=low, max_length=low + 2)], ...),
                         "t": (tuple[int, str], ...), "s": (set[Color], ...)})  # fmt: skip


def numbers(draw: Draw) -> Schema:
    edge = draw.choice([0, 0, 1e-4, 1e-7, 0.1, 1, 12.5, 1e6, 3.14159])
    sign = draw.choice([1, -1])
    near, far = ("exclusiveMinimum", "maximum") if sign > 0 else ("exclusiveMaximum", "minimum")
    wide = edge + draw.choice([1e-7, 1e-4, 0.5, 3, 1e9])
    return draw.choice([
        {"type": "number", near: sign * edge, far: sign * wide}, {"type": "number", near: sign * edge},
        {"type": "number", far: sign * edge}, {"type": "number"}, {"type": "integer"},
        {"type": "number", "exclusiveMinimum": -edge, "exclusiveMaximum": wide},
        {"type": "number", "minimum": 0, "multipleOf": draw.choice([0.01, 0.25, 5])},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "multipleOf": draw.choice([2, 7, 10, 60])}, {"type": ["integer", "null"], near: sign * 3},
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
    ])  # fmt: skip


def maps(draw: Draw) -> Schema:
    value = draw.choice([{"type": "boolean"}, {"type": "integer"}, {"type": "string", "maxLength": 3}])
    low = draw.randint(0, 2)
    return draw.choice([
        {"type": "object", "additionalProperties": value, "minProperties": low,
        "maxProperties": low + draw.randint(0, 3)},
        {"type": "object", "patternProperties": {"^k[a-c]$": value}, "additionalProperties": False,
        "minProperties": low},
        {"type": "object", "patternProperties": {"^x-": value}, "properties": {"a": {"type": "null"}},
         "additionalProperties": draw.choice([False, {"type": "null"}])},
        {"type": "object", "additionalProperties": value, "propertyNames": {"type": "string"}},
        {"type": "object", "additionalProperties": value, "propertyNames": {"pattern": "^[a-z]+$", "maxLength": 6}},
        {"type": "object", "additionalProperties": True, "properties": {"a": value}, "required": ["a"]},
        _model(draw, {"m": (dict[str, int], ...)}), _model(draw, {"m": (dict[Literal["a", "b"], float], ...)}),
    ])  # fmt: skip


def texts(draw: Draw) -> Schema:
    low = draw.randint(0, 4)
    return draw.choice([
        {"type": "string", "format": draw.choice(ANNOTATIONS), "maxLength": 20},
        {"enum": ["a", 'say "x"', "é\n", "", 1.5]},
        {"type": "string", "pattern": draw.choice(PATTERNS)},
        {"type": "string", "minLength": low, "maxLength": low + 9},
        {"type": "string", "pattern": "^[a-z0-9]+$", "minLength": low + 1, "maxLength": low + 3},
        {"type": "string", "enum": ["yes", "no"], "nullable": draw.random() < 0.5},
        {"const": draw.choice(["a", True, 0.1])},
        {"type": "string", "pattern": "^a|z$", "maxLength": draw.randint(1, 9)},
        {"type": ["string", "null"], "maxLength": 3},
    ])  # fmt: skip


def mixtures(draw: Draw) -> Schema:
    names = draw.sample(WORDS, draw.randint(1, 4))
    parts = [arrays, numbers, texts, big_ids, dates]
    properties = {name: _inlined(draw.choice(parts)(draw)) for name in names}
    required = [name for name in names if draw.random() < 0.6]
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    extra = draw.choice([
        {"additionalProperties": False}, {"dependentRequired": {names[0]: names[-1:]}},
        {"minProperties": len(required)}, {},
        {"unevaluatedProperties": False}, {"$comment": "x", "deprecated": True, "default": {}, "examples": [{}]},
        {"allOf": [{"required": names[:1]}]}, {"propertyNames": {"minLength": 1}},
    ])  # fmt: skip
    return schema | extra


def _inlined(schema: Schema) -> Schema:
    """A schema that can be part of another: those with definitions become an integer."""
    return {"type": "integer"} if "$defs" in schema else {k: v for k, v in schema.items() if k != "$schema"}


KINDS: dict[Callable[[Draw], Schema], int] = {
    discriminated_union: 190, decimals: 190, dates: 190, nested_optionals: 190, big_ids: 190, openapi_fragment: 190,
    recursive: 190, arrays: 190, numbers: 120, maps: 120, texts: 120, mixtures: 120,
}  # fmt: skip


def schemas() -> list[tuple[str, Schema]]:
    """The list: the kind and the schema of each; raises `RuntimeError` if it is no longer the one that was fixed."""
    draw, found = Draw(SEED), {}
    for kind, number in KINDS.items():
        for _ in range(number):
            for _ in range(100):  # as far as the kind has so many different ones
                schema = kind(draw)
                text = json.dumps(schema)
                if text not in found:
                    break
            found[text if text not in found else f"{text} again {len(found)}"] = (kind.__name__, schema)
    listed = list(found.values())
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    if digest != DIGEST:
        raise RuntimeError(f"the list of schemas has changed: its digest is {digest}")
    return listed
