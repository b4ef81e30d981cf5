"""Keeps the keys of a JSON object different while they are written.

A grammar cannot remember which keys of an open object it has seen. This follows the text of a sequence, knows the keys
of each open object, and rules out the tokens that would complete one of them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the API process reads only this module's constants, without numpy
    import numpy as np
    import numpy.typing as npt

UNIQUE_KEYS = "// the keys of each object differ"
"""The line of a grammar that switches this on."""
REASONING = "// reasoning: "
"""Begins a line with JSON: the marks of reasoning, those of the answer, and whether the text starts inside reasoning.
JSON in reasoning does not count; counting begins after the reasoning, or after the start of the answer."""
CALL_OPENING = "// a call begins with "
"""Begins a line with a JSON string: JSON begins there, or at the start of the text."""


class KeyTokens:
    """The tokens of a vocabulary that may end a key."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        quoted = [(token, id_) for id_, token in enumerate(tokens) if b'"' in token]
        self.endings: dict[bytes, list[int]] = {}  # by the text before the first quote
        for token, id_ in quoted:
            self.endings.setdefault(token.partition(b'"')[0], []).append(id_)
        self.long = [id_ for token, id_ in quoted if token.count(b'"') > 1]  # may contain a whole key


class KeyTracker:
    """Follows one sequence's text."""

    __slots__ = (
        "_escaped", "_in_string", "_is_key", "_is_reasoning", "_key", "_lent", "_marks", "_objects",
        "_opening", "_openings", "_recent", "_repeated", "_room", "_tokens", "_tried",
    )  # fmt: skip

    def __init__(
        self, tokens: KeyTokens, opening: bytes = b"", marks: tuple[bytes, bytes, bytes] | None = None,
        is_reasoning: bool = False,
    ) -> None:  # fmt: skip
        """Take the marks of the start and the end of reasoning, and of the start of the answer."""
        self._tokens = tokens
        self._opening = opening
        self._marks = marks
        self._is_reasoning = is_reasoning
        self._openings = tuple(filter(None, (opening, marks and marks[2])))
        self._room = max(map(len, (opening, b" ", *(marks or ()))))
        self._recent = b""  # the end of the text between calls
        self._objects: list[set[bytes] | None] = []  # the keys of each open object; None: an array
        self._in_string = self._escaped = False
        self._is_key = False  # the string that is open, or the next one, is a key
        self._key = bytearray()
        self._repeated = False
        self._lent = 0  # how many open objects belong to the tracker that this one is a trial copy of
        self._tried: set[bytes] = set()  # keys that the innermost of those objects would get

    def copy(self) -> KeyTracker:
        """Return a tracker that continues on its own."""
        twin = self._trial()
        twin._objects, twin._lent = [None if keys is None else set(keys) for keys in self._objects], 0
        return twin

    def _trial(self) -> KeyTracker:
        """Return a tracker to try one more token with, without changing this tracker's keys."""
        twin = KeyTracker(self._tokens, self._opening, self._marks, self._is_reasoning)
        for name in ("_recent", "_in_string", "_escaped", "_is_key"):
            setattr(twin, name, getattr(self, name))
        twin._objects, twin._key, twin._lent = list(self._objects), bytearray(self._key), len(self._objects)
        return twin

    def consume(self, token_id: int) -> None:
        """Read a token."""
        for byte in self._tokens.tokens[token_id]:
            self._read(byte)

    def forbid(self, bits: npt.NDArray[np.uint8]) -> None:
        """Clear the bits of the tokens that would repeat a key."""
        ids: list[int] = []
        if self._in_string and self._is_key and self._objects and (keys := self._objects[-1]):
            written, endings = bytes(self._key), self._tokens.endings
            if len(keys) < len(endings):
                for key in keys:
                    if key.startswith(written):
                        ids += endings.get(key[len(written) :], ())
            else:
                for text, found in endings.items():
                    if written + text in keys:
                        ids += found
        for id_ in self._tokens.long:
            if bits[id_ >> 3] >> (id_ & 7) & 1 and self._repeats(id_):
                ids.append(id_)
        for id_ in ids:
            bits[id_ >> 3] &= 255 ^ (1 << (id_ & 7))

    def _repeats(self, token_id: int) -> bool:
        twin = self._trial()
        twin.consume(token_id)
        return twin._repeated

    def _read(self, byte: int) -> None:
        if self._is_reasoning:
            self._read_reasoning(byte)
        elif self._in_string:
            self._read_string(byte)
        elif byte in b"{[":
            if self._objects or not self._opening or not self._recent or self._recent.endswith(self._openings):
                self._objects.append(set() if byte == ord("{") else None)
                self._is_key = byte == ord("{")
                self._recent = b" "
        elif not self._objects:
            self._recent = (self._recent + bytes((byte,)))[-self._room :]
            self._is_reasoning = self._marks is not None and self._recent.endswith(self._marks[0])
        elif byte in b"}]":
            self._objects.pop()
            if len(self._objects) < self._lent:
                self._lent, self._tried = len(self._objects), set()
        elif byte == ord('"'):
            self._in_string, self._key = True, bytearray()
        elif byte in b",:":
            self._is_key = byte == ord(",") and self._objects[-1] is not None

    def _read_reasoning(self, byte: int) -> None:
        self._recent = (self._recent + bytes((byte,)))[-self._room :]
        if self._marks is not None and self._recent.endswith(self._marks[1]):
            self._is_reasoning, self._recent = False, b""

    def _read_string(self, byte: int) -> None:
        if self._escaped or byte == ord("\\"):
            self._escaped = not self._escaped
        elif byte == ord('"'):
            self._in_string = False
            keys = self._objects[-1]
            if self._is_key and keys is not None:
                key, is_own = bytes(self._key), len(self._objects) > self._lent
                self._repeated |= key in keys or (not is_own and key in self._tried)
                (keys if is_own else self._tried).add(key)
            return
        self._key.append(byte)


def tracker_for(grammar: str, tokens: KeyTokens) -> KeyTracker | None:
    """Return a tracker if the grammar switches it on."""
    if UNIQUE_KEYS not in grammar:
        return None
    parts = [part.get("lark_grammar", "") for part in json.loads(grammar)["grammars"]]
    lines = dict(re.findall(f"^({re.escape(REASONING)}|{re.escape(CALL_OPENING)})(.*)$", parts[0], re.MULTILINE))
    opening = json.loads(lines.get(CALL_OPENING, '""')).encode()
    if REASONING not in lines:
        return KeyTracker(tokens, opening)
    start, end, answer, is_reasoning = json.loads(lines[REASONING])
    return KeyTracker(tokens, opening, (start.encode(), end.encode(), answer.encode()), is_reasoning)
