"""Grammars for the formats that a request may demand of the answer's text.

A schema is always enforced, `strict` or not: every answer that ends by itself is valid against it. A keyword that
cannot be enforced is refused; only purely descriptive keywords are ignored.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance

from ...engine.errors import RequestError
from . import gbnf
from .schema.compiler import SchemaCompiler
from .schema.reader import Reader

MAX_SCHEMA_BYTES = 256 << 10
MAX_GRAMMAR_BYTES = 64 << 10  # of a regular expression, a Lark grammar, or all choices together
MAX_CHOICES = 2000
MAX_DEPTH = 64
MAX_NODES = 20_000


def json_schema_grammar(schema: dict[str, Any], param: str | None = None) -> str:
    """Return a grammar for the JSON values that are valid against `schema`.

    Raises `RequestError` if it is too large, no value is valid, or a keyword cannot be enforced.
    """
    _check_size(schema, param)
    return _wrap(SchemaCompiler(Reader(schema, param)).compile())


def regex_grammar(regex: str, param: str | None = None) -> str:
    r"""Return a grammar for the texts that match `regex` as a whole; raises the errors of `lark_grammar`.

    The syntax is that of Rust's regex crate, without word boundaries; `\d` and `\w` are ASCII, as in JSON Schema.
    """
    _check_text(regex, "The regular expression", param)
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise RequestError("The regular expression ends inside an escape sequence.", param=param)
    return _wrap(f"start: /{llguidance.regex_to_lark(regex, 'dw')}/")


def choice_grammar(choices: list[str], param: str | None = None) -> str:
    """Return a grammar for exactly these texts; raises the errors of `lark_grammar`."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"There must be 1 to {MAX_CHOICES} choices, but got {len(choices)}.", param=param)
    if not all(choices):
        raise RequestError("A choice cannot be empty.", param=param)
    spelled = [json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in dict.fromkeys(choices)]
    grammar = f"start: CHOICE\nCHOICE: {' | '.join(spelled)}"
    _check_text(grammar, "The list of choices", param)
    return _wrap(grammar)


def lark_grammar(grammar: str, param: str | None = None) -> str:
    """Return a grammar in llguidance's variant of Lark, or in GBNF, which is translated.

    Raises `RequestError` if it is too long, not Unicode, or wrong as GBNF.
    """
    _check_text(grammar, "The grammar", param)
    if not gbnf.MARK.search(grammar):
        return _wrap(grammar)
    try:
        return _wrap(gbnf.to_lark(grammar))
    except ValueError as error:
        raise RequestError(f"The grammar is in GBNF (it has ::=), but {error}.", param=param) from None


def _wrap(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _check_size(schema: Any, param: str | None) -> None:
    """Raise `RequestError` for a schema that is too deep or too large to process."""
    pending, nodes = [(schema, 1)], 1
    while pending:
        value, depth = pending.pop()
        nodes += len(value) if isinstance(value, (dict, list)) else 0  # counted before they are added
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            things, limit = ("levels of nesting", MAX_DEPTH) if depth > MAX_DEPTH else ("values", MAX_NODES)
            raise RequestError(f"The schema has too many {things}; the limit is {limit}.", param=param)
        if isinstance(value, (dict, list)):
            pending += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise RequestError("The schema has a number that JSON cannot represent.", param=param) from None
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"The schema is too large: {size} bytes; the limit is {MAX_SCHEMA_BYTES}.", param=param)


def _check_text(text: str, name: str, param: str | None) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not valid Unicode: it has a lone surrogate.", param=param) from None
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{name} is too large: {size} bytes; the limit is {MAX_GRAMMAR_BYTES}.", param=param)
