"""What a turn may do with its tools: the functions that are offered, and the grammar that enforces the choice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.errors import RequestError
from ..api.chat.wire import AllowedToolsChoice, ChatCompletionRequest, Function, NamedToolChoice, Tool
from ..http.errors import shorten
from ..http.offload import off_loop_if_large
from .structured import check_grammar, choice_grammar, json_object_grammar, json_schema_grammar
from .template import MAX_DEPTH, is_deeper
from .tool_calls import CallReader, ToolCallFormat

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_CALLS = 32
"""Calls of one turn that a grammar lets through, so that every constrained turn can end."""
OPEN_KEYWORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
OPEN_KEYWORDS |= {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependentRequired"}
"""Keywords of a schema that may speak of other members than those in `properties`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The functions that a turn may call, and whether it must.

    Attributes:
        tools: at least one.
        parallel: whether there may be more calls than one.
        places: where in the request's list the function of a name is.
    """

    tools: list[Tool]
    mode: Literal["auto", "required", "named"]
    parallel: bool
    format: ToolCallFormat
    places: dict[str, int]

    def reader(self) -> CallReader:
        """A reader for one choice."""
        names = frozenset(tool.function.name for tool in self.tools)
        return CallReader(self.format, names, "stop" if self.mode == "named" else "tool_calls")

    def describe(self) -> str:
        """Plain text that tells a model of its functions, for chat templates that do not."""
        lines = [json.dumps(tool.function.model_dump(exclude_none=True, exclude={"strict"})) for tool in self.tools]
        call = self.format.write("NAME", "{ARGUMENTS}")
        return "\n".join([f"You can call these functions. To call one, write {call}", *lines])

    async def grammar(self, answer: str | None) -> str | None:
        """The grammar of the turn's text, checked; None where it is free.

        Args:
            answer: the grammar of a turn without calls, where that has one; the mode is then "auto".

        Raises `RequestError` naming a function's parameters that cannot be enforced.
        """
        if self.mode == "auto" and answer is None and self.parallel and not any(t.function.strict for t in self.tools):
            return None
        text, arguments = await off_loop_if_large(self._compose, answer)
        try:
            await check_grammar(text, "tools")
        except RequestError:
            for field, alone in arguments.items():
                await check_grammar(alone, field)
            raise
        return text

    def _compose(self, answer: str | None) -> tuple[str, dict[str, str]]:
        """The grammar, not yet checked, and those in it for each function's arguments, by their field."""
        grammars = [{"name": "turn", "lark_grammar": self._rules(answer is not None)}]
        arguments = {field: self._arguments(tool.function, field) for field, tool in self._fields()}
        grammars += [_named(f"arguments_{n}", text) for n, text in enumerate(arguments.values())]
        if answer is not None:
            grammars.append(_named("answer", answer))
        return json.dumps({"grammars": grammars}), arguments

    def _fields(self) -> Iterator[tuple[str, Tool]]:
        return ((f"tools[{self.places[tool.function.name]}].function.parameters", tool) for tool in self.tools)

    def _arguments(self, function: Function, field: str) -> str:
        if self.mode == "auto" and not function.strict and function.parameters:
            return json_object_grammar()
        schema = arguments_schema(function)
        if schema == NO_ARGUMENTS:
            return choice_grammar(["{}"])
        return json_schema_grammar(schema, bool(function.strict), field)

    def _rules(self, with_answer: bool) -> str:
        """The turn in llguidance's Lark: calls, and what may stand beside them."""
        opening, separator = self.format.opening, self.format.separator
        free = self.mode == "auto" and not with_answer
        led = bool(free and opening)
        starts = [self.format.start(tool.function.name).removeprefix(opening) for tool in self.tools]
        bodies = [f"{_quoted(start)} @arguments_{n} {_quoted(self.format.end)}" for n, start in enumerate(starts)]
        more = f" ({_quoted(separator)} call)" if separator else " call"
        calls = f"call{more}{{0,{MAX_CALLS - 1}}}" if self.parallel else "call"
        if led:
            start = "(LEAD call)* TEXT?" if self.parallel else "LEAD call | TEXT?"
        else:
            start = f"{calls} | TEXT?" if free else f"{calls} | @answer" if with_answer else calls
        rules = [f"start: {start}"]
        rules.append(f"call: {'' if led or not opening else _quoted(opening)} ({' | '.join(bodies)})")
        if free:
            begun = _escaped(opening) if opening else r'\{[ \t\r\n]*"name"'
            before = r"(.|\n)*" if opening else r"[ \t\r\n;,]*"
            rules.append(rf"TEXT: /(.|\n)*/ & ~/{before}{begun}(.|\n)*/")
        if led:
            # The lexer takes the longest match and does not go back, so the opening belongs to the text before it.
            rules.append(f"LEAD: TEXT {_quoted(opening)}")
        return "\n".join(rules)


def read_offer(body: ChatCompletionRequest, format_: ToolCallFormat) -> Offer | None:
    """What a request offers, or None where the turn has no tools; raises `RequestError`."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    for n, name in enumerate(names):
        if is_deeper(tools[n].function.parameters, MAX_DEPTH):
            field = f"tools[{n}].function.parameters"
            raise RequestError(f"{field} is nested deeper than {MAX_DEPTH} levels.", param=field)
        if name in names[:n]:
            raise RequestError(f"tools has two functions called {name}.", param=f"tools[{n}].function.name")
    choice = body.tool_choice
    if choice in (None, "none", "auto") and (not tools or choice == "none"):
        return None
    if not tools:
        raise RequestError("tool_choice needs tools.", param="tool_choice")
    mode: Literal["auto", "required", "named"]
    match choice:
        case NamedToolChoice():
            tools, mode = _chosen(tools, [choice.function.name]), "named"
        case AllowedToolsChoice():
            allowed = choice.allowed_tools
            tools, mode = _chosen(tools, [tool.function.name for tool in allowed.tools]), allowed.mode
        case _:
            mode = "required" if choice == "required" else "auto"
    parallel = body.parallel_tool_calls is not False and mode != "named"
    places = {name: n for n, name in enumerate(names)}
    return Offer(tools=tools, mode=mode, parallel=parallel, format=format_, places=places)


def _chosen(tools: Iterable[Tool], names: list[str]) -> list[Tool]:
    by_name = {tool.function.name: tool for tool in tools}
    for name in names:
        if name not in by_name:
            raise RequestError(f"tool_choice names {shorten(name)}, which is not among the tools.", param="tool_choice")
    return [tool for name, tool in by_name.items() if name in names]


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of a call's arguments: an object, without members that the function does not speak of.

    JSON Schema lets an object have members that it does not name, but a function cannot be called with them.
    """
    if function.strict and function.parameters:
        return function.parameters  # it must say so itself
    schema = {"type": "object", **(function.parameters or {})}
    if not OPEN_KEYWORDS & schema.keys():
        schema |= {"properties": schema.get("properties", {}), "additionalProperties": False}
    return schema


def _named(name: str, grammar: str) -> dict[str, Any]:
    """A grammar as part of another, which calls it `@name`."""
    if grammar.lstrip().startswith("{"):
        (part,) = json.loads(grammar)["grammars"]
        return {**part, "name": name}
    return {"name": name, "lark_grammar": grammar}


def _quoted(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """As a regular expression between slashes."""
    return "".join(f"\\{c}" if c in r".^$*+?{}[]\|()/-" else c for c in text)
