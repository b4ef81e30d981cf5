"""Tool calls in a model's text: the formats in which they are written, and the reader that finds them as it arrives."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from .parts import CallPiece, Part

SLICE = 4096  # characters read at a time
MAX_MARKUP = 2048  # characters of a call before its arguments, or after them; this text is read again as it grows
MAX_TRIAL = 2**14  # parse at most this much of a call's JSON first; only if that is inconclusive, all of it
JSON_SPACE, SPACES = " \t\n\r", re.compile(r"[ \t\n\r]*")
STRING_MARK, BRACKET, BRACE = re.compile(r'["\\]'), re.compile(r'["{}\[\]]'), re.compile(r"\s*\}")

# Patterns of characters that may be repeated: white space, characters of a JSON string, and those between bare calls.
_SPACE, _CHARACTER, _BETWEEN = r"\s", r"(?:[^\"\\]|\\(?:.|\Z))", r"[\s;,]"


@dataclass(frozen=True)
class ToolCallFormat:
    """How a call is written: `opening`, then `{"name": …, KEY: {…}}`, then `closing`."""

    key: str = "arguments"  # the reader accepts "arguments" and "parameters"
    opening: str = ""  # if empty, calls are bare JSON, and a turn either begins with a call or has none
    closing: str = ""
    separator: str = ""  # the grammar puts it between calls
    # Token ids of opening and closing, if they are special tokens: then `marked_calls.py` reads what is between them.
    ids: tuple[int, int] | None = None

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
        head = re.escape(self.opening) + r"\s*" if self.opening else f"{_BETWEEN}*"
        key = r'"(?:arguments|parameters)"'
        return re.compile(head + r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*' + key + r"\s*:\s*(?=\{)")

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
    """Return a regex for any prefix of the steps in sequence.

    A step longer than one character is a pattern that may repeat.
    """
    pattern = ""
    for step in reversed(steps):
        pattern = f"{step}*{pattern}" if len(step) > 1 else f"(?:{re.escape(step)}{pattern})?"
    return pattern


FORMATS = {
    "hermes": ToolCallFormat(opening="<tool_call>", closing="</tool_call>"),
    "json": ToolCallFormat(separator="\n"),
    "llama3_json": ToolCallFormat(key="parameters", separator="; "),
    "agentic": ToolCallFormat(opening="<|tool_call_start|>", closing="<|tool_call_end|>", ids=(-1, -1)),
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
        self._held, self._at = "", 0  # text, and how much of it has been read
        self._waiting: list[str] = []  # the held text plus what followed, while only the closing mark can decide
        self._overlap = ""  # the end of `_waiting`, which may begin the closing mark
        self._closing: int | None = (
            None  # where the closing mark is in the held text, -1 for nowhere; None if not known
        )
        self._space: list[str] = []  # white space after the content so far
        self._has_content = False
        self._may_open = True  # a bare call may begin here
        self._calls = 0
        self._step: Callable[[], bool] = self._read_text  # returns whether the next step has something to do
        self._parts: list[Part] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Part]:
        """Read more text."""
        for start in range(0, len(text), SLICE):
            self._feed(text[start : start + SLICE])
        return self._drain()

    def _feed(self, text: str) -> None:
        if self._waiting:
            overlap = self._overlap + text
            self._waiting.append(text)
            self._overlap = overlap[1 - len(self._format.closing) :]
            if self._format.closing not in overlap:
                return
            text = ""
        self._hold(text)
        while self._at < len(self._held) and self._step():
            pass

    def _hold(self, text: str) -> None:
        """Add text to the held text."""
        held = "".join(self._waiting) or self._held[self._at :]
        self._held, self._at, self._closing, self._waiting = held + text, 0, None, []

    def finish(self, cut: str | None = None) -> list[Part]:
        """Return parts of the held text; a call that lacks only its closing mark is complete."""
        self._hold("")
        while self._at < len(self._held) and self._step != self._read_tail:
            if self._step == self._read_header:
                self._end_header(cut)
            elif not self._step():  # the held text may be the beginning of the opening mark
                self._end_text(cut)
        self.unfinished |= self._step == self._read_arguments or (self._forced and not self._calls)
        if self.unfinished:
            self.finish_reason = "stop" if cut is None else "length"
        elif self._calls:
            self.finish_reason = self._reason
        elif space := "".join(self._space):
            self._parts.append(space)
        return self._drain()

    def _drain(self) -> list[Part]:
        parts: list[Part] = []
        for is_text, group in groupby(self._parts, key=lambda part: isinstance(part, str)):
            if not is_text:
                parts += group
            elif not self._forced:
                parts.append("".join(map(str, group)))
        self._parts = []
        return parts

    def _add_content(self, length: int) -> None:
        """Make this much of the held text content, except for white space at its end."""
        text = self._held[self._at : self._at + length]
        self._at += len(text)
        if content := text.rstrip():
            self._parts.append("".join(self._space) + content)
            self._space = []
            self._has_content = True
        self._space.append(text[len(content) :])

    def _read_text(self) -> bool:
        """Read content up to the next call."""
        opening = self._format.opening
        if not opening and self._may_open:
            self._step = self._read_header
            return True
        found = self._held.find(opening, self._at) if opening else -1
        if found >= 0:
            self._step = self._read_header
            self._add_content(found - self._at)
            return True
        kept = min(max(len(opening) - 1, 0), len(self._held) - self._at)
        while not opening.startswith(self._held[len(self._held) - kept :]):
            kept -= 1
        self._add_content(len(self._held) - kept - self._at)
        return False

    def _find_closing(self, start: int) -> int:
        """Return where the held text has the closing mark at or after `start`, -1 for nowhere."""
        if self._closing is None or 0 <= self._closing < start:
            self._closing = self._held.find(self._format.closing, start) if self._format.closing else -1
        return self._closing

    def _read_header(self) -> bool:
        """Read a call up to its arguments."""
        opening, closing, form = self._format.opening, self._format.closing, self._format
        start, limit = self._at + len(opening), self._at + MAX_MARKUP
        end = self._find_closing(start)
        match = form.header.match(self._held, self._at, limit)
        if match and (end < 0 or match.end() <= end):
            name = decode_json(match[1])
            if name not in self._functions:
                return self._reject()
            self._open(name)
            self._at = match.end()
            self._step = self._read_arguments
            return True
        if not opening:
            waits = len(self._held) < limit and form.header_begun.fullmatch(self._held, self._at)
            return False if waits else self._reject()
        if end < 0:
            begun = self._held[start:limit].lstrip()
            if (begun and begun[0] != "{") or (not begun and len(self._held) >= limit):
                return self._reject()
            if len(self._held) >= limit:
                self._waiting = [self._held[self._at :]]
                self._overlap = self._held[1 - len(closing) :]
            return False
        if not self._read_whole(start, end):
            return self._reject()
        self._at = end + len(closing)
        return True

    def _end_text(self, cut: str | None) -> None:
        """Decide on text that may begin an opening mark, since no more follows."""
        held, opening = self._held[self._at :], self._format.opening
        text = held + (cut or "")
        if cut is not None and held and (opening.startswith(text) or text.startswith(opening)):
            self._drop()
        else:
            self._add_content(len(held))

    def _drop(self) -> None:
        """Drop the held text, the beginning of a call that was cut off."""
        self._at, self.unfinished = len(self._held), True

    def _end_header(self, cut: str | None) -> None:
        """Decide on an unfinished call, since the text has ended."""
        opening = self._format.opening
        if opening and self._read_whole(self._at + len(opening), len(self._held)):
            self._at = len(self._held)
        elif not self._step():
            self._waiting = []
            form, is_open = self._format, bool(opening) or self._held.find("{", self._at) >= 0
            if cut is not None and is_open:
                text = self._held[self._at : self._at + MAX_MARKUP] + cut
                if opening or form.header_begun.fullmatch(text) or form.header.match(text):
                    self._drop()
                    return
            if self._calls and not is_open:  # only a separator of bare calls
                self._at = len(self._held)
            else:
                self._reject()

    def _read_whole(self, start: int, end: int) -> bool:
        """Read a complete call that has no arguments or its members in another order; return whether it is one."""
        call = decode_json(self._held, start, end)
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
        """Treat as content what only looked like a call."""
        self._step = self._read_text
        self._may_open = False
        self._add_content(len(self._format.opening))
        return True

    def _open(self, name: str) -> None:
        if not self._has_content:
            self._space = []
        self._depth = 0
        self._may_open = True
        self._parts.append(CallPiece(index=self._calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
        self._calls += 1

    def _add_arguments(self, text: str) -> None:
        if text:
            self._parts.append(CallPiece(index=self._calls - 1, arguments=text))

    def _read_arguments(self) -> bool:
        """Read arguments up to the brace that closes them."""
        start = position = self._at
        end = len(self._held)
        while position < end:
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            match = (STRING_MARK if self._in_string else BRACKET).search(self._held, position)
            if match is None:
                break
            position = match.end()
            character = match[0]
            if self._in_string or character == '"':
                self._escaped = character == "\\"
                self._in_string ^= not self._escaped
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if not self._depth:
                    self._step, end = self._read_tail, position
        self._add_arguments(self._held[start:end])
        self._at = end
        return self._step == self._read_tail

    def _read_tail(self) -> bool:
        """Read the end of a call; without a closing mark, the text after the brace is content."""
        limit = self._at + MAX_MARKUP
        match = self._format.tail.match(self._held, self._at, limit)
        if match is None and len(self._held) < limit and self._format.tail_begun.fullmatch(self._held, self._at):
            return False
        match = match or BRACE.match(self._held, self._at, limit)
        self._at = match.end() if match else self._at
        self._step = self._read_text
        return True


def decode_json(text: str, start: int = 0, end: int | None = None) -> Any:
    """Return the value of JSON text, None if it is not JSON."""
    end = len(text) if end is None else end
    start = end - len(text[start:end].lstrip(JSON_SPACE)) if text[start : start + 1].isspace() else start
    # Only a part at first: for an error, the library counts all lines before it.
    part = text[start : min(end, start + MAX_TRIAL)]
    try:
        try:
            value, length = _DECODER.raw_decode(part)
        except json.JSONDecodeError as error:
            if len(part) == end - start or (error.pos < MAX_TRIAL - 16 and "Unterminated" not in error.msg):
                return None
            value, length = _DECODER.raw_decode(text[start:end])
    except (ValueError, RecursionError):
        return None
    rest = SPACES.match(text, start + length, end)
    return value if rest and rest.end() == end else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
