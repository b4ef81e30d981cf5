"""Splits generated text at the marks of its sections: reasoning, the final answer and tool calls.

The pieces add up to the same sections wherever the text is cut, and to the whole text: marks, and the white space
that goes with them, are pieces too.
"""

from __future__ import annotations

from ..messages import SECTIONS, Marks, Section

Piece = tuple[Section, str]


class SectionSplitter:
    """Follows one text, from the section in which it starts."""

    def __init__(self, marks: Marks) -> None:
        self._ids = {id_: number for number, id_ in enumerate(marks.ids) if id_ >= 0}
        self._trims = not marks.ids
        self._openings: dict[str, Section | None] = {marks.think[0]: "reasoning", marks.final[0]: "content"}
        self._closings = {"reasoning": marks.think[1], "content": marks.final[1]}
        self._inside: Section | None = marks.starts_in  # the section whose end mark is next
        self._held = ""  # text that may begin a mark
        self._after_mark = marks.starts_in is not None and not marks.continues
        self._space: Piece | None = None  # white space that is removed if a mark follows

    @property
    def section(self) -> Section:
        """The section that the next text belongs to."""
        return self._inside or "content"

    def is_mark(self, token_id: int) -> bool:
        """Whether a token is a mark by itself."""
        return token_id in self._ids

    def feed(self, token_id: int, text: str) -> list[Piece]:
        """Return the pieces that are decided after one more token and the text that it completes."""
        if not self._trims:
            number = self._ids.get(token_id)
            if number is None:
                return [(self.section, text)] if text else []
            self._inside = None if number % 2 else SECTIONS[number // 2]
            return [("mark", text)]
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            wanted: dict[str, Section | None]
            wanted = self._openings if self._inside is None else {self._closings[self._inside]: None}
            found = [(start, mark) for mark in wanted if (start := text.find(mark)) >= 0]
            if not found:
                kept = max(_overlap(text, mark) for mark in wanted)
                self._held = text[len(text) - kept :]
                return [*pieces, (self.section, text[: len(text) - kept])]
            start, mark = min(found)
            pieces += [(self.section, text[:start]), ("mark", mark)]
            self._inside, text = wanted[mark], text[start + len(mark) :]
        return pieces

    def finish(self) -> list[Piece]:
        """Return the held text, which began no mark."""
        held, self._held = self._held, ""
        return [(self.section, held)] if held else []

    def trim(self, section: Section, text: str) -> list[Piece]:
        """Return a piece without the white space around marks of plain text, which becomes part of the marks."""
        if not self._trims:
            return [(section, text)] if text or section == "mark" else []
        if section == "mark":
            self._after_mark = True
            return [*self._take_space("mark"), ("mark", text)]
        pieces: list[Piece] = []
        if self._after_mark:
            bare = text.lstrip()
            if text != bare:
                pieces.append(("mark", text[: len(text) - len(bare)]))
            text, self._after_mark = bare, not bare
        if content := text.rstrip():
            pieces += [*self._take_space(None), (section, content)]
        if space := text[len(content) :]:
            self._space = (section, (self._space[1] if self._space else "") + space)
        return pieces

    def finish_trimming(self) -> list[Piece]:
        """Return the white space at the end of the text, since no mark follows."""
        return self._take_space(None)

    def _take_space(self, section: Section | None) -> list[Piece]:
        taken, self._space = self._space, None
        return [(section or taken[0], taken[1])] if taken else []


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` begin `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
