"""The tools that a turn may call, and the grammar that enforces the tool choice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.errors import RequestError
from ...engine.grammar.object_keys import CALL_OPENING
from ..http.errors import shorten
from .conversation import Conversation, Tool, ToolChoice
from .marked_calls import MarkedCallReader
from .parts import TurnReader
from .reasoning import GrammarMarks
from .schema.compiler import MAX_SIZE
from .structured_output import choice_grammar, json_schema_grammar
from .template import MAX_DEPTH, is_deeper
from .tool_calls import CallReader, ToolCallFormat

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_CALLS = 32  # calls in one turn that a grammar allows, so that every constrained turn ends
OPEN_KEYWORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
OPEN_KEYWORDS |= {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependentRequired"}
"""Keywords of a schema that may describe members which are not in `properties`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """The tools that a turn may call, and whether it must call one."""

    tools: Sequence[Tool]  # at least one
    mode: Literal["auto", "required", "named"]
    parallel: bool  # several calls are allowed
    format: ToolCallFormat

    def reader(self) -> TurnReader:
        """Return a reader for one choice."""
        names = frozenset(tool.name for tool in self.tools)
        reason = "stop" if self.mode == "named" else "tool_calls"
        if self.format.ids is not None:
            return MarkedCallReader(names, reason, forced=self.mode != "auto")
        return CallReader(self.format, names, reason, forced=self.mode != "auto")

    def describe(self) -> str:
        """Return instructions for the model, for chat templates that do not describe tools."""
        call = self.format.write("NAME", "{ARGUMENTS}")
        lines = [json.dumps(tool.describe()) for tool in self.tools]
        return "\n".join([f"You can call these functions. To call one, write {call}", *lines])

    def grammar(self, answer: str | None, marks: GrammarMarks | None = None) -> tuple[str, dict[str, str]] | None:
        """Return the grammar of the turn's text, and those for the tools' arguments in it; None if the text is free.

        `answer` is the grammar of a turn without calls; if it is None, such a turn is free text. The grammars for
        arguments are named by the fields that they come from.
        """
        if self.mode == "auto" and answer is None and self.parallel and not any(tool.strict for tool in self.tools):
            return None
        arguments: dict[str, str] = {}
        size = 0
        for tool in self.tools:
            arguments[tool.parameters_field] = text = self._arguments(tool)
            size += len(text)
            if size > MAX_SIZE:
                message = f"{tool.parameters_field} and those before it are too complex together: use fewer tools."
                raise RequestError(message, param=tool.parameters_field)
        grammars = [{"name": "turn", "lark_grammar": self._rules(answer is not None, marks)}]
        grammars += [_named(f"arguments_{n}", text) for n, text in enumerate(arguments.values())]
        if answer is not None:
            grammars.append(_named("answer", answer))
        return json.dumps({"grammars": grammars}), arguments

    def _arguments(self, tool: Tool) -> str:
        if self.mode == "auto" and not tool.strict and tool.parameters:
            return json_schema_grammar({"type": "object"})
        schema = arguments_schema(tool)
        if schema == NO_ARGUMENTS:
            return choice_grammar(["{}"])
        return json_schema_grammar(schema, tool.parameters_field)

    def _rules(self, with_answer: bool, marks: GrammarMarks | None) -> str:
        """Return the rules of the turn in llguidance's Lark: calls, and the other text that is allowed."""
        if self.format.ids is not None:
            return self._marked_rules(self.format.ids, with_answer, marks)
        opening, separator, quote = self.format.opening, self.format.separator, json.dumps
        free = self.mode == "auto" and not with_answer
        led = bool(free and opening)
        starts = [self.format.start(tool.name).removeprefix(opening) for tool in self.tools]
        bodies = [f"{quote(start)} @arguments_{n} {quote(self.format.end)}" for n, start in enumerate(starts)]
        more = f" ({quote(separator)} call)" if separator else " call"
        calls = f"call{more}{{0,{MAX_CALLS - 1}}}" if self.parallel else "call"
        if led:
            start = "(LEAD call)* TEXT?" if self.parallel else "LEAD call | TEXT?"
        else:
            start = f"{calls} | TEXT?" if free else f"{calls} | @answer" if with_answer else calls
        rules = [f"{CALL_OPENING}{quote(opening)}", f"start: {start}"]
        rules.append(f"call: {'' if led or not opening else quote(opening)} ({' | '.join(bodies)})")
        if free:
            begun = re.escape(opening).replace("/", r"\/") if opening else r'\{[ \t\r\n]*"name"'
            before = r"(.|\n)*" if opening else r"[ \t\r\n;,]*"
            rules.append(rf"TEXT: /(.|\n)*/ & ~/{before}{begun}(.|\n)*/")
        if led:
            # The lexer chooses the longest match and does not backtrack, so the opening belongs to the text before it.
            rules.append(f"LEAD: TEXT {quote(opening)}")
        if marks is not None:
            rules[:2] = [marks.header, rules[0], rules[1].replace("start: ", "after: ", 1)]
            rules += ["start: before opened after closed", *marks.rules()]
        return "\n".join(rules)

    def _marked_rules(self, ids: tuple[int, int], with_answer: bool, marks: GrammarMarks | None) -> str:
        """Return the rules for calls between special tokens: a list of them, or lists between other text."""
        quote, free = json.dumps, self.mode == "auto" and not with_answer
        starts = [f'{{"name": "{tool.name}", "{self.format.key}": ' for tool in self.tools]
        bodies = [f"{quote(start)} @arguments_{n} {quote('}')}" for n, start in enumerate(starts)]
        more = f' (", " call){{0,{MAX_CALLS - 1}}}' if self.parallel else ""
        opened, closed = ("opened ", " closed") if marks else ("", "")
        if free:
            after = "(words | calls)*" if self.parallel else "calls | words?"
        else:
            after = f"calls | {opened}@answer{closed}" if with_answer else "calls"
        rules = [marks.header] if marks else []
        rules += [f"{CALL_OPENING}{quote(self.format.opening)}", f"start: {'before ' if marks else ''}after"]
        rules += [f"after: {after}", f"call: {' | '.join(bodies)}"]
        rules.append(f'calls: <[{ids[0]}]> "[" call{more} "]" <[{ids[1]}]>')
        rules += [f"words: {opened}TEXT{closed}", r"TEXT: /(.|\n)+/"] if free else []
        return "\n".join([*rules, *(marks.rules() if marks else ())])


def read_tools(conversation: Conversation, format_: ToolCallFormat) -> ToolOptions | None:
    """Return the tools that a turn may call, None if it may call none; raises `RequestError`."""
    called: set[str] = set()
    for message in conversation.messages:
        called.update(call.id for call in message.calls)
        if message.call_id is not None and message.call_id not in called:
            field = message.call_id_field
            text = f"{field}: no earlier message has a tool call with the id {shorten(message.call_id)!r}."
            raise RequestError(text, param=field)
    tools, choice = conversation.tools, conversation.tool_choice
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if is_deeper(tool.parameters, MAX_DEPTH):
            field = tool.parameters_field
            raise RequestError(f"{field} is nested deeper than {MAX_DEPTH} levels.", param=field)
        if not _may_be_object(tool.parameters, tool.parameters, set()):
            field = tool.parameters_field
            raise RequestError(f"{field} must allow an object, because a call's arguments are one.", param=field)
        if by_name.setdefault(tool.name, tool) is not tool:
            field = f"{tool.field}.name"
            raise RequestError(f"{field}: another tool has the name {tool.name} too.", param=field)
    if choice.mode == "none" or (not tools and choice == ToolChoice()):
        return None
    if not tools:
        raise RequestError("tool_choice needs tools.", param="tool_choice")
    for name in choice.names or ():
        if name not in by_name:
            raise RequestError(f"tool_choice names {shorten(name)}, which is not in tools.", param="tool_choice")
    if choice.names is not None:
        tools = [tool for tool in tools if tool.name in choice.names]
    parallel = conversation.parallel_tool_calls and choice.mode != "named"
    return ToolOptions(tools=tools, mode=choice.mode, parallel=parallel, format=format_)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a call's arguments, which forbids members that the function does not describe."""
    schema = {**(tool.parameters or {}), "type": "object"}
    # A strict schema must forbid other members itself.
    if not (tool.strict and tool.parameters) and not OPEN_KEYWORDS & schema.keys():
        schema |= {"properties": schema.get("properties", {}), "additionalProperties": False}
    return schema


def _may_be_object(schema: Any, root: Any, seen: set[str]) -> bool:
    """Return whether a schema may allow an object; `seen` collects the references that were followed."""
    if not isinstance(schema, dict):
        return schema is not False
    kinds, values, part = schema.get("type", "object"), schema.get("enum"), root
    values = [schema["const"]] if "const" in schema else values
    if isinstance(kinds, (str, list)) and "object" not in ([kinds] if isinstance(kinds, str) else kinds):
        return False
    if isinstance(values, list) and not any(isinstance(value, dict) for value in values):
        return False
    for key, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        branches = schema.get(key)
        if isinstance(branches, list) and not enough(_may_be_object(branch, root, seen) for branch in branches):
            return False
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/") or reference in seen:
        return True
    seen.add(reference)
    for name in reference[2:].split("/"):
        part = part.get(name.replace("~1", "/").replace("~0", "~"), {}) if isinstance(part, dict) else {}
    return _may_be_object(part, root, seen)


def _named(name: str, grammar: str) -> dict[str, Any]:
    """Return a grammar as part of another, which refers to it as `@name`."""
    (part,) = json.loads(grammar)["grammars"]
    return {**part, "name": name}
