"""What a turn may do with its tools: the functions that are offered, and the grammar that enforces the choice."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.errors import RequestError
from ..http.errors import shorten
from ..http.offload import off_loop_if_large
from .conversation import Conversation, Tool, ToolChoice
from .structured import choice_grammar, json_object_grammar, json_schema_grammar
from .template import MAX_DEPTH, is_deeper
from .tool_calls import CallReader, ToolCallFormat

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_CALLS = 32
"""Calls of one turn that a grammar lets through, so that every constrained turn can end."""
OPEN_KEYWORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
OPEN_KEYWORDS |= {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependentRequired"}
"""Keywords of a schema that may speak of other members than those in `properties`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """The functions that a turn may call, and whether it must call one."""

    tools: Sequence[Tool]  # at least one
    mode: Literal["auto", "required", "named"]
    parallel: bool  # there may be several calls
    format: ToolCallFormat

    def reader(self) -> CallReader:
        """Return a reader for one choice."""
        names = frozenset(tool.name for tool in self.tools)
        return CallReader(self.format, names, "stop" if self.mode == "named" else "tool_calls")

    def describe(self) -> str:
        """Return instructions for the model, for chat templates that do not write tools."""
        call = self.format.write("NAME", "{ARGUMENTS}")
        lines = [json.dumps(tool.describe()) for tool in self.tools]
        return "\n".join([f"You can call these functions. To call one, write {call}", *lines])

    async def grammar(self, answer: str | None, check: Callable[[str, str], Awaitable[None]]) -> str | None:
        """The grammar of the turn's text, checked; None where it is free.

        Args:
            answer: the grammar of a turn without calls, where that has one; the mode is then "auto".
            check: raises `RequestError`, naming a field, for a grammar that the engine cannot follow.

        Raises `RequestError` naming a function's parameters that cannot be enforced.
        """
        if self.mode == "auto" and answer is None and self.parallel and not any(tool.strict for tool in self.tools):
            return None
        text, arguments = await off_loop_if_large(self._compose, answer)
        try:
            await check(text, "tools")
        except RequestError:
            for field, alone in arguments.items():
                await check(alone, field)
            raise
        return text

    def _compose(self, answer: str | None) -> tuple[str, dict[str, str]]:
        """The grammar, not yet checked, and those in it for each function's arguments, by their field."""
        grammars = [{"name": "turn", "lark_grammar": self._rules(answer is not None)}]
        arguments = {tool.parameters_field: self._arguments(tool) for tool in self.tools}
        grammars += [_named(f"arguments_{n}", text) for n, text in enumerate(arguments.values())]
        if answer is not None:
            grammars.append(_named("answer", answer))
        return json.dumps({"grammars": grammars}), arguments

    def _arguments(self, tool: Tool) -> str:
        if self.mode == "auto" and not tool.strict and tool.parameters:
            return json_object_grammar()
        schema = arguments_schema(tool)
        if schema == NO_ARGUMENTS:
            return choice_grammar(["{}"])
        return json_schema_grammar(schema, bool(tool.strict), tool.parameters_field)

    def _rules(self, with_answer: bool) -> str:
        """The turn in llguidance's Lark: calls, and what may stand beside them."""
        opening, separator = self.format.opening, self.format.separator
        free = self.mode == "auto" and not with_answer
        led = bool(free and opening)
        starts = [self.format.start(tool.name).removeprefix(opening) for tool in self.tools]
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


def read_tools(conversation: Conversation, format_: ToolCallFormat) -> ToolOptions | None:
    """Return the tools that a turn may call, None where there are none; raises `RequestError`."""
    tools, choice = conversation.tools, conversation.tool_choice
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if is_deeper(tool.parameters, MAX_DEPTH):
            field = tool.parameters_field
            raise RequestError(f"{field} is nested deeper than {MAX_DEPTH} levels.", param=field)
        if by_name.setdefault(tool.name, tool) is not tool:
            raise RequestError(f"{tool.name_field}: there are two tools named {tool.name}.", param=tool.name_field)
    if choice.mode == "none" or (not tools and choice == ToolChoice()):
        return None
    if not tools:
        raise RequestError("tool_choice needs tools.", param="tool_choice")
    for name in choice.names or ():
        if name not in by_name:
            raise RequestError(f"tool_choice names {shorten(name)}, which is not among the tools.", param="tool_choice")
    if choice.names is not None:
        tools = [tool for tool in tools if tool.name in choice.names]
    parallel = conversation.parallel_tool_calls and choice.mode != "named"
    return ToolOptions(tools=tools, mode=choice.mode, parallel=parallel, format=format_)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a call's arguments: an object, without members that the function does not mention.

    JSON Schema lets an object have members that it does not name, but a function cannot be called with them.
    """
    if tool.strict and tool.parameters:
        return tool.parameters  # it must say so itself
    schema = {"type": "object", **(tool.parameters or {})}
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
