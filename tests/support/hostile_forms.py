"""Bombs for what compiles or runs what a request brings: regular expressions, grammars, schemas, templates, tools."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from support.bodies import POSTS, USER
from support.hostile import Case, post
from support.hostile_bodies import HERE, VALUES, spell

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
)  # fmt: skip
REGEXES = [
    "(((a+)+)+)+$", "(a{1000}){1000}", "(((a{100}){100}){100}){100}", "a{0,100000}", "(a|b|ab|ba)*c{500}", "(?=a)b",
    "(?<!a)b",
    r"(a)\1", "[", "(", ")", "*", "a{2,1}", "a**", "\\", "(?P<x>a)(?P<x>b)", "(" * 5000 + ")" * 5000, "." * 60_000,
    "(.*a){60}",
    "(.*){1,200}x", r"\p{L}{1,2000}", r"[\x{0}-\x{10ffff}]{500}", "(?i)" + "straße" * 500, "(x+x+)+y", "|".join(map(str,
    range(8000))),
    "(a?){3000}a{3000}", "[^a]{64000}", r"\d{1,64}(\.\d{1,64}){0,64}", "\u0000", "(?s-m:.)*", "(?#x)", "a{99999999999}",
    "^$", "",
]  # fmt: skip
GRAMMARS = [
    "start: start start", "start: start", "start: a\na: b\nb: a", 'start: "a" | start start | "b" start',
    "start: (((x)))", "x",
    'start: /(/', 'start: "a"{1,100000}', 'start: "a"~1..100000', "start: " + '"a" | ' * 6000 + '"b"',
    "%import common.WORD\nstart: WORD",
    "%ignore /.*/\nstart: /a/", "%llguidance {}", "start: %json {\"$ref\": \"#\"}",
    "start: " + "(" * 3000 + '"a"' + ")" * 3000,
    "\n".join(f'r{n}: r{n + 1} r{n + 1}' for n in range(60)) + '\nr60: "a"\nstart: r0',
    'start: a*\na: b*\nb: c*\nc: ""',
    "\n".join(f'r{n}: "a" r{n + 1} | r{n + 1} "b" | r{(n * 7) % 500}' for n in range(500)) + '\nr500: "c"\nstart: r0',
    'start: /(a|aa|aaa)*/ /(a|aa)*/ /(a+)+/', "start[lazy]: /.*/", "start: <[999999]>", "start: \u0000",
    "start: \ud800", " " * 65_000, "#",
]  # fmt: skip


def _nested(depth: int, wrap: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"array": {"type": "array", "items": schema}, "any": {"anyOf": [schema, {"type": "null"}]},
                  "object": {"type": "object", "properties": {"a": schema}}}[wrap]  # fmt: skip
    return schema


def _chain(length: int) -> dict[str, Any]:
    """Objects in objects, each by a reference."""
    definitions: dict[str, Any] = {f"d{length}": {"type": "null"}}
    for n in range(length):
        definitions[f"d{n}"] = {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}, "required": ["a"]}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def _product(factors: int) -> dict[str, Any]:
    """Choices that multiply."""
    return {"allOf": [{"anyOf": [{"multipleOf": n}, {"minimum": n}]} for n in range(2, 2 + factors)]}


def _doubling(levels: int, word: str) -> dict[str, Any]:
    """Small to write, 2^levels to write out."""
    definitions: dict[str, Any] = {"d0": {"type": "object", "properties": {"x": {"enum": [1, 2]}}}}
    for n in range(levels):
        definitions[f"d{n + 1}"] = {word: [{"$ref": f"#/$defs/d{n}"}, {"$ref": f"#/$defs/d{n}"}]}
    return {"$defs": definitions, "$ref": f"#/$defs/d{levels}"}


SCHEMAS: list[Any] = [
    {"$ref": "#"}, {"$ref": "#/x"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"},
    {"allOf": [{"$ref": "#"}]}, {"not": {}},
    {"type": 5}, {"type": "x"}, {"type": []}, {"properties": []}, {"required": "a"}, {"enum": []}, {"const": {}},
    {"items": 7}, {"anyOf": []},
    {"type": "array", "minItems": 10**9}, {"type": "array", "maxItems": 10**12}, {"type": "string", "minLength": 10**9},
    {"type": "string", "maxLength": 10**12}, {"type": "string", "minLength": 5, "maxLength": 2}, {"type": "string",
    "pattern": "(a{1000}){1000}"},
    {"type": "string", "pattern": "^(?!a).*$"}, {"type": "string", "format": "x" * 1000}, {"type": "number",
    "multipleOf": 1e-300},
    {"type": "number", "minimum": 1e308, "maximum": -1e308}, {"type": "integer", "minimum": 0.1, "maximum": 0.2},
    {"type": "integer", "multipleOf": 0},
    {"type": "integer", "minimum": -(10**40), "maximum": 10**40}, {"patternProperties": {"(": {}}},
    {"uniqueItems": True}, {"if": {}, "then": {}},
    {"enum": list(range(15_000))}, {"enum": ["x" * 1000] * 200}, {"required": [str(n) for n in range(5000)]},
    {"type": "object", "properties": {str(n): {"type": "string"} for n in range(2000)},
    "required": [str(n) for n in range(2000)]},
    {"type": "object", "minProperties": 10**6}, {"type": "object", "properties": {"\ud800": {}}}, {"type": "object",
    "properties": {"": {}, "\u0000": {}}},
    _nested(40, "array"), _nested(40, "any"), _nested(40, "object"), _nested(150, "array"), _nested(150, "object"),
    _doubling(18, "anyOf"), _doubling(18, "allOf"), _doubling(18, "oneOf"), {"anyOf": [{"type": "array",
    "items": {"$ref": "#"}}] * 300},
    {"allOf": [{"properties": {str(n): {"anyOf": [{"minimum": n}, {"maximum": -n}]}}} for n in range(40)]},
    {"x-guidance": {"lenient": True}},
    {"oneOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(40)]}, {"const": "x" * 200_000},
    {"$schema": "x", "$id": "x" * 9000}, _chain(2500), _product(12),
]  # fmt: skip


def forms() -> Iterator[Case]:
    """Each bomb through one of the doors that take it, in turn."""
    for n, regex in enumerate(REGEXES):
        path = (CHAT, COMPLETIONS)[n % 2]
        yield post(path, spell(POSTS[path] | {"structured_outputs": {"regex": regex}}), name=f"regex {regex[:40]!r}")
    for n, grammar in enumerate(GRAMMARS):
        path = (CHAT, COMPLETIONS)[n % 2]
        yield post(
            path, spell(POSTS[path] | {"structured_outputs": {"grammar": grammar}}), name=f"grammar {grammar[:40]!r}"
        )
    for n, schema in enumerate(SCHEMAS):
        name, inner = f"schema {str(schema)[:60]}", {"name": "x", "schema": schema}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        doors: list[tuple[str, dict[str, Any]]] = [
            (CHAT, {"response_format": {"type": "json_schema", "json_schema": inner}}),
            (COMPLETIONS, {"structured_outputs": {"json": schema}}), (CHAT, {"tools": [tool],
            "tool_choice": "required"}),
            (RESPONSES, {"text": {"format": {"type": "json_schema"} | inner}}),
            (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": schema}],
            "tool_choice": "required"}),
            (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
            (MESSAGES, {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}),
        ]  # fmt: skip
        for path, door in (doors[n % 7], doors[(n + 3) % 7]):
            yield post(path, spell(POSTS[path] | door), name=f"{name} in {next(iter(door))} of {path}")


def templates() -> Iterator[Case]:
    """What a template might run, loop over or write out, as variables and as text."""
    texts = [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 9 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('x') }}", "{% include 'x' %}", "{{ self }}{{ debug() }}", "{{ messages }}", "{#", "{%",
        "}}",
    ]  # fmt: skip
    names = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "self", "loop", "range",
    "namespace",
             "raise_exception", "strftime_now", "__class__", "", "\ud800", "enable_thinking", "documents", "x" * 512,
             "x" * 513]  # fmt: skip
    values = [VALUES[kind] for kind in ("deep object", "deep list", "wide object", "long list", "NaN", "5000 digits",
                                        "a lone high surrogate", "null", "true")]  # fmt: skip
    values += [
        '"' + "x" * 4_000_000 + '"',
        "[" * 60 + "]" * 60,
        '{"__class__": "x"}',
        "[" + ",".join(["[]"] * 50_000) + "]",
    ]
    tokenizing = {"messages": [USER]}
    for n, name in enumerate(names):
        for m, value in enumerate(values):
            path, valid = ((CHAT, POSTS[CHAT]), ("/tokenize", tokenizing))[(n + m) % 2]
            if len(value) < 10**6 or n % 4 == 0:
                body = spell(valid | {"chat_template_kwargs": {name: HERE}}, value)
                yield post(path, body, name=f"template variable {name[:20]!r} = {value[:30]}")
    for text in texts:
        for body in ({"chat_template": text}, {"chat_template_kwargs": {"chat_template": text}},
                     {"messages": [{"role": "user", "content": text}]}, {"messages": [USER | {"name": text}]},
                     {"messages": [{"role": text, "content": "x"}]}):  # fmt: skip
            yield post(CHAT, spell(POSTS[CHAT] | body), name=f"template text {text[:40]!r} in {next(iter(body))}")


def tools(seed: int, count: int = 200) -> Iterator[Case]:
    """Names and schemas of tools that a client might put into a grammar, a prompt, a path or a page."""
    draw = random.Random(seed)
    names = ["f", "", "a" * 64, "a" * 65, "../x", "f\n", "функция", "__proto__", "f}", '"', "\u0000", "constructor",
    "null", "-", "_", "f f",
             "</s>", "{{f}}", "\ud800", "<script>", "start", "%s"]  # fmt: skip
    schemas = [
        *SCHEMAS[:30],
        None,
        {},
        {"type": "object"},
        "x",
        7,
        [],
        {"type": "object", "properties": {"</s>": {"const": "</s>"}}},
    ]
    for _ in range(count):
        chosen = [(draw.choice(names), draw.choice(schemas)) for _ in range(draw.choice((1, 1, 2, 3)))]
        named = draw.choice(names)
        path = draw.choice((CHAT, RESPONSES, MESSAGES, "/v1/messages/count_tokens", "/tokenize"))
        choice: Any = draw.choice(["auto", "required", "none", "x", named])
        if path == RESPONSES:
            body = {"tools": [{"type": "function", "name": n, "parameters": s} for n, s in chosen]}
            choice = {"type": "function", "name": named} if choice == named else choice
        elif path.startswith(MESSAGES):
            body = {"tools": [{"name": n, "input_schema": s} for n, s in chosen]}
            choice = (
                {"type": "tool", "name": named}
                if choice == named
                else {"type": {"required": "any"}.get(choice, choice)}
            )
        else:
            body = {"tools": [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in chosen]}
            choice = {"type": "function", "function": {"name": named}} if choice == named else choice
        valid = {"messages": [USER]} if path == "/tokenize" else POSTS[path] | {"tool_choice": choice}
        yield post(path, spell(valid | body), name=f"tools {str(chosen)[:60]}, {str(choice)[:40]} in {path}")
