"""GBNF, llama.cpp's grammars, in llguidance's Lark.

GBNF reads characters; Lark reads words, the longest text that a terminal matches. So every rule that does not recurse
becomes part of a terminal, as long as possible; a grammar without recursion is one terminal with exactly its meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MARK = re.compile(r"^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", re.MULTILINE)
"""Marks a grammar as GBNF, since Lark has no `::=`."""
MAX_DEPTH = 64
TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*)|(?P<newline>\n)|(?P<define>(?P<head>[A-Za-z_][\w-]*)\s*::=\s*)
    |(?P<name>[A-Za-z_][\w-]*)|(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<set>\[(?:[^\]\\]|\\.)*\])
    |(?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\})
    |(?P<sign>[()|.])""",
    re.VERBOSE,
)
ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\])", re.DOTALL)
LETTERS = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}


@dataclass(slots=True)
class Item:
    """A part of a rule: Lark for a terminal, the name of a rule, or alternatives in parentheses."""

    text: str = ""
    name: str = ""
    branches: list[list[Item]] = field(default_factory=list)
    repeat: str = ""

    def names(self) -> Iterator[str]:
        """Yield the rules that it refers to."""
        if self.name:
            yield self.name
        for branch in self.branches:
            for item in branch:
                yield from item.names()


def to_lark(grammar: str) -> str:
    """Translate a grammar; raises `ValueError` with the reason if it is wrong."""
    rules = _Parser(grammar).rules
    if "root" not in rules:
        raise ValueError("it has no rule named root")
    uses = {
        name: {used for branch in branches for item in branch for used in item.names()}
        for name, branches in rules.items()
    }
    if missing := sorted(set().union(*uses.values()) - rules.keys()):
        raise ValueError(f"it has no rule named {missing[0]}")
    return _Writer(rules, _without_recursion(uses)).text


def _without_recursion(uses: dict[str, set[str]]) -> set[str]:
    """Return the rules that refer to no rule that refers to itself."""
    users: dict[str, list[str]] = {name: [] for name in uses}
    for name, used in uses.items():
        for one in used:
            users[one].append(name)
    left = {name: len(used) for name, used in uses.items()}
    ready = [name for name, number in left.items() if not number]
    found = set(ready)
    while ready:
        for name in users[ready.pop()]:
            left[name] -= 1
            if not left[name]:
                ready.append(name)
                found.add(name)
    return found


class _Parser:
    """Reads the rules of a grammar."""

    def __init__(self, grammar: str) -> None:
        self.rules: dict[str, list[list[Item]]] = {}
        stack: list[list[list[Item]]] = []  # the alternatives of each open parenthesis, outside first
        position, line = 0, 1
        while position < len(grammar):
            match = TOKEN.match(grammar, position)
            if match is None:
                raise ValueError(f"line {line} has {grammar[position]!r} where it has no meaning")
            position, line = match.end(), line + match[0].count("\n")
            if match["define"]:
                if len(stack) > 1 or match["head"] in self.rules:
                    problem = "has an unclosed '('" if len(stack) > 1 else f"defines {match['head']} again"
                    raise ValueError(f"line {line} {problem}")
                stack = [[[]]]
                self.rules[match["head"]] = stack[0]
            elif not (match["space"] or match["newline"]):
                if not stack or len(stack) > MAX_DEPTH:
                    raise ValueError(f"line {line} is outside of a rule or too deep")
                self._read(match, stack, line)
        if len(stack) > 1:
            raise ValueError("it has an unclosed '('")

    def _read(self, match: re.Match[str], stack: list[list[list[Item]]], line: int) -> None:
        sequence, sign = stack[-1][-1], match["sign"]
        if match["name"]:
            sequence.append(Item(name=match["name"]))
        elif match["text"]:
            text = "".join(_characters(match["text"][1:-1]))
            spelled = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
            sequence.append(Item(spelled if text else "/(?:)/"))
        elif match["set"]:
            sequence.append(Item(f"/{_set(match['set'][1:-1])}/"))
        elif match["repeat"]:
            if not sequence or sequence[-1].repeat:
                raise ValueError(f"line {line} repeats nothing")
            sequence[-1].repeat = re.sub(r"\s", "", match["repeat"])
        elif sign == "(":
            sequence.append(Item(branches=[[]]))
            stack.append(sequence[-1].branches)
        elif sign == "|":
            stack[-1].append([])
        elif sign == ")":
            if len(stack) == 1:
                raise ValueError(f"line {line} has a ')' without '('")
            stack.pop()
        else:
            sequence.append(Item("/(?s:.)/"))


class _Writer:
    """Writes the Lark of rules; those in `flat` do not recurse."""

    def __init__(self, rules: dict[str, list[list[Item]]], flat: set[str]) -> None:
        self._flat = flat
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._extra: dict[str, str] = {}  # terminals within rules
        lines = []
        for name, branches in rules.items():
            write = self._terminal if name in flat else self._rule
            lines.append(f"{self._name(name)}: {' | '.join(map(write, branches))}")
        lines += [f"{name}: {text}" for text, name in self._extra.items()]
        self.text = "\n".join([f"start: {self._name('root')}", *lines])

    def _name(self, name: str) -> str:
        return f"{'T' if name in self._flat else 'r'}{self._numbers[name]}"

    def _terminal(self, items: list[Item]) -> str:
        """Return Lark for items that are all in terminals."""
        texts = []
        for item in items:
            inner = f"({' | '.join(map(self._terminal, item.branches))})" if item.branches else item.text
            texts.append((inner or self._name(item.name)) + item.repeat)
        return " ".join(texts) or "/(?:)/"

    def _rule(self, items: list[Item]) -> str:
        """Return Lark for items of a rule, with neighbours that do not recurse as one terminal."""
        texts: list[str] = []
        run: list[Item] = []
        for item in [*items, None]:
            if item is not None and set(item.names()) <= self._flat:
                run.append(item)
                continue
            if run:
                texts.append(self._extra.setdefault(self._terminal(run), f"X{len(self._extra)}"))
                run = []
            if item is not None:
                inner = f"({' | '.join(map(self._rule, item.branches))})" if item.branches else self._name(item.name)
                texts.append(inner + item.repeat)
        return " ".join(texts) or '""'


def _characters(text: str) -> Iterator[str]:
    for byte, short, long, letter, plain in ESCAPE.findall(text):
        code = byte or short or long
        if code and (int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000):
            raise ValueError(f"\\{code} is not a character")
        yield chr(int(code, 16)) if code else LETTERS.get(letter, letter) or plain


def _set(text: str) -> str:
    """Return a regular expression for one character of a set."""
    negated = text.startswith("^")
    characters = list(_characters(text[negated:]))
    if not characters:
        raise ValueError("it has an empty set []")
    parts = []
    position = 0
    while position < len(characters):
        first, *range_ = characters[position : position + 3]
        parts.append(rf"\x{{{ord(first):x}}}")
        position += 1
        if len(range_) == 2 and range_[0] == "-":
            if ord(range_[1]) < ord(first):
                raise ValueError(f"its range {first}-{range_[1]} is empty")
            parts.append(rf"-\x{{{ord(range_[1]):x}}}")
            position += 2
    return f"[{'^' if negated else ''}{''.join(parts)}]"
