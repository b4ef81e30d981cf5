"""Regular expressions for the JSON texts of numbers within exact bounds.

The digits of every number are bounded, so that even an untrained model ends it. A bounded number is written without an
exponent, except where an open side leaves room for very small or very large ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

DIGITS = 17  # after the point, beyond those of a bound; more than a double distinguishes
INT64 = 2**63  # integers without a bound of their own stay within 64 bits
FREE = rf"-?(?:0|[1-9][0-9]{{0,{DIGITS}}})(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"
HUGE = 10**120  # a bound beyond this is written as no bound
MAX_DIGITS = 400  # of a bound: more than any double has
MAX_LITERALS = 2000


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers between two bounds; None: no bound on this side."""

    low: Fraction | None = None
    high: Fraction | None = None
    open_low: bool = False  # the bound itself is not allowed
    open_high: bool = False
    whole: bool = False  # only integers

    def narrow(self, other: Range) -> Range:
        """Return the numbers in both."""
        low, open_low = self.low, self.open_low
        if other.low is not None and (low is None or (other.low, other.open_low) > (low, open_low)):
            low, open_low = other.low, other.open_low
        high, open_high = self.high, self.open_high
        if other.high is not None and (high is None or (-other.high, other.open_high) > (-high, open_high)):
            high, open_high = other.high, other.open_high
        return Range(low, high, open_low, open_high, self.whole or other.whole)

    @property
    def is_empty(self) -> bool:
        """Whether no number is in it."""
        if self.whole:
            low, high = self.least(Fraction(1)), self.greatest(Fraction(1))
            return low is not None and high is not None and low > high
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.open_low or self.open_high))

    def __contains__(self, value: Fraction) -> bool:
        return not self.narrow(Range(value, value)).is_empty

    def least(self, step: Fraction) -> int | None:
        """Return the factor of the smallest multiple of `step` that is in it, None if there is no such bound."""
        if self.low is None:
            return None
        factor = -(-self.low // step)
        return factor + 1 if self.open_low and factor * step == self.low else factor

    def greatest(self, step: Fraction) -> int | None:
        """Return the factor of the largest multiple of `step` that is in it, None if there is no such bound."""
        if self.high is None:
            return None
        factor = self.high // step
        return factor - 1 if self.open_high and factor * step == self.high else factor


def number_regex(numbers: Range) -> str:
    """Return a regular expression for the texts of the numbers in a range that is not empty."""
    if numbers.whole:
        return _integers(numbers)
    low, high = numbers.low, numbers.high
    low = None if low is not None and low <= -HUGE else low
    high = None if high is not None and high >= HUGE else high
    if low is None and high is None:
        return FREE
    parts = []
    if high is None or high > 0 or (high == 0 and not numbers.open_high):
        floor, is_open = (low, numbers.open_low) if low is not None and low >= 0 else (Fraction(0), False)
        parts += _magnitudes(floor, is_open, high, numbers.open_high)
    if low is None or low < 0:
        floor, is_open = (-high, numbers.open_high) if high is not None and high < 0 else (Fraction(0), True)
        ceiling = None if low is None else -low
        parts += [f"-{text}" for text in _magnitudes(floor, is_open, ceiling, numbers.open_low)]
    return _either(parts)


def _integers(numbers: Range) -> str:
    one = Fraction(1)
    low, high = numbers.least(one), numbers.greatest(one)
    low = min(-INT64, 10 * high if high is not None else 0) if low is None else low
    high = max(INT64 - 1, 10 * low) if high is None else high
    parts = [f"-{_between(max(1, -high), -low)}"] if low < 0 else []
    return _either([*parts, _between(max(0, low), high)] if high >= 0 else parts)


def _between(low: int, high: int) -> str:
    """Return a regular expression for the integers from `low` to `high`, neither of them negative."""
    parts, floor, full = [], low, []
    for length in range(len(str(low)), len(str(high)) + 1):
        ceiling = min(high, 10**length - 1)
        if length > 1 and floor == 10 ** (length - 1) and ceiling == 10**length - 1:
            full.append(length - 1)  # all numbers of this length
        else:
            parts.append(_digits(str(floor), str(ceiling)))
        floor = ceiling + 1
    return _either([*parts, *([f"[1-9][0-9]{{{full[0]},{full[-1]}}}"] if full else [])])


def _digits(low: str, high: str) -> str:
    """Return a regular expression for strings of digits from `low` to `high`, which are equally long."""
    if low == high:
        return low
    size = len(low) - 1
    if low[1:] == "0" * size and high[1:] == "9" * size:
        return _class(low[0], high[0]) + (f"[0-9]{{{size}}}" if size else "")
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    parts, first, last = [], int(low[0]), int(high[0])
    if low[1:] != "0" * size:
        parts.append(low[0] + _digits(low[1:], "9" * size))
        first += 1
    if high[1:] != "9" * size:
        parts.append(high[0] + _digits("0" * size, high[1:]))
        last -= 1
    if first <= last:
        parts.append(_class(str(first), str(last)) + f"[0-9]{{{size}}}")
    return _either(parts)


def _magnitudes(floor: Fraction, open_low: bool, high: Fraction | None, open_high: bool) -> list[str]:
    """Return regular expressions for the numbers from `floor` to `high` (no bound) without a sign."""
    parts = []
    if (high is None or high >= 10) and floor == 0:
        parts.append(rf"[1-9](?:\.[0-9]{{1,{DIGITS}}})?[eE]-[0-9]{{1,2}}")
    if high is None:
        limit = max(Fraction(10**18), 10 * floor)
        parts += [rf"[1-9](?:\.[0-9]{{1,{DIGITS}}})?[eE]\+?[2-9][0-9]"] if floor <= 10**20 else []
        high, open_high = Fraction(int(limit)), True
    whole_low, point_low = _decimal(floor)
    whole_high, point_high = _decimal(high)
    if whole_low == whole_high:
        return [*parts, *_fractions(whole_low, (point_low, open_low), (point_high, open_high))]
    parts += _fractions(whole_low, (point_low, open_low), None)
    if whole_high - whole_low > 1:
        parts.append(_between(whole_low + 1, whole_high - 1) + rf"(?:\.[0-9]{{1,{DIGITS}}})?")
    return parts + _fractions(whole_high, None, (point_high, open_high))


def _decimal(value: Fraction) -> tuple[int, str]:
    """Return the whole part of a decimal number that is not negative, and its digits after the point."""
    whole = value.numerator // value.denominator
    rest, digits = value - whole, ""
    while rest and len(digits) < MAX_DIGITS:
        rest *= 10
        digit = rest.numerator // rest.denominator
        digits, rest = digits + str(digit), rest - digit
    return whole, digits


Bound = tuple[str, bool]  # digits after the point without trailing zeros, and whether the bound itself is not allowed


def _fractions(whole: int, low: Bound | None, high: Bound | None) -> list[str]:
    """Return regular expressions for `whole` with the fractions between two bounds."""
    low = low or ("", False)
    tail = _tail(low, high)
    if tail is None:
        return []
    empty = _allows_nothing(low, high)
    some = "|".join(part for part in tail if part)
    if not some:
        return [str(whole)] if empty else []
    return [rf"{whole}(?:\.(?:{some}))" + ("?" if empty else "")]


def _allows_nothing(low: Bound, high: Bound | None) -> bool:
    """Whether no more digits, that is a fraction of 0, are within the bounds."""
    return low == ("", False) and high != ("", True)


def _tail(low: Bound, high: Bound | None) -> list[str] | None:
    """Return regular expressions for the digits of the fractions between two bounds, None if there is no fraction.

    Each matches one digit or more.
    """
    (more, open_low), (less, open_high) = low, high or ("", False)
    if high is not None and not less:
        return None if open_high or low != ("", False) else [f"0{{1,{DIGITS}}}"]
    if high is None and not more:
        free = [f"[0-9]{{1,{DIGITS}}}"]
        return free if not open_low else [f"0{{0,{DIGITS}}}[1-9][0-9]{{0,{DIGITS}}}"]
    first, last = int(more[:1] or "0"), int(less[0]) if high is not None else 9
    if first > last:
        return None
    if high is not None and first == last:
        return _step(first, (more[1:], open_low), (less[1:], open_high))
    parts = _step(first, (more[1:], open_low), None) or []
    end = last if high is not None else 10
    if first + 1 < end:
        parts.append(_class(str(first + 1), str(end - 1)) + f"[0-9]{{0,{DIGITS}}}")
    if high is not None:
        parts += _step(last, ("", False), (less[1:], open_high)) or []
    return parts or None


def _step(digit: int, low: Bound, high: Bound | None) -> list[str] | None:
    """Return `_tail` with a digit before it."""
    tail = _tail(low, high)
    nothing = _allows_nothing(low, high)
    if tail is None:
        return [str(digit)] if nothing else None
    return [f"{digit}(?:{'|'.join(tail)})" + ("?" if nothing else "")]


def _class(first: str, last: str) -> str:
    return first if first == last else f"[{first}-{last}]"


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
