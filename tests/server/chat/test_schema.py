"""JSON Schemas as grammars: what each lets be written, and what is refused, without a model."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from support.grammars import accepts

from pyllm.engine.errors import RequestError
from pyllm.server.chat.schema.patterns import Pattern
from pyllm.server.chat.structured_output import json_schema_grammar

BIG = 1180293847561029384


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog", "wolf"] = "dog"


class House(BaseModel):
    pets: list[Cat | Dog] = Field(max_length=2)
    best: Cat | Dog | None = Field(None, discriminator="kind")


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


NODE = {"type": "object", "properties": {"v": {"const": 1}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
REQUIRED_NODE = NODE | {"required": ["v", "next"]}
TWO = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
A, B = object_of(kind={"const": "a"}), object_of(kind={"enum": ["b", "c"]}, x={"type": "null"})
KA = {"type": "object", "patternProperties": {"^k[a-b]$": {"type": "boolean"}}, "additionalProperties": False}

ROWS: dict[str, tuple[Any, list[str], list[str]]] = {
    # What comes in, what may be written, what may not.
    "big enum": ({"enum": [BIG, -BIG]}, [f"{BIG}", f"-{BIG}"], ["1180293847561029376", f"{BIG}.0"]),
    "big const": ({"const": 2**100 + 1}, [str(2**100 + 1)], [str(2**100)]),
    "big minimum": ({"type": "integer", "minimum": BIG}, [f"{BIG}", f"{BIG}0"], [f"{BIG - 1}", "0"]),
    "big maximum": ({"type": "integer", "maximum": BIG}, [f"{BIG}", "0", "-7"], [f"{BIG + 1}"]),
    "big open": (
        {"type": "integer", "exclusiveMinimum": BIG, "exclusiveMaximum": BIG + 2}, [f"{BIG + 1}"],
        [f"{BIG}", f"{BIG + 2}"]
    ),
    "big number": ({"type": "number", "minimum": BIG}, [f"{BIG}", f"{BIG}.5"], [f"{BIG - 1}.9"]),
    "big multiple": ({"type": "integer", "multipleOf": BIG}, ["0", f"{BIG}", f"-{2 * BIG}"], [f"{BIG + 1}", "1"]),
    "multiples from a big number": (
        {"type": "integer", "minimum": BIG, "multipleOf": 8}, [f"{BIG}", f"{BIG + 8}"], [f"{BIG - 8}", f"{BIG + 4}"]
    ),
    "64 bits": ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [f"{-(2**63)}", "0"], [f"{2**63}"]),
    "above 0": (
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        ["0.5", "0.000001", "0.50"], ["0", "0.0", "-0", "0e5", "0.00", "0.51", "-0.1"],
    ),
    "below 0": (
        {"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, ["-0.5", "-0.01"],
        ["0", "-0", "-0.0", "0.1", "-0.6"]
    ),
    "small": ({"type": "number", "exclusiveMinimum": 1e-7, "maximum": 1e-4}, ["0.0001", "0.00000011"],
        ["0.0000001", "0"]),
    "below small": ({"type": "number", "exclusiveMaximum": -1e-7}, ["-0.0000002", "-3e20"], ["-0.0000001", "0", "1"]),
    "above 0 without end": ({"type": "number", "exclusiveMinimum": 0}, ["6.02e23", "1e-9", "3"], ["0", "0e5", "-1"]),
    "open as in draft 4": ({"type": "number", "minimum": 2, "exclusiveMinimum": True, "maximum": 3}, ["2.1"],
        ["2", "2.0"]),
    "all doubles": ({"type": "number", "minimum": -1.7976931348623157e308}, ["-1.5", "1e20", "7"], ["1e999"]),
    "bounded digits": ({"type": "number"}, ["1.5", "-2e-7", "0"], ["1" * 40, "0." + "1" * 40, "1e999", "01"]),
    "integer": ({"type": "integer"}, ["0", "-12", str(2**63 - 1)], ["1.0", "1e3", "1" * 20]),
    "cents": ({"type": "number", "minimum": 0, "multipleOf": 0.01}, ["0.29", "3", "1.1"], ["0.001", "-0.5"]),
    "not 5": ({"type": "integer", "not": {"const": 5}}, ["4", "55", "-5"], ["5"]),
    "two keys": (KA | {"minProperties": 2, "maxProperties": 2}, ['{"ka":true,"kb":false}'],
        ['{"ka":true,"ka":false}', "{}"]),
    "keys of an enum": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}},
        ["{}", '{"a":null,"b":null}'], ['{"c":null}', '{"a":null,"a":null}'],
    ),
    "key and pattern": (
        {"type": "object", "properties": {"xa": {"maxLength": 1}}, "patternProperties": {"^x": {"type": "string"}},
         "additionalProperties": {"type": "null"}},
        ['{"xa":"1","xb":"22","c":null}', "{}"], ['{"xa":"11"}', '{"xa":1}', '{"xb":null}', '{"c":"1"}'],
    ),
    "count": (
        {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
        ['{"a":null}', '{"a":null,"b":null}'], ["{}", '{"a":null,"b":null,"c":null}'],
    ),
    "listed keys are counted": (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "type": "object", "minProperties": 2},
        ['{"a":1,"c":3}', '{"a":1,"b":2,"c":3}'], ['{"a":1}', "{}"],
    ),
    "names only": ({"type": "object", "propertyNames": {"type": "string"}}, ['{"a":[1]}'], ["[]"]),
    "listed means all": ({"type": "object", "properties": {"a": {"const": 1}}}, ["{}", '{"a":1}'], ['{"b":1}']),
    "oneOf of refs": (
        TWO | {"$defs": {"a": A, "b": B}, "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/a"}}},
        ['{"kind":"a"}', '{"kind":"c","x":null}'], ['{"kind":"b"}', '{"kind":"a","x":null}'],
    ),
    "nested oneOf": (
        {"oneOf": [{"$ref": "#/$defs/two"}, {"type": "string"}], "$defs": {"two": TWO, "a": A, "b": B}},
        ['{"kind":"a"}', '"x"'], ['{"kind":"d"}'],
    ),
    "parts of an OpenAPI document": (
        {"$ref": "#/components/schemas/Pet", "openapi": "3.1.0",
         "components": {"schemas": {"Pet": {"type": "object", "properties": {"id": {"$ref": "#/components/parts/id"}}}},
                        "parts": {"id": {"type": "integer", "maximum": 9}}}},
        ["{}", '{"id":9}'], ['{"id":10}', '{"x":1}'],
    ),
    "annotations, and null": (
        {"type": "string", "maxLength": 2, "pattern": None, "enum": None, "deprecationMessage": "no", "rank": [1]},
        ['"ab"'], ['"abc"', "1"],
    ),
    "not an annotation": ({"not": {"type": "string", "label": "x"}}, ["1"], ['"a"']),
    "oneOf distinguished by what is required": (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}},
         "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a":1}', '{"b":2}'], ["{}", '{"a":1,"b":2}'],
    ),
    "oneOf distinguished by a default": (
        {"oneOf": [{"type": "object", "properties": {"k": {"const": n, "default": n}}} for n in "ab"]},
        ['{"k":"a"}', '{"k":"b"}'], ["{}"],
    ),
    "oneOf with null twice": ({"oneOf": [{"type": ["null", "string"]}, {"type": ["null", "integer"]}]}, ["1"],
        ["null"]),
    "oneOf of ranges": (
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4, "maximum": 9}]},
        ["3", "4"], ["10"]
    ),
    "pydantic": (
        House.model_json_schema(),
        ['{"pets":[{"kind":"cat","lives":9},{"kind":"wolf"}],"best":{"kind":"dog"}}', '{"pets":[],"best":null}',
        '{"pets":[],"best":{}}'],
        ['{"pets":[{"kind":"wolf","lives":9}]}', '{"pets":[],"best":{"kind":"cat"}}'],
    ),
    "OpenAPI's null": ({"type": "string", "nullable": True, "maxLength": 1}, ["null", '"a"'], ["1"]),
    "null next to allOf": ({"nullable": True, "allOf": [{"type": "integer"}]}, ["null", "3"], ['"a"']),
    "strict with an optional member": (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"],
         "additionalProperties": False}, ['{"b":2}', '{"a":1,"b":2}'], ['{"a":1}'],
    ),
    "array at the root": ({"type": "array", "items": A, "minItems": 1, "maxItems": 2}, ['[{"kind":"a"}]'],
        ["[]", "{}"]),
    "sibling of a ref": (
        {"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": {"type": "integer", "maximum": 5}}}, ["3", "5"], ["2", "6"]
    ),
    "allOf": (
        {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                   {"type": "object", "properties": {"a": {"minimum": 3, "maximum": 4}, "b": {"const": 0}}}]},
        ['{"a":3}', '{"a":4,"b":0}'], ['{"a":2}', '{"b":0}', "3"],
    ),
    "recursion": ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, ['{"v":1}', '{"v":1,"next":{"v":1}}'],
        ['{"next":{}}']),
    "recursion without an end is left out": (
        object_of(a={"const": 1}) | {"properties": {"a": {"const": 1}, "b": {"$ref": "#/$defs/node"}},
        "required": ["a"],
                                     "$defs": {"node": REQUIRED_NODE}}, ['{"a":1}'], ['{"a":1,"b":{"v":1}}'],
    ),
    "by id": ({"$ref": "it", "$defs": {"x": {"$id": "it", "const": 1}}}, ["1"], ["2"]),
    "pointer": ({"properties": {"a/b": {"const": 1}, "c": {"$ref": "#/properties/a~1b"}}, "type": "object"},
        ['{"c":1}'], []),
    "names like keywords": (
        {"type": "object", "properties": {"a": {"items": {"const": 1}, "type": "array"}, "a.items": {"const": 2}},
         "required": ["a", "a.items"]}, ['{"a":[1],"a.items":2}'], ['{"a":[2],"a.items":2}', '{"a":[],"a.items":1}'],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1,
        "maxItems": 4},
        ["[1]", "[1,2,3,3]"], ["[]", "[2]", "[1,2,3,3,3]"],
    ),
    "draft 7 tuple": ({"type": "array", "items": [{"const": 1}], "additionalItems": False}, ["[]", "[1]"], ["[1,1]"]),
    "set": ({"type": "array", "uniqueItems": True, "items": {"enum": ["a", 1]}}, ["[]", '["a",1]'], ["[1,1]"]),
    "no set": ({"type": "array", "uniqueItems": False, "items": {"const": 1}}, ["[1,1]"], []),
    "dependent": (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependentRequired": {"a": ["b"]}},
        ["{}", '{"b":2}', '{"a":1,"b":2}'], ['{"a":1}'],
    ),
    "if": (
        {"type": "object", "properties": {"k": {"enum": ["x", "y"]}, "n": {"type": "integer"}}, "required": ["k"],
         "if": {"properties": {"k": {"const": "x"}}}, "then": {"required": ["n"]},
         "else": {"properties": {"n": False}}},
        ['{"k":"x","n":1}', '{"k":"y"}'], ['{"k":"x"}', '{"k":"y","n":1}'],
    ),
    "not a string of these": ({"type": "string", "not": {"enum": ["a", "b"]}, "maxLength": 1}, ['"c"', '""'], ['"a"']),
    "const object": ({"const": {"a": [1, {}], "b": None}}, ['{"a":[1,{}],"b":null}'], ['{"a":[1],"b":null}']),
    "enum and type": ({"type": ["string", "null"], "enum": ["a", None, 3, [1]]}, ['"a"', "null"], ["3", "[1]"]),
    "quotes": ({"enum": ['say "x"', "a\nb", "\ud800", "/"]}, ['"say \\"x\\""', '"a\\nb"', '"\\ud800"', '"/"'], ['"a"']),
    "annotated": ({"type": "string", "format": "binary", "contentEncoding": "base64"}, ['"x\\n"'], ["1"]),
    "format of a number": ({"type": "integer", "format": "int32"}, ["5"], ['"5"']),
    "dates exist": (
        {"type": "string", "format": "date"}, ['"2024-02-29"', '"1999-12-31"'],
        ['"2023-02-29"', '"2024-04-31"', '"0000-01-01"']
    ),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "maxLength": 2}, ['"aa"'], ['"aaa"', '"b"', '""']),
    "pattern in the middle": ({"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xa"']),
    "pattern with escapes": ({"type": "string", "pattern": "^a\\\\b$"}, ['"a\\\\b"'], ['"ab"']),
    "Decimal": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,2}$|(?=[\d.]{1,5}0*$)\d{0,2}\.\d{0,2}0*$)"},
        ['"-1.25"', '"12"', '".5"'], ['""', '"+"', '"123"', '"1.234"', '"."'],
    ),
    "unevaluated": (
        {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}}], "unevaluatedProperties": False},
        ['{"a":1}'], ['{"b":1}']
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_schema_allows_what_is_valid_and_no_more(name: str) -> None:
    schema, right, wrong = ROWS[name]
    grammar = json_schema_grammar(schema)
    assert {text: accepts(grammar, text) for text in [*right, *wrong]} == dict.fromkeys(right, True) | dict.fromkeys(
        wrong, False
    )


FORMATS = [
    "path", "binary", "password", "byte", "decimal", "regex", "uri-reference", "int32", "float", "double", "anything",
]  # fmt: skip


@pytest.mark.parametrize("format_", FORMATS)
def test_what_only_describes_is_let_through(format_: str) -> None:
    assert accepts(json_schema_grammar({"type": "string", "format": format_}), '"(x"')


REFUSED = {
    "properties.tags.uniqueItems": object_of(tags={"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
    "properties.a.not": object_of(a={"not": {"uniqueItems": True}}),
    "Pet has the unsupported keyword 'contains'": {
        "$ref": "#/components/schemas/Pet", "components": {"schemas": {"Pet": {"contains": {}}}}
    },
    "properties.x has the unsupported keyword 'contains'": {"anyOf": [True, {"properties": {"x": {"contains": {}}}}]},
    "properties.id.multipleOf": object_of(id={"type": "integer", "multipleOf": 7, "minimum": BIG}),
    "properties.id.minimum": object_of(id={"minimum": "1"}),
    "items.pattern": {"items": {"pattern": "a\\b"}},
    "oneOf cannot": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "oneOf[0] and oneOf[1]": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 9}]},
    "properties.a.$ref refers to '#/$defs/none'": object_of(a={"$ref": "#/$defs/none"}),
    "refers to itself": {"$ref": "#"},
    "minimum above its maximum": {"type": "integer", "minimum": 5, "maximum": 3},
    "no text satisfies it": {"$ref": "#/$defs/node", "$defs": {"node": REQUIRED_NODE}},
    "type is 'nonsense'": {"type": "nonsense"},
    "unsupported keyword '!open'": {"properties": {"a": True}, "!open": True},
    "'maxlength', which may be meant as 'maxLength'.": {"type": "string", "maxlength": 3},
    "required must be a list": {"properties": {"a": {"required": True}}},
    "minItems": {"type": "array", "minItems": 10**9},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_refusal_names_the_place_in_the_schema(words: str) -> None:
    with pytest.raises(RequestError) as caught:
        json_schema_grammar(REFUSED[words], "response_format")
    assert words in str(caught.value)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 500


def test_a_schema_that_would_explode_is_refused() -> None:
    names = [f"p{n}" for n in range(3000)]
    many = {"type": "object", "properties": dict.fromkeys(names, True), "minProperties": 1500}
    unions = {
        "oneOf": [{"type": "object", "properties": {name: {"minLength": n} for name in names[:99]}} for n in range(150)]
    }
    for schema in (many, unions):
        with pytest.raises(RequestError):
            json_schema_grammar(schema)


def _chain(count: int) -> dict[str, Any]:
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": {"type": "null"}}}


LARGE: dict[str, dict[str, Any]] = {
    "numbers but some": {"type": "number", "not": {"enum": [*range(4000)]}},
    "values but others": {"enum": [*range(9000)], "not": {"enum": [*range(9000, 18000)]}},
    "patterns for names": {"type": "object", "patternProperties": {f"^a{n}": True for n in range(2000)}},
    "a long name above many": {"properties": {"x" * 60_000: object_of(**{f"a{n}": True for n in range(900)})}},
    "a chain of references": _chain(4000),
    "parts about different members": {
        "allOf": [{"type": "object", "properties": {f"a{n}": True}} for n in range(4000)]
    },
    "parts about different items": {"allOf": [{"type": "array", "prefixItems": [True]}] * 9000 + [
        {"prefixItems": [True] * 5000}]},
    "patterns in the last part": {"allOf": [{"type": "object"}] * 5000 + [{
        "properties": {f"a{n}": True for n in range(100)}, "patternProperties": {f"^b{n}": True for n in range(100)}}]},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_schema_takes_little_time_and_memory(name: str) -> None:
    """In proportion to the schema: each of these took minutes, or hundreds of megabytes."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with contextlib.suppress(RequestError):
            json_schema_grammar(LARGE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20
    assert time.process_time() - started < 20, "much of it for tracing the memory"


def test_a_pattern_lists_its_words_if_they_are_few() -> None:
    assert Pattern("^k[a-c]$").words(9) == ["ka", "kb", "kc"]
    assert Pattern("^(x|y)?[01]{2}$").words(99) == [
        "00",
        "01",
        "10",
        "11",
        *(x + y + z for x in "xy" for y in "01" for z in "01"),
    ]
    assert Pattern("^a?$").words(9) == ["", "a"]
    for text in ("^a+$", "a", "^[a-z]{3}$", "^a{2,}$", "^\\d$|b"):
        assert Pattern(text).words(60) is None, text


def test_the_grammar_of_anything_is_json() -> None:
    grammar = json_schema_grammar({})
    for text in ("null", '[1,{"a":[]}]', '{"a":{"b":"\\u0007"}}', "[ ]", '{\n  "a": 1\n}'):
        assert accepts(grammar, text), text
    for text in ("", "{,}", "[1,]", '{"a"}', "nul"):
        assert not accepts(grammar, text), text
