"""Patterns of JSON Schema, which are JavaScript's, as terminals of llguidance's Lark.

A pattern may match anywhere in a text, and look ahead. A terminal matches whole texts and has no look-around, but
intersection and complement instead. `\\d`, `\\w` and `\\s` match ASCII, and their negations leave out all of Unicode's,
so that every reading of the pattern accepts each text that a terminal matches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_BRANCHES = 200  # of one pattern, once groups with anchors or look-ahead are written out
MAX_DEPTH = 50
ANYTHING = "/(?s:.*)/"
NOTHING = "/(?:)/"
QUANTIFIER = re.compile(r"(?:[*+?]|\{[0-9]{1,5}(?:,[0-9]{0,5})?\})")
OPENING = re.compile(r"\((?:\?(?::|P?<[A-Za-z_]\w*>|(?P<look>[=!])|(?P<other>.)))?", re.DOTALL)
ESCAPED = re.compile(
    r"u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|c([A-Za-z])|([pP]\{[\w=^]+\})|(.)", re.DOTALL
)
SETS = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\v\f\r\x{20}"}
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
UNSAFE = {'"', "\\", *map(chr, range(32)), "\x7f"}  # characters that JSON escapes


@dataclass(slots=True)
class Node:
    """A part of a pattern: a regular expression, a group, a look-ahead or an anchor."""

    kind: str  # "text", "group", "=", "!", "^" or "$"
    text: str = ""
    branches: list[list[Node]] = field(default_factory=list)
    repeat: str = ""

    @property
    def is_special(self) -> bool:
        """Whether it has an anchor or looks ahead."""
        return self.kind in "=!^$" or any(node.is_special for branch in self.branches for node in branch)

    def __str__(self) -> str:
        if self.kind == "text":
            return self.text + self.repeat
        return f"(?:{'|'.join(''.join(map(str, branch)) for branch in self.branches)}){self.repeat}"


class Pattern:
    """A parsed pattern; raises `ValueError` if it cannot be written as a terminal."""

    def __init__(self, text: str) -> None:
        self._text, self._position, self._left = text, 0, MAX_BRANCHES
        self.needs_escapes = False  # it demands a character that JSON escapes
        branches = self._alternatives(0)
        if self._position < len(text):
            raise ValueError("it has a ')' without '('")
        self._branches = branches
        self.terminal = self._either(branches, (True, True), True)

    def words(self, limit: int) -> list[str] | None:
        """Return all texts that match, None if there are more than `limit` or they are not known."""
        found: list[str] = []
        for branch in self._branches:
            if len(branch) < 2 or branch[0].kind != "^" or branch[-1].kind != "$":
                return None
            words = _words(branch[1:-1], limit)
            if words is None or len(found := found + words) > limit:
                return None
        return list(dict.fromkeys(found))

    def _alternatives(self, depth: int) -> list[list[Node]]:
        if depth > MAX_DEPTH:
            raise ValueError(f"its groups nest deeper than {MAX_DEPTH}")
        branches: list[list[Node]] = [[]]
        while self._position < len(self._text):
            character = self._text[self._position]
            if character == ")":
                break
            if character == "|":
                branches.append([])
                self._position += 1
            else:
                branches[-1].append(self._node(character, depth))
        return branches

    def _node(self, character: str, depth: int) -> Node:
        self._position += 1
        if character == "(":
            node = self._group(depth)
        elif character in "^$":
            return Node(character)
        elif character == "[":
            node = Node("text", self._class())
        elif character == "\\":
            node = self._escape()
        elif character == ".":
            node = Node("text", r"[^\n\r]")
        elif character in "*+?" or self._text.startswith("{,", self._position - 1):
            raise ValueError(f"nothing may be repeated by its {character!r}")
        else:
            node = self._literal(character)
        if match := QUANTIFIER.match(self._text, self._position):
            if node.kind not in ("text", "group"):
                raise ValueError("it repeats an anchor or a look-around")
            node.repeat, self._position = match[0], match.end()
            self._position += self._text[self._position : self._position + 1] == "?"  # a lazy one matches the same
        return node

    def _literal(self, character: str) -> Node:
        self.needs_escapes |= character in UNSAFE
        return Node("text", literal(character))

    def _group(self, depth: int) -> Node:
        match = OPENING.match(self._text, self._position - 1)
        if match is None or match["other"]:
            raise ValueError("it has a look-behind, flags or another extension")
        self._position = match.end()
        branches = self._alternatives(depth + 1)
        if self._position >= len(self._text):
            raise ValueError("it has an unclosed '('")
        self._position += 1
        return Node(match["look"] or "group", branches=branches)

    def _escape(self, in_class: bool = False) -> Node:
        """Read the escape after a backslash."""
        match = ESCAPED.match(self._text, self._position)
        if match is None:
            raise ValueError("it ends inside an escape sequence")
        self._position = match.end()
        long, short, byte, control, prop, other = match.groups()
        if prop:
            return Node("text", "\\" + prop)
        if code := long or short or byte:
            number = int(code, 16)
            low = re.compile(r"\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE).match(self._text, self._position)
            if 0xD800 <= number < 0xDC00 and low:
                number, self._position = 0x10000 + (number - 0xD800 << 10) + int(low[1], 16) - 0xDC00, low.end()
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise ValueError("it has half a character")
            return self._literal(chr(number))
        if control:
            return self._literal(chr(ord(control.upper()) - 64))
        if other in SETS and not in_class:
            return Node("text", f"[{SETS[other]}]")
        if other in "dwsDWS":
            return Node("text", "\\" + other)
        if not in_class and other in "AZz":
            return Node("^" if other == "A" else "$")
        if in_class and other == "b":
            return Node("text", literal("\b"))
        if other in CONTROLS:
            return self._literal(CONTROLS[other])
        if other.isalnum():
            raise ValueError(f"it has \\{other}, which is a word boundary, a back reference or unknown")
        return self._literal(other)

    def _class(self) -> str:
        """Read a class after its '['; return it in Rust's syntax."""
        needs_escapes, items = self.needs_escapes, ""
        negated = self._text.startswith("^", self._position)
        self._position += negated
        ends_single = False  # the last item is a character, with which a range can begin
        while self._position < len(self._text) and (character := self._text[self._position]) != "]":
            self._position += 1
            is_range = (
                character == "-" and ends_single and self._text[self._position : self._position + 1] not in ("]", "")
            )
            if is_range:
                item = "-"
            elif character == "\\":
                item = self._escape(in_class=True).text
                item = item if negated else SETS.get(item[1:], item)
            else:
                item = literal(character)
            ends_single = not is_range and not items.endswith("-") and not re.match(r"\\[dswDSWpP]|0-9|\\t", item)
            items += item
        if self._position >= len(self._text) or not items:
            raise ValueError("it has an unclosed or empty '['")
        self._position += 1
        self.needs_escapes = needs_escapes
        return f"[{'^' if negated else ''}{items}]"

    def _either(self, branches: list[list[Node]], first: tuple[bool, bool], free_end: bool | None) -> str:
        """Return Lark for any of the branches.

        `first`: whether they are at the text's start, and whether more may precede them. `free_end`: whether more may
        follow them; None: something else does.
        """
        return " | ".join(f"({self._sequence(branch, first, free_end)})" for branch in branches)

    def _sequence(self, nodes: list[Node], first: tuple[bool, bool], free_end: bool | None) -> str:
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has too many alternatives with anchors or look-ahead")
        at_start, free_start = first
        while at_start and nodes and nodes[0].kind == "^":
            nodes, free_start = nodes[1:], False
        while free_end is not None and nodes and nodes[-1].kind == "$":
            nodes, free_end = nodes[:-1], False
        special = next((i for i, node in enumerate(nodes) if node.is_special), len(nodes))
        node = nodes[special] if special < len(nodes) else None
        if node is not None and node.kind == "group" and not node.repeat:
            written_out = [[*nodes[:special], *branch, *nodes[special + 1 :]] for branch in node.branches]
            return self._either(written_out, (at_start, free_start), free_end)
        before = ANYTHING if free_start else ""
        if special:
            before += f" /{''.join(map(str, nodes[:special]))}/"
        if node is None:
            return f"{before} {ANYTHING if free_end else ''}".strip() or NOTHING
        if node.kind not in "=!" or free_end is None:
            raise ValueError("it has an anchor or a look-ahead in a place where it cannot be resolved")
        rest = self._sequence(nodes[special + 1 :], (False, False), free_end)
        look = self._either(node.branches, (at_start and not special and not free_start, False), True)
        return f"{before} (({rest}) & {'~' if node.kind == '!' else ''}({look}))"


def literal(text: str) -> str:
    """Return a regular expression for exactly this text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def _words(nodes: list[Node], limit: int) -> list[str] | None:
    """Return all texts that these nodes match in a row."""
    found = [""]
    for node in nodes:
        low, high = _bounds(node.repeat)
        if high is None:
            return None
        options: list[str] = []
        if node.kind == "group":
            for branch in node.branches:
                if (words := _words(branch, limit)) is None:
                    return None
                options += words
        elif node.kind == "text" and (
            match := re.fullmatch(r"\[([^\\^]+)\]|([a-zA-Z0-9]|\\x\{[0-9a-f]+\})", node.text)
        ):
            for first, last in re.findall(r"([^-])(?:-([^-]))?", match[1] or ""):
                options += map(chr, range(ord(first), ord(last or first) + 1))
            if match[2]:
                options = [chr(int(match[2][3:-1], 16)) if len(match[2]) > 1 else match[2]]
        else:
            return None
        longest, repeated = found, [] if low else list(found)
        for count in range(1, high + 1):
            if len(longest) * len(options) + len(repeated) > limit:
                return None
            longest = [word + option for word in longest for option in options]
            repeated += longest if count >= low else []
        found = repeated
    return found


def _bounds(repeat: str) -> tuple[int, int | None]:
    """Return a quantifier's least and greatest count; None: no limit."""
    if repeat in ("", "?"):
        return (0, 1) if repeat else (1, 1)
    low, _, high = repeat.strip("{}").partition(",")
    return (int(low), int(high or low)) if low.isdecimal() and not repeat.endswith(",}") else (0, None)
