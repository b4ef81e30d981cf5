"""The parts of a turn, and the interface of their reader."""

from __future__ import annotations

from typing import Protocol

import msgspec


class CallPiece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of a tool call."""

    index: int  # of the call in its turn, from 0
    id: str | None = None  # of the call; in its first piece only
    name: str | None = None  # of the function; in the call's first piece only
    arguments: str = ""  # more characters of the arguments' JSON text


class Thought(msgspec.Struct, frozen=True, gc=False):
    """A piece of the reasoning before an answer or a call."""

    text: str


Part = str | CallPiece | Thought  # new content of a turn, or a piece of one of its calls or of its reasoning


class TurnReader(Protocol):
    """Reads one choice's text as it arrives; the parts add up to the same turn wherever the text is cut."""

    finish_reason: str  # what to report when the engine says "stop"; final after `finish`
    unfinished: bool  # the text has ended inside a call, or before a required call

    def feed(self, text: str) -> list[Part]: ...  # reads more text

    def finish(self, cut: str | None = None) -> list[Part]: ...

    # Returns the held text. `cut` is None if the text has ended by itself, else the stop string cut off it, or "".
