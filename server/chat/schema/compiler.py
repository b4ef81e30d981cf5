"""Writes a grammar in llguidance's Lark for the JSON texts of the values that are valid against a schema.

Each set of parts of the schema that a value must satisfy becomes a rule, so recursive schemas become recursive rules.
Rules that no text can match are removed, with the alternatives that need them. Where JSON Schema allows more than a
grammar can express, the grammar allows less: members come in the order of the schema, an object that lists its members
and does not mention others has no others, and strings with a pattern have no escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any, NamedTuple

from ....engine.grammar.object_keys import UNIQUE_KEYS
from .formats import FORMATS
from .numbers import INT64, MAX_LITERALS, Range, number_regex
from .objects import members_of
from .patterns import literal
from .reader import Part, Parts, Reader, UnsatisfiableError, exact, identity, listed_items
from .unions import separate

MAX_RULES = 20_000
MAX_SIZE = 2 << 20  # characters of a grammar
MAX_REPEATS = 100_000  # items of an array, more than any context holds
MAX_SET = 60  # different values of an array with unique items
# White space between JSON tokens: nothing, a space, or a line break with an indent. A model may write compact,
# spaced or indented JSON as it was trained to, but cannot write white space without end.
SPACE = r"(?: |\n {0,32}|\n\t{0,8})?"
SAFE = r'/[^"\\\x00-\x1f\x7f]*/'  # text that JSON writes as it is
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f]|\\(?:["\\\x{2f}bfnrt]|u00[01][0-9a-fA-F]|u007[fF]))'


class Repeat(NamedTuple):
    """Symbols that may be repeated; `high` None: without a limit."""

    symbols: Sequence[Symbol]
    low: int
    high: int | None


Symbol = str | int | Repeat  # Lark, the number of a rule, or a repetition
Alternatives = list[Sequence[Symbol]]


@dataclass(slots=True)
class Rule:
    """A rule; without alternatives, no text matches it."""

    alternatives: Alternatives
    reason: str = ""  # why it has none


class SchemaCompiler:
    """Writes the grammar of one schema."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._rules: list[Rule] = []
        self._numbers: dict[frozenset[Part], int] = {}
        self._pending: list[tuple[int, Parts]] = []
        self._terminals: dict[str, str] = {}
        self._size = 0  # characters of the terminals
        self._has_open_keys = False
        self._open, self._close = self._terminal(r"/\{/"), self._terminal(rf"/{SPACE}\}}/")
        self._open_list, self._close_list = self._terminal(r"/\[/"), self._terminal(rf"/{SPACE}\]/")
        self._space = Repeat([self._terminal(f"/{SPACE[:-1]}/")], 0, 1)  # before the first item
        self._comma = self._space_after(",")

    def compile(self) -> str:
        """Return the grammar; raise `RequestError` if there is none."""
        start = self.rule((self.reader.root,))
        while self._pending:
            number, parts = self._pending.pop()
            try:
                self._rules[number].alternatives = self._alternatives(parts)
            except UnsatisfiableError as error:
                self._rules[number].reason = str(error)
            if len(self._rules) > MAX_RULES:
                raise self.reader.too_complex()
        self._prune()
        if not self._rules[start].alternatives:
            reason = next((rule.reason for rule in self._rules if rule.reason), "it refers to itself without an end")
            raise self.reader.error("no text satisfies it:", reason)
        lines = [UNIQUE_KEYS] if self._has_open_keys else []
        lines.append(f"start: r{start}")
        for number, rule in enumerate(self._rules):
            if rule.alternatives:
                lines.append(
                    f"r{number}: " + "\n | ".join(" ".join(map(_write, one)) or '""' for one in rule.alternatives)
                )
        lines += [f"{name}: {text}" for text, name in self._terminals.items()]
        return "\n".join(lines)

    def _prune(self) -> None:
        """Remove rules and alternatives that no text can match."""
        users: dict[int, list[int]] = {}  # of each rule
        for number, rule in enumerate(self._rules):
            for needed in {needed for one in rule.alternatives for needed in _needed(one)}:
                users.setdefault(needed, []).append(number)
        productive: set[int] = set()
        pending = list(range(len(self._rules)))
        while pending:
            number = pending.pop()
            if number not in productive and any(
                all(_can_end(symbol, productive) for symbol in one) for one in self._rules[number].alternatives
            ):
                productive.add(number)
                pending += users.get(number, ())
        for rule in self._rules:
            kept = [one for one in rule.alternatives if all(_can_end(symbol, productive) for symbol in one)]
            rule.alternatives = [[s for s in one if not _is_empty(s, productive)] for one in kept]

    def rule(self, parts: Iterable[Part]) -> int:
        """Return the number of the rule for the values that satisfy all parts."""
        key = frozenset(parts := tuple(parts))
        if key not in self._numbers:
            self._numbers[key] = self._new_rule([])
            self._pending.append((self._numbers[key], parts))
        return self._numbers[key]

    def _new_rule(self, alternatives: Alternatives) -> int:
        self._rules.append(Rule(alternatives))
        return len(self._rules) - 1

    def _terminal(self, text: str) -> str:
        if text not in self._terminals:
            self._terminals[text] = f"T{len(self._terminals)}"
            self._size += len(text)
            if self._size > MAX_SIZE:
                raise self.reader.too_complex()
        return self._terminals[text]

    def _space_after(self, regex: str) -> str:
        return self._terminal(f"/{regex}{SPACE}/")

    def _alternatives(self, parts: Parts) -> Alternatives:
        parts, choice = self.reader.expand(parts)
        if choice is not None:
            options = separate(self.reader, choice, parts) if choice.exclusive else choice.options
            return [[self.rule((*parts, *option))] for option in options]
        values, reason = self.reader.values(parts), "no type is left"
        found: Alternatives = []
        for kind in self.reader.types(parts):
            try:
                if kind in ("null", "boolean"):
                    found += [[f'"{text}"'] for text in self._names(kind, parts, values)]
                elif kind == "number":
                    found += [[self._number(parts, values)]]
                elif kind == "string":
                    found += [[self._string(parts, values)]]
                elif values is None:
                    found += self._array(parts) if kind == "array" else self._object(parts)
            except UnsatisfiableError as error:
                reason = str(error)
        if not found:
            raise UnsatisfiableError(reason)
        return found

    def _names(self, kind: str, parts: Parts, values: list[Any] | None) -> list[str]:
        names = {"null": None} if kind == "null" else {"true": True, "false": False}
        excluded = [identity(value) for part in parts for value in part.get("!enum") or ()]
        allowed = None if values is None else list(map(identity, values))
        return [
            name for name, value in names.items()
            if identity(value) not in excluded and (allowed is None or identity(value) in allowed)
        ]  # fmt: skip

    def _number(self, parts: Parts, values: list[Any] | None) -> Symbol:
        limits, steps = self.reader.range(parts)
        if values is not None:
            numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
            fitting = [n for n in numbers if exact(n) in limits and not any(exact(n) % step for step, _ in steps)]
            return self._either((literal(repr(n)) for n in fitting), "none of its numbers is allowed")
        if limits.is_empty:
            raise UnsatisfiableError(f"{parts[0].path or 'it'} has a minimum above its maximum")
        if steps:
            return self._multiples(limits, steps)
        excluded = [value for part in parts for value in part.get("!enum") or ()]
        points = {exact(value) for value in excluded if isinstance(value, (int, float)) and not isinstance(value, bool)}
        ranges = [limits]
        for point in sorted(points):  # ascending, so that each can only be in the last range
            sides = Range(high=point, open_high=True), Range(low=point, open_low=True)
            ranges[-1:] = [part for side in sides for one in ranges[-1:] if not (part := one.narrow(side)).is_empty]
        return self._either(map(number_regex, ranges), "none of its numbers is allowed")

    def _multiples(self, limits: Range, steps: list[tuple[Fraction, str]]) -> Symbol:
        """Return Lark for the multiples of all steps."""
        step = Fraction(1 if limits.whole else 0)
        for one, _ in steps:
            step = Fraction(lcm(step.numerator, one.numerator), gcd(step.denominator, one.denominator)) if step else one
        least, greatest = limits.least(step), limits.greatest(step)
        edge = INT64 // step
        low, high = -edge if least is None else least, edge if greatest is None else greatest
        if low > high and None not in (least, greatest):
            raise UnsatisfiableError(f"{steps[0][1]} has no multiple between the bounds")
        if 0 <= high - low < MAX_LITERALS:
            return self._either([literal(_decimal(n * step)) for n in range(low, high + 1)], "")
        digits = next((n for n in range(4) if limits.whole and 10**n % step == 0), None)
        if digits is not None:
            ends = "|".join(str(n).zfill(digits) for n in range(0, 10**digits, int(step)))
            short = "|".join(str(n) for n in range(0, 10**digits, int(step)))
            return self._terminal(rf"/{number_regex(limits)}/ & /-?(?:[0-9]*(?:{ends})|{short})/")
        edge = 10**15 // step  # as far as the library computes exactly
        low, high = max(low, -edge), min(high, edge)
        if low > high:
            raise self.reader.error(steps[0][1], "cannot be enforced with bounds of more than 15 digits")
        kind = "integer" if limits.whole else "number"
        lines = f'"minimum":{_decimal(low * step)},"maximum":{_decimal(high * step)},"multipleOf":{_decimal(step)}'
        return f'%json {{"type":"{kind}",{lines}}}'

    def _either(self, regexes: Iterable[str], reason: str) -> str:
        """Return a terminal for any of the regular expressions."""
        if not (listed := list(regexes)):
            raise UnsatisfiableError(reason)
        return self._terminal(f"/(?:{'|'.join(listed)})/")

    def texts(self, parts: Parts) -> list[str]:
        """Return Lark for a string's text, apart from its length."""
        found = []
        for part in parts:
            for keyword, sign in (("pattern", ""), ("!pattern", "~")):
                if (text := part.get(keyword)) is not None:
                    found.append(f"{sign}({self.reader.pattern(text, part.at(keyword).path).terminal})")
            if (form := FORMATS.get(part.get("format"))) is not None:
                found.append(f"/{form}/")
            if texts := [value for value in part.get("!enum") or () if isinstance(value, str)]:
                found.append(f"~/{'|'.join(map(literal, texts))}/")
        return list(dict.fromkeys(found))

    def length(self, parts: Parts, what: str) -> tuple[int, int | None]:
        """Return the counts of `what`; raise `UnsatisfiableError` if there are none."""
        low, high = self.reader.counts(parts, what)
        if high is not None and low > high:
            raise UnsatisfiableError(f"{parts[0].path or 'it'} has min{what} {low} above max{what} {high}")
        return low, high

    def _string(self, parts: Parts, values: list[Any] | None) -> Symbol:
        low, high = self.length(parts, "Length")
        texts, size = self.texts(parts), f"{{{low},{'' if high is None else high}}}"
        if values is not None:
            fitting = [v for v in values if isinstance(v, str) and low <= len(v) <= (len(v) if high is None else high)]
            if not fitting:
                raise UnsatisfiableError("none of its strings is allowed")
            quoted = f"/{'|'.join(literal(quote(value)) for value in fitting)}/"
            return self._terminal(" & ".join([f"({quoted})", *(f'("\\"" ({text}) "\\"")' for text in texts)]))
        if not texts:
            return self._terminal(f'/"{CHARACTER}{size if low or high is not None else "*"}"/')
        patterns = [(text, part.at("pattern").path) for part in parts if (text := part.get("pattern")) is not None]
        if len(texts) == len(dict(patterns)) and any(self.reader.pattern(*one).needs_escapes for one in patterns):
            schema: dict[str, Any] = {"type": "string", "allOf": [{"pattern": text} for text, _ in patterns]}
            lengths = {"minLength": low} | ({} if high is None else {"maxLength": high})
            return f"%json {json.dumps(schema | lengths)}"
        if low or high is not None:
            texts.append(f"/(?s:.{size})/")
        return self._terminal(f'"\\"" ({" & ".join([*texts, SAFE])}) "\\""')

    def _array(self, parts: Parts) -> Alternatives:
        low, high = self.length(parts, "Items")
        if low > MAX_REPEATS:
            raise self.reader.error(parts[0].path, f"has minItems {low}; the limit is {MAX_REPEATS}")
        high = high if high is None or high < MAX_REPEATS else MAX_REPEATS
        listed = max((len(part.get(key)) for part in parts if (key := listed_items(part))), default=0)
        if any(part.get("uniqueItems") for part in parts) and high not in (0, 1):
            return self._set(parts, low, high, listed)
        number = min(listed, high) if high is not None else listed
        rule = self._items_from(number, self.rule(self.reader.item(parts, None)), low, high)
        for n in range(number - 1, -1, -1):
            comma = self._comma if n else self._space
            following: Alternatives = [[comma, self.rule(self.reader.item(parts, n)), rule]]
            rule = self._new_rule(following if n < low else [*following, []])
        return [[self._open_list, rule, self._close_list]]

    def _items_from(self, count: int, item: Symbol, low: int, high: int | None) -> int:
        """Return a rule for more of an item after `count` others, so that there are from `low` to `high` in all."""
        low, high = max(0, low - count), None if high is None else high - count
        if count:
            return self._new_rule([[Repeat([self._comma, item], low, high)]])
        more = Repeat([self._comma, item], max(0, low - 1), None if high is None else high - 1)
        return self._new_rule([*([[]] if not low else []), *([[self._space, item, more]] if high != 0 else [])])

    def _set(self, parts: Parts, low: int, high: int | None, listed: int) -> Alternatives:
        """Return the alternatives for an array of different items: in the order of the schema, if they are known."""
        path = next(part.at("uniqueItems").path for part in parts if part.get("uniqueItems"))
        item, choice = self.reader.expand(self.reader.item(parts, None))
        values = self.reader.values(item)
        limits, steps = self.reader.range(item)
        types = self.reader.types(item)
        if values is None and types == ["boolean"]:
            values = [False, True]
        first, last = limits.least(Fraction(1)), limits.greatest(Fraction(1))
        if values is None and types == ["number"] and limits.whole and first is not None and last is not None:
            values = [n for n in range(first, min(last, first + MAX_SET) + 1) if not any(n % step for step, _ in steps)]
        if listed or choice or values is None or len(values) > MAX_SET:
            raise self.reader.error(path, f"can only be enforced for items of up to {MAX_SET} known values")
        one = [self.rule((*item, Part({"const": value}, f"{path}~{n}"))) for n, value in enumerate(values)]
        return [[self._open_list, self._chain([(number, False) for number in one], None, low, high), self._close_list]]

    def _chain(self, items: Sequence[tuple[Symbol, bool]], rest: Symbol | None, low: int, high: int | None) -> int:
        """Return a rule for items in this order with commas between them; each with whether it is required.

        `rest` may follow them any number of times; None: nothing may. There are from `low` to `high` items in all.
        """
        low = 0 if low <= sum(must for _, must in items) else low
        high = None if rest is None and high is not None and high >= len(items) else high
        cap = max(low if high is None else high, 1)  # more need not be counted
        if len(items) * cap > MAX_RULES:
            raise self.reader.too_complex()
        after: list[int] = []
        for count in range(min(len(items), cap) + 1):
            if rest is not None:
                after.append(self._items_from(count, rest, low, high))
            else:
                after.append(self._new_rule([[]] if count >= low else []))
        for index in range(len(items) - 1, -1, -1):
            (item, must), rules = items[index], []
            for count in range(min(index, cap) + 1):
                comma = self._comma if count else self._space
                chosen: Alternatives = [[comma, item, after[min(count + 1, cap)]]] if count != high else []
                rules.append(self._new_rule(chosen if must else [*chosen, [after[count]]]))
            after = rules
        return after[0]

    def _object(self, parts: Parts) -> Alternatives:
        low, high = self.length(parts, "Properties")
        members = members_of(self.reader, parts, self.texts, low)
        items: list[tuple[Symbol, bool]] = []
        for name, value, must in members.named:
            key = self._space_after(literal(quote(name)) + ":")
            items.append((self._new_rule([[key, self.rule(value)]]), must))
        names = "|".join(literal(name) for name, _, _ in members.named)
        others: Alternatives = []
        for texts, value in members.others:
            key = " & ".join([*texts, SAFE, *([f"~/{names}/"] if names else [])])
            others.append([self._terminal(f'"\\"" ({key}) /":{SPACE}/'), self.rule(value)])
        self._has_open_keys |= bool(others)
        rest = self._new_rule(others) if others else None
        return [[self._open, self._chain(items, rest, low, high), self._close]]


def _needed(symbols: Sequence[Symbol]) -> Iterator[int]:
    """Yield the numbers of the rules that symbols use."""
    for symbol in symbols:
        if isinstance(symbol, Repeat):
            yield from _needed(symbol.symbols)
        elif isinstance(symbol, int):
            yield symbol


def _can_end(symbol: Symbol, productive: set[int]) -> bool:
    """Whether some text matches a symbol."""
    if isinstance(symbol, Repeat):
        return symbol.low == 0 or all(_can_end(one, productive) for one in symbol.symbols)
    return isinstance(symbol, str) or symbol in productive


def _is_empty(symbol: Symbol, productive: set[int]) -> bool:
    return isinstance(symbol, Repeat) and (symbol.high == 0 or not all(_can_end(s, productive) for s in symbol.symbols))


def _write(symbol: Symbol) -> str:
    if isinstance(symbol, Repeat):
        bounds = f"{{{symbol.low},{'' if symbol.high is None else symbol.high}}}"
        return f"({' '.join(map(_write, symbol.symbols))}){bounds}"
    return symbol if isinstance(symbol, str) else f"r{symbol}"


def _decimal(number: Fraction) -> str:
    """Return the JSON text of a decimal number."""
    digits = next(n for n in range(1100) if 10**n % number.denominator == 0)
    whole = str(abs(number) * 10**digits).rjust(digits + 1, "0")
    sign = "-" if number < 0 else ""
    return sign + (f"{whole[:-digits]}.{whole[-digits:]}" if digits else whole)


def quote(text: str) -> str:
    """Return the JSON text of a string; half a character is escaped."""
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", quoted)
