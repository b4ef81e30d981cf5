"""Reads tool calls between special tokens: JSON of one call or of a list of calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from typing import Any

from ...engine.messages import Section
from .parts import CallPiece, Part, Thought
from .tool_calls import decode_json


class MarkedCallReader:
    """Finds calls of known functions in the sections of a text, and reports them when their section ends.

    A section that is not such JSON, or calls an unknown function, is content. If the end of the text cuts it off, it is
    dropped, unless only its end mark is missing.
    """

    def __init__(self, functions: Collection[str], finish_reason: str = "tool_calls", forced: bool = False) -> None:
        """`finish_reason` is reported for a turn that ends with complete calls; a `forced` turn has no content."""
        self.finish_reason = "stop"
        self.unfinished = False
        self._functions = functions
        self._reason = finish_reason
        self._forced = forced
        self._pieces: list[str] = []  # of the open section
        self._calls = 0

    def read(self, section: Section, text: str) -> list[Part]:
        """Read a piece of a section."""
        if section == "call":
            self._pieces.append(text)
            return []
        parts = self._end_section()
        if section == "reasoning":
            return [*parts, Thought(text)]
        return [*parts, *(self.feed(text) if section == "content" else ())]

    def feed(self, text: str) -> list[Part]:
        """Read content."""
        return [text] if text and not self._forced else []

    def finish(self, cut: str | None = None) -> list[Part]:
        """Return a last call that lacks only its end mark."""
        parts = self._end_section(is_cut=cut is not None)
        self.unfinished |= self._forced and not self._calls
        if self.unfinished:
            self.finish_reason = "stop" if cut is None else "length"
        elif self._calls:
            self.finish_reason = self._reason
        return parts

    def _end_section(self, is_cut: bool = False) -> list[Part]:
        text, self._pieces = "".join(self._pieces), []
        calls = self._calls_of(decode_json(text.strip())) if text else []
        if calls:
            return [*calls]
        self.unfinished |= bool(text) and is_cut
        return self.feed(text) if not is_cut else []

    def _calls_of(self, value: Any) -> list[CallPiece]:
        """Return the calls in a value, none if one of them names an unknown function."""
        calls = []
        for index, call in enumerate(value if isinstance(value, list) else [value], self._calls):
            call = call.get("function", call) if isinstance(call, dict) else {}
            name = call.get("name") if isinstance(call, dict) else None
            if not isinstance(name, str) or name not in self._functions:
                return []
            arguments = call.get("arguments", call.get("parameters"))
            text = arguments if isinstance(arguments, str) else _dump({} if arguments is None else arguments)
            if not isinstance(decode_json(text), dict):
                return []
            calls.append(CallPiece(index=index, id=f"call_{uuid.uuid4().hex[:24]}", name=name, arguments=text))
        self._calls += len(calls)
        return calls


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
