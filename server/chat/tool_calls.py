"""Tool calls in a model's text: the formats in which they are written, and the reader that finds them as it arrives."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import msgspec


class CallPiece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of a tool call."""

    index: int  # of the call in its turn, from 0
    id: str | None = None  # of the call; in its first piece only
    name: str | None = None  # of the function; in the call's first piece only
    arguments: str = ""  # more characters of the arguments' JSON text


Part = str | CallPiece  # new content of a turn, or a piece of one of its calls


class TurnReader(Protocol):
    """Reads one choice's text as it arrives; the parts add up to the same turn wherever the text is cut."""

    finish_reason: str  # what to report when the engine says "stop"; final after `finish`
    unfinished: bool  # the text has ended inside a call, or before a call that had to come

    def feed(self, text: str) -> list[Part]: ...  # reads more text

    def finish(self, cut: str | None = None) -> list[Part]: ...

    # Returns what was held back. None: the text has ended by itself; else the stop string that was cut off it, or "".


# Patterns of characters that may be repeated: white space, characters of a JSON string, and those between bare calls.
_SPACE, _CHARACTER, _BETWEEN = r"\s", r"(?:[^\"\\]|\\(?:.|\Z))", r"[\s;,]"


@dataclass(frozen=True)
class ToolCallFormat:
    """How a call is written: `opening`, then `{"name": …, KEY: {…}}`, then `closing`."""

    key: str = "arguments"  # the reader accepts "arguments" and "parameters"
    opening: str = ""  # if empty, calls are bare JSON, and a turn either begins with a call or has none
    closing: str = ""
    separator: str = ""  # which the grammar puts between calls

    def start(self, name: str) -> str:
        """Return a call up to its arguments."""
        return f'{self.opening}{{"name": "{name}", "{self.key}": '

    @property
    def end(self) -> str:
        """The end of a call, after its arguments."""
        return "}" + self.closing

    def write(self, name: str, arguments: str) -> str:
        """Return a whole call."""
        return self.start(name) + arguments + self.end

    @cached_property
    def header(self) -> re.Pattern[str]:
        """Matches a call up to its arguments' opening brace; group 1 is the JSON string of the name."""
        head = re.escape(self.opening) if self.opening else f"{_BETWEEN}*"
        key = r'"(?:arguments|parameters)"'
        return re.compile(head + r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*' + key + r"\s*:\s*(?=\{)")

    @cached_property
    def header_begun(self) -> re.Pattern[str]:
        """Matches any beginning of a bare call's header."""
        steps = [_BETWEEN, "{", _SPACE, *'"name"', _SPACE, ":", _SPACE, '"', _CHARACTER, '"', _SPACE, ",", _SPACE]
        keys = [[*f'"{key}"', _SPACE, ":", _SPACE] for key in ("arguments", "parameters")]
        return re.compile("|".join(_beginning([*steps, *key]) for key in keys))

    @cached_property
    def tail(self) -> re.Pattern[str]:
        """Matches the end of a call."""
        return re.compile(r"\s*\}" + (r"\s*" + re.escape(self.closing) if self.closing else ""))

    @cached_property
    def tail_begun(self) -> re.Pattern[str]:
        """Matches any beginning of a tail."""
        return re.compile(_beginning([_SPACE, "}", _SPACE, *self.closing]))


def _beginning(steps: list[str]) -> str:
    """Return a pattern for any prefix of a string of these steps; one longer than a character is a repeated pattern."""
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
    """Return the name of the format that a chat template describes."""
    if FORMATS["hermes"].opening not in template and '"name"' in template:
        return next((name for name in ("llama3_json", "json") if f'"{FORMATS[name].key}"' in template), "hermes")
    return "hermes"


class CallReader:
    """Finds calls of known functions; all other text is content, and none is lost.

    A call is recognised once its function's name is complete and its arguments have begun. From then on the arguments
    are passed on as they arrive and exactly as they are written, even if they are not JSON, so that a stream need not
    wait for their end. Text that only looks like a call, or names an unknown function, is content. White space around
    calls is dropped unless it separates two pieces of content. A call that is cut off before its arguments is dropped,
    so that no part of its markup is content.
    """

    def __init__(
        self,
        format_: ToolCallFormat,
        functions: Collection[str],
        finish_reason: str = "tool_calls",
        forced: bool = False,
    ) -> None:
        """`finish_reason` is reported for a turn that ends with complete calls; a `forced` turn has no content."""
        self.finish_reason = "stop"
        self.unfinished = False
        self._forced = forced
        self._format = format_
        self._functions = functions
        self._reason = finish_reason
        self._held = ""  # not yet read
        self._space = ""  # white space after the content so far
        self._has_content = False
        self._may_open = True  # a bare call may begin here
        self._calls = 0
        self._step: Callable[[], bool] = self._read_text  # returns whether the next step has something to do
        self._parts: list[Part] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Part]:
        """Read more text."""
        self._held += text
        while self._held and self._step():
            pass
        return self._drain()

    def finish(self, cut: str | None = None) -> list[Part]:
        """Return what was held back; a call that lacks only its closing mark is complete."""
        while self._held and self._step != self._read_tail:
            if self._step == self._read_header:
                self._end_header(cut)
            elif not self._step():  # what is held may be the beginning of the opening mark
                self._end_text(cut)
        self.unfinished |= self._step == self._read_arguments or (self._forced and not self._calls)
        if self.unfinished:
            self.finish_reason = "stop" if cut is None else "length"
        elif self._calls:
            self.finish_reason = self._reason
        elif self._space:
            self._parts.append(self._space)
        return self._drain()

    def _drain(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return [part for part in parts if not isinstance(part, str)] if self._forced else parts

    def _add_content(self, length: int) -> None:
        """Make this much of the held text content, except for white space at its end."""
        text = self._space + self._held[:length]
        self._held = self._held[length:]
        content = text.rstrip()
        self._space = text[len(content) :]
        if not content:
            return
        self._has_content = True
        if self._parts and isinstance(before := self._parts[-1], str):
            self._parts[-1] = before + content
        else:
            self._parts.append(content)

    def _read_text(self) -> bool:
        """Read content up to the next call."""
        opening = self._format.opening
        if not opening and self._may_open:
            self._step = self._read_header
            return True
        found = self._held.find(opening) if opening else -1
        if found >= 0:
            self._step = self._read_header
            self._add_content(found)
            return True
        kept = min(max(len(opening) - 1, 0), len(self._held))
        while not opening.startswith(self._held[len(self._held) - kept :]):
            kept -= 1
        self._add_content(len(self._held) - kept)
        return False

    def _read_header(self) -> bool:
        """Read a call up to its arguments."""
        opening, closing = self._format.opening, self._format.closing
        end = self._held.find(closing, len(opening)) if closing else -1
        match = self._format.header.match(self._held)
        if match and (end < 0 or match.end() <= end):
            name = decode_json(match[1])
            if name not in self._functions:
                return self._reject()
            self._open(name)
            self._held = self._held[match.end() :]
            self._step = self._read_arguments
            return True
        if not opening:
            return False if self._format.header_begun.fullmatch(self._held) else self._reject()
        body = self._held[len(opening) :].lstrip()
        if end < 0:
            return self._reject() if body and body[0] != "{" else False
        if not self._read_whole(self._held[len(opening) : end]):
            return self._reject()
        self._held = self._held[end + len(closing) :]
        return True

    def _end_text(self, cut: str | None) -> None:
        """Decide on what may begin an opening mark, since the text has ended."""
        text, opening = self._held + (cut or ""), self._format.opening
        if cut is not None and self._held and (opening.startswith(text) or text.startswith(opening)):
            self._drop()
        else:
            self._add_content(len(self._held))

    def _drop(self) -> None:
        """Drop what is held as the beginning of a call that was cut off."""
        self._held, self.unfinished = "", True

    def _end_header(self, cut: str | None) -> None:
        """Decide on an unfinished call, since the text has ended."""
        if self._format.opening and self._read_whole(self._held[len(self._format.opening) :]):
            self._held = ""
        elif not self._step():
            form, is_open = self._format, bool(self._format.opening) or "{" in self._held
            text = self._held + (cut or "")
            if (
                cut is not None
                and is_open
                and (form.opening or form.header_begun.fullmatch(text) or form.header.match(text))
            ):
                self._drop()
            elif self._calls and not is_open:  # what separates bare calls
                self._held = ""
            else:
                self._reject()

    def _read_whole(self, body: str) -> bool:
        """Read a complete call that has no arguments or its members in another order; return whether it is one."""
        call = decode_json(body)
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._functions:
            return False
        arguments = call.get("arguments", call.get("parameters"))
        text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
        if not isinstance(decode_json(text), dict):
            return False
        self._open(name)
        self._add_arguments(text)
        self._step = self._read_text
        return True

    def _reject(self) -> bool:
        """Make content of what looked like a call."""
        self._step = self._read_text
        self._may_open = False
        self._add_content(len(self._format.opening))
        return True

    def _open(self, name: str) -> None:
        if not self._has_content:
            self._space = ""
        self._depth = 0
        self._may_open = True
        self._parts.append(CallPiece(index=self._calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
        self._calls += 1

    def _add_arguments(self, text: str) -> None:
        if text:
            self._parts.append(CallPiece(index=self._calls - 1, arguments=text))

    def _read_arguments(self) -> bool:
        """Read arguments up to the brace that closes them."""
        end = None
        for position, character in enumerate(self._held, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._step, end = self._read_tail, position
                    break
        self._add_arguments(self._held[:end])
        self._held = "" if end is None else self._held[end:]
        return end is not None

    def _read_tail(self) -> bool:
        """Read the end of a call; without a closing mark, what comes after the brace is content."""
        match = self._format.tail.match(self._held)
        if match is None and self._format.tail_begun.fullmatch(self._held):
            return False
        match = match or re.match(r"\s*\}", self._held)
        self._held = self._held[match.end() if match else 0 :]
        self._step = self._read_text
        return True


def decode_json(text: str) -> Any:
    """Return the value of JSON text, None if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
