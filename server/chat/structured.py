"""What a request asks of the text's form, as a grammar for the engine.

A schema is always enforced, `strict` or not: every text that ends by itself is valid against it. A keyword that cannot
be enforced is refused; only those that describe and demand nothing are left aside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance

from ...engine.errors import RequestError
from ..http.errors import shorten

MAX_SCHEMA_BYTES = 256 << 10
MAX_GRAMMAR_BYTES = 64 << 10
"""Of a regular expression, a Lark grammar, or all choices together."""
MAX_CHOICES = 2000
MAX_DEPTH = 64
MAX_NODES = 20_000

# Wherever JSON allows white space: nothing, a space, or a new line and an indent. A model that writes compact, spaced
# or indented JSON keeps its habit, and one that has none cannot go on with white space for ever.
WHITE_SPACE = r" |\n {0,32}|\n\t{0,8}"

SUBSCHEMA = ("items", "additionalItems", "additionalProperties")
SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
ENFORCED = {
    *SUBSCHEMA, *SUBSCHEMA_LISTS, *SUBSCHEMA_MAPS, "$ref", "$id", "id", "$anchor", "$schema", "const", "enum", "type",
    "minItems", "maxItems", "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
DESCRIPTIVE = {
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml",
}  # fmt: skip


def json_schema_grammar(schema: dict[str, Any], strict: bool = False, param: str | None = None) -> str:
    """A grammar for the JSON values that are valid against `schema`.

    Args:
        schema: JSON Schema, of any draft.
        strict: demand what OpenAI demands of strict schemas: an object at the root, and of each object
            `additionalProperties: false` and all its properties in `required`.
        param: the request's field, for errors.

    Raises:
        RequestError: it is too large, or has a keyword that cannot be enforced.
    """
    _check_size(schema, param)
    if strict and schema.get("type") != "object":
        raise RequestError("A strict schema must be of type 'object' at its root.", param=param)
    for node in _subschemas(schema):
        unknown = [key for key in node if key not in ENFORCED and not _is_descriptive(key)]
        if unknown:
            raise RequestError(f"The schema's keyword {shorten(unknown[0])!r} is not supported.", param=param)
        if strict:
            _check_strict(node, param)
    bare = _without_descriptions(schema)
    options = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": False, "lenient": False}
    try:
        return json.dumps({"grammars": [{"json_schema": bare | {"x-guidance": options}}]}, allow_nan=False)
    except ValueError:
        raise RequestError("The schema has a number that JSON has no word for.", param=param) from None


def json_object_grammar() -> str:
    """A grammar for any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(regex: str, param: str | None = None) -> str:
    r"""A grammar for the texts that match `regex` as a whole; see `lark_grammar`.

    The syntax is that of Rust's regex crate, without word boundaries; `\d` and `\w` are ASCII, as in JSON Schema.
    """
    _check_text(regex, "The regular expression", param)
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise RequestError("The regular expression ends in the middle of an escape.", param=param)
    return lark_grammar(f"start: /{llguidance.regex_to_lark(regex, 'dw')}/", param, name="The regular expression")


def choice_grammar(choices: list[str], param: str | None = None) -> str:
    """A grammar for exactly these texts; see `lark_grammar`."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"There must be 1 to {MAX_CHOICES} choices, got {len(choices)}.", param=param)
    if not all(choices):
        raise RequestError("A choice cannot be empty.", param=param)
    spelled = [json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in dict.fromkeys(choices)]
    return lark_grammar(f"start: CHOICE\nCHOICE: {' | '.join(spelled)}", param, name="The list of choices")


def lark_grammar(grammar: str, param: str | None = None, *, name: str = "The grammar") -> str:
    """A grammar in llguidance's variant of Lark; `RequestError` when it is too long or no Unicode text."""
    _check_text(grammar, name, param)
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _check_size(schema: Any, param: str | None) -> None:
    """Raise `RequestError` for what is too deep or too large for those who come after."""
    pending, nodes = [(schema, 1)], 1
    while pending:
        value, depth = pending.pop()
        nodes += len(value) if isinstance(value, (dict, list)) else 0  # counted before they are laid out
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            text = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"of more than {MAX_NODES} values"
            raise RequestError(f"The schema is too complex: it is {text}.", param=param)
        if isinstance(value, (dict, list)):
            pending += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"The schema has {size} bytes; {MAX_SCHEMA_BYTES} is the most.", param=param)


def _check_text(text: str, name: str, param: str | None) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} has half a character (a lone surrogate).", param=param) from None
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{name} has {size} bytes; {MAX_GRAMMAR_BYTES} is the most.", param=param)


def _check_strict(node: dict[str, Any], param: str | None) -> None:
    kind, properties = node.get("type"), node.get("properties")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind) and properties is None:
        return
    if node.get("additionalProperties") is not False:
        raise RequestError("In a strict schema, every object needs 'additionalProperties': false.", param=param)
    required = node.get("required")
    missing = [name for name in properties or () if not isinstance(required, list) or name not in required]
    if missing:
        raise RequestError(
            f"In a strict schema, every property must be in 'required': {shorten(missing[0])!r} is not.", param=param
        )


def _children(node: dict[str, Any]) -> Iterator[Any]:
    for key in SUBSCHEMA:
        yield node.get(key)
    for key in SUBSCHEMA_LISTS:
        if isinstance(node.get(key), list):
            yield from node[key]
    for key in SUBSCHEMA_MAPS:
        if isinstance(node.get(key), dict):
            yield from node[key].values()


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it, but no other objects, such as a `const`."""
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending += _children(node)


def _is_descriptive(key: str) -> bool:
    return key in DESCRIPTIVE or (key.startswith("x-") and key != "x-guidance")


def _without_descriptions(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    bare: dict[str, Any] = {}
    for key, value in schema.items():
        if _is_descriptive(key):
            continue
        if key in SUBSCHEMA_MAPS and isinstance(value, dict):
            bare[key] = {name: _without_descriptions(item) for name, item in value.items()}
        elif key in SUBSCHEMA_LISTS and isinstance(value, list):
            bare[key] = [_without_descriptions(item) for item in value]
        elif key in SUBSCHEMA:
            bare[key] = _without_descriptions(value)
        else:
            bare[key] = value
    return bare
