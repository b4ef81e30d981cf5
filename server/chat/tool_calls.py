"""Tool calls in a model's text: the formats in which they are written, and the reader that finds them as they come."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec


class CallPiece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of a tool call.

    Attributes:
        index: which call of the turn, from 0.
        id: of the call; with its first piece only.
        name: of the function; with its first piece only.
        arguments: the next characters of the arguments' JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TurnPiece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a piece of a turn's text means."""

    content: str = ""
    calls: list[CallPiece] = []


class TurnReader:
    """Reads one choice's text as it comes: this one knows no tools, so all of it is content.

    Where the text is cut into pieces makes no difference to what they add up to.
    """

    finish_reason: str = "stop"
    """What to report where the engine says "stop"; final once `finish` was called."""

    def feed(self, text: str) -> TurnPiece:
        """Take more text."""
        return TurnPiece(content=text)

    def finish(self) -> TurnPiece:
        """What was held back, now that no more text comes."""
        return TurnPiece()


# Classes of characters that may come any number of times: in JSON, in a string of it, and between bare calls.
_SPACE, _CHARACTER, _BETWEEN = r"\s", r"(?:[^\"\\]|\\(?:.|\Z))", r"[\s;,]"


@dataclass(frozen=True)
class ToolCallFormat:
    """How a call is written: `opening`, then `{"name": …, KEY: {…}}`, then `closing`.

    Attributes:
        opening: empty where calls are bare JSON; a turn is then calls from its beginning, or holds none.
        key: what the arguments are called; the reader takes both "arguments" and "parameters".
        separator: what the grammar puts between calls.
    """

    key: str = "arguments"
    opening: str = ""
    closing: str = ""
    separator: str = ""

    def start(self, name: str) -> str:
        """A call up to its arguments."""
        return f'{self.opening}{{"name": "{name}", "{self.key}": '

    @property
    def end(self) -> str:
        """A call from its arguments on."""
        return "}" + self.closing

    def write(self, name: str, arguments: str) -> str:
        """A whole call."""
        return self.start(name) + arguments + self.end

    @cached_property
    def header(self) -> re.Pattern[str]:
        """Matches a call up to its arguments' opening brace; group 1 is the JSON string of the name."""
        head = re.escape(self.opening) if self.opening else f"{_BETWEEN}*"
        key = r'"(?:arguments|parameters)"'
        return re.compile(head + r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*' + key + r"\s*:\s*(?=\{)")

    @cached_property
    def header_begun(self) -> re.Pattern[str]:
        """Matches, as a whole, what may still become a bare call's header."""
        steps = [_BETWEEN, "{", _SPACE, *'"name"', _SPACE, ":", _SPACE, '"', _CHARACTER, '"', _SPACE, ",", _SPACE]
        keys = [[*f'"{key}"', _SPACE, ":", _SPACE] for key in ("arguments", "parameters")]
        return re.compile("|".join(_beginning([*steps, *key]) for key in keys))

    @cached_property
    def tail(self) -> re.Pattern[str]:
        """Matches what ends a call."""
        return re.compile(r"\s*\}" + (r"\s*" + re.escape(self.closing) if self.closing else ""))

    @cached_property
    def tail_begun(self) -> re.Pattern[str]:
        """Matches, as a whole, what may still become a tail."""
        return re.compile(_beginning([_SPACE, "}", _SPACE, *self.closing]))


def _beginning(steps: list[str]) -> str:
    """A pattern for every beginning of a text made of characters and repeated classes."""
    pattern = ""
    for step in reversed(steps):
        pattern = f"{step}*{pattern}" if len(step) > 1 else f"(?:{re.escape(step)}{pattern})?"
    return pattern


FORMATS = {
    "hermes": ToolCallFormat(opening="<tool_call>", closing="</tool_call>"),
    "json": ToolCallFormat(separator="\n"),
    "llama3_json": ToolCallFormat(key="parameters", separator="; "),
}
"""The values of `--tool-call-parser`."""


def detect_format(template: str) -> str:
    """The name of the format that a chat template speaks of."""
    if FORMATS["hermes"].opening not in template and '"name"' in template:
        return next((name for name in ("llama3_json", "json") if f'"{FORMATS[name].key}"' in template), "hermes")
    return "hermes"


class CallReader(TurnReader):
    """Finds the calls of known functions; everything else is content, and nothing is lost.

    A call counts once its function's name is known and its arguments have begun: from then on they are passed on as
    they come, exactly as they are written, so that a stream need not wait for their end. Arguments that are not JSON
    arrive as written too. What only looks like a call, or names an unknown function, stays content. White space
    around calls is left out, unless it stands between two pieces of content.
    """

    def __init__(self, format_: ToolCallFormat, functions: Collection[str], finish_reason: str = "tool_calls") -> None:
        """`finish_reason` is what to report for a turn that ends with complete calls."""
        self._format = format_
        self._functions = functions
        self._reason = finish_reason
        self._held = ""
        self._space = ""
        self._said = False
        self._may_open = True
        self._calls = 0
        self._step: Callable[[], bool] = self._read_text
        self._content: list[str] = []
        self._pieces: list[CallPiece] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> TurnPiece:
        """Take more text."""
        self._held += text
        while self._held and self._step():
            pass
        return self._take()

    def finish(self) -> TurnPiece:
        """What was held back; a call that lacks only its closing mark counts."""
        while self._held and self._step != self._read_tail:
            if self._step == self._read_header:
                self._end_header()
            elif not self._step():
                self._say(self._held)
                self._held = ""
        if not self._calls:
            self._content.append(self._space)
        elif self._step != self._read_arguments:
            self.finish_reason = self._reason
        return self._take()

    def _take(self) -> TurnPiece:
        piece = TurnPiece(content="".join(self._content), calls=self._pieces)
        self._content, self._pieces = [], []
        return piece

    def _say(self, text: str) -> None:
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._content.append(said)
            self._said = True

    def _read_text(self) -> bool:
        """Pass content on up to the next call; each step says whether the next one has something to do."""
        if not self._format.opening and self._may_open:
            self._step = self._read_header
            return True
        if not self._format.opening:
            self._pass(len(self._held))
            return False
        opening = self._format.opening
        found = self._held.find(opening)
        if found >= 0:
            self._step = self._read_header
            self._pass(found)
            return True
        kept = min(len(opening) - 1, len(self._held))
        while not opening.startswith(self._held[len(self._held) - kept :]):
            kept -= 1
        self._pass(len(self._held) - kept)
        return False

    def _pass(self, count: int) -> None:
        self._say(self._held[:count])
        self._held = self._held[count:]

    def _read_header(self) -> bool:
        opening, closing = self._format.opening, self._format.closing
        end = self._held.find(closing, len(opening)) if closing else -1
        match = self._format.header.match(self._held)
        if match and (end < 0 or match.end() <= end):
            name = _decoded(match[1])
            if name not in self._functions:
                return self._refuse()
            self._open(name)
            self._held = self._held[match.end() :]
            self._step = self._read_arguments
            return True
        if not opening:
            return False if self._format.header_begun.fullmatch(self._held) else self._refuse()
        body = self._held[len(opening) :].lstrip()
        if end < 0:
            return self._refuse() if body and body[0] != "{" else False
        if not self._take_whole(self._held[len(opening) : end]):
            return self._refuse()
        self._held = self._held[end + len(closing) :]
        return True

    def _end_header(self) -> None:
        """Decide on a call that has no end, since no more text comes."""
        if self._format.opening and self._take_whole(self._held[len(self._format.opening) :]):
            self._held = ""
        elif not self._step():
            self._refuse()

    def _take_whole(self, body: str) -> bool:
        """Take a complete call whose members come in another order, or without arguments."""
        call = _decoded(body)
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._functions:
            return False
        arguments = call.get("arguments", call.get("parameters"))
        text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
        if not isinstance(_decoded(text), dict):
            return False
        self._open(name)
        self._add(text)
        self._step = self._read_text
        return True

    def _refuse(self) -> bool:
        """What looked like a call is content."""
        self._step = self._read_text
        self._may_open = False
        self._pass(len(self._format.opening))
        return True

    def _open(self, name: str) -> None:
        if not self._said:
            self._space = ""
        self._depth = 0
        self._may_open = True
        self._pieces.append(CallPiece(index=self._calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
        self._calls += 1

    def _add(self, arguments: str) -> None:
        if arguments:
            self._pieces.append(CallPiece(index=self._calls - 1, arguments=arguments))

    def _read_arguments(self) -> bool:
        for position, character in enumerate(self._held, 1):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._add(self._held[:position])
                    self._held = self._held[position:]
                    self._step = self._read_tail
                    return True
        self._add(self._held)
        self._held = ""
        return False

    def _read_tail(self) -> bool:
        match = self._format.tail.match(self._held)
        if match is None and self._format.tail_begun.fullmatch(self._held):
            return False
        # Where the closing mark is missing, what comes after the brace is content.
        match = match or re.match(r"\s*\}", self._held)
        self._held = self._held[match.end() if match else 0 :]
        self._step = self._read_text
        return True


def _decoded(text: str) -> Any:
    """The value of JSON text; None for what is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
