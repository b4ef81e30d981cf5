"""Encodes long texts in pieces that together have the ids of the whole, so that memory does not grow with the text.

A text is cut where the pieces have the same words as the whole, apart from one word that the cut may divide. That is
enough for byte pair encodings: a sequence of tokens is the encoding of a word if and only if every two neighbours are
the encoding of their joined text, since the first merge across a border would also happen in those two alone. So two
encodings that share a token can be joined at it, whatever comes before and after.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from threading import Lock
from typing import Any, Protocol

import tokenizers

WINDOW = 8192  # characters encoded at a time
MAX_WINDOW = 2**18  # characters encoded together if a text has no safe place; they take up to 100 MiB
TRIES = 64  # places at which a window may be cut, before it grows

# Expressions that split a text in linear time, and never put a character and a space after it into one piece.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = frozenset(
    [GPT2, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
    + [  # GPT-4 and Llama 3, Qwen 2
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{count}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
        for count in ("{1,3}", "")
    ]
    + [  # GPT-4o, Mistral
        _CASED % (end, end, count) + rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
        for end in ("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "")
        for count in ("{1,3}", "")
    ]
)
RUNS = frozenset(
    kind + count
    for kind in (r"\d", r"\p{N}", "[0-9]", r"\p{Nd}", " ", r"\s", r"\n", r"[\r\n]")
    for count in ("", "+", "{1,3}")
)
"""Expressions for characters of one kind, which a space after another character never divides."""
_CONTRACTION = re.compile("'(?:[stmd]|re|ve|ll)")
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""Unicode's white space, which an expression's `\\s` matches."""

_FORMS = frozenset({"NFC", "NFD"})
_CHARACTERWISE = _FORMS | {"NFKC", "NFKD", "Lowercase", "StripAccents"}
_SPLITTERS = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})


def parts_of(component: Any) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, those of a sequence one by one; [] for None."""
    if component is None:
        return []
    found, pending = [], [json.loads(component.__getstate__())]
    while pending:
        state = pending.pop(0)
        inner = state.get("normalizers", state.get("pretokenizers"))
        pending = [*inner, *pending] if isinstance(inner, list) else pending
        found += [] if isinstance(inner, list) else [state]
    return found


def unknown_expressions(library: tokenizers.Tokenizer) -> list[str]:
    """List the regular expressions of this tokenizer that are not known to take linear time."""
    patterns = [part.get("pattern") for part in parts_of(library.normalizer) + parts_of(library.pre_tokenizer)]
    found = [pattern["Regex"] for pattern in patterns if isinstance(pattern, dict) and "Regex" in pattern]
    return [expression for expression in dict.fromkeys(found) if expression not in WORDS | RUNS]


class IndivisibleTextError(ValueError):
    """A text that this tokenizer cannot encode, or only as a whole that is too long; the message is one sentence."""


class Spellings(Protocol):
    """Added tokens, and where a text spells them."""

    longest: int  # characters of the longest; 0 if there are none

    def find(self, text: str) -> Iterator[tuple[int, int, tokenizers.AddedToken]]: ...

    def spelled(self, text: str, first: int, last: int) -> Iterator[tuple[int, int, tokenizers.AddedToken]]: ...


class LongTextEncoder:
    """Encodes texts with one library object, whose special tokens must count as text."""

    def __init__(
        self, library: tokenizers.Tokenizer, longest_token: int, added: Spellings, swallowing: Spellings
    ) -> None:
        """`longest_token` is in bytes; `swallowing` are the tokens whose white space the library drops."""
        self._library = library
        normalizers = [part["type"] for part in parts_of(library.normalizer)]
        splits = parts_of(library.pre_tokenizer)
        self._normalises = bool(normalizers)
        self._cuts_words = _FORMS.issuperset(normalizers) and _has_plain_words(splits) and _merges_plainly(library)
        self._cuts_spaces = self._cuts_words or (_CHARACTERWISE.issuperset(normalizers) and _splits_at_spaces(splits))
        self._added = added
        self._swallowing = swallowing
        self._one_large = Lock()
        # At this distance from a window's end, no token depends on the text after the window.
        self._margin = max(64, longest_token, self._added.longest) + 8
        self._window = max(WINDOW, 8 * self._margin)

    def encode(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text piece by piece; raise `IndivisibleTextError`. Other threads can run meanwhile."""
        if not self._cuts_spaces:
            yield self._encode_together(text)
            return
        start, size = 0, self._window
        ids = self._encode(text[:size])
        swallowed, spans = self._swallowing.find(text), deque([(0, 0)])
        while start + size < len(text):
            while spans[-1][0] < start + size:
                begin, stop, _ = next(swallowed, (len(text), len(text), None))
                spans.append((begin, stop))
            while spans[0][1] <= start and len(spans) > 1:
                spans.popleft()
            joint = self._join(text, start, start + size, ids, spans)
            if joint is None:  # as in a text of combining marks only
                size *= 2
                if size > MAX_WINDOW:
                    reason = "characters in a row that this model's tokenizer can only read together"
                    raise IndivisibleTextError(f"The text has more than {MAX_WINDOW // 2} {reason}.")
                with self._one_large:
                    ids = self._encode(text[start : start + size])
                continue
            done, start, following = joint
            yield ids[:done]
            ids, size = following, self._window
        yield ids

    def _encode_together(self, text: str) -> list[int]:
        """Encode a text for which no safe places are known."""
        if len(text) > MAX_WINDOW:
            reason = f"this model's tokenizer can read at most {MAX_WINDOW} characters at a time"
            raise IndivisibleTextError(f"The text has {len(text)} characters, but {reason}: shorten it.")
        with self._one_large if len(text) > self._window else nullcontext():
            return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _join(
        self, text: str, start: int, end: int, ids: list[int], whole: Iterable[tuple[int, int]]
    ) -> tuple[int, int, list[int]] | None:
        """Cut the window from `start` to `end`, whose ids are given, near its end and outside the spans of `whole`.

        Return how many ids come before the cut, where it is, and the ids of the window that begins there.
        """
        for cut in self._places(text, end - (end - start) // 2, end - self._margin):
            if any(begin < cut < stop for begin, stop in whole):
                continue
            tail = self._encode(text[cut:end])
            done = len(ids) - len(tail)
            if done > 0 and ids[done:] == tail:
                following = self._encode(text[cut : cut + self._window])
                if following[:1] == tail[:1]:
                    return done, cut, following
        return None

    def _places(self, text: str, first: int, last: int) -> Iterator[int]:
        """Yield safe places for a cut: the last ones before spaces, then the last ones anywhere."""
        spaces = (match.start() for match in re.finditer(r"(?<!\s) ", text[first:last]))
        before_spaces = [first + place for place in spaces if place][: -TRIES - 1 : -1]
        nearby = range(last, max(first, last - TRIES), -1) if self._cuts_words else range(0)
        for place in chain(before_spaces, nearby):
            if self._is_safe(text, place):
                yield place

    def _is_safe(self, text: str, cut: int) -> bool:
        """Return whether the parts of a text have the words of the whole, apart from one that `cut` may divide."""
        before, after = text[cut - 1], text[cut]
        if before in _SPACE or after != " ":
            if before in _SPACE and after not in _SPACE:
                return False
            if self._normalises and not _starts_alone(after):
                return False
            if after == "'" and before.isascii() and before.isalnum():  # a word begins here, so a contraction can too
                return self._keeps_added(text, cut)
            nearby = text[max(0, cut - 2) : cut + 3]
            if any(match.start() <= min(cut, 2) < match.end() for match in _CONTRACTION.finditer(nearby)):
                return False
        return self._keeps_added(text, cut)

    def _keeps_added(self, text: str, cut: int) -> bool:
        """Return whether the same added tokens are recognised in both parts as in the whole."""
        before, after = text[cut - 1], text[cut]
        for begin, end, token in self._added.spelled(text, cut - self._added.longest, cut + 1):
            if begin < cut < end:
                return False
            if end == cut and ((token.single_word and _may_be_word(after)) or (token.rstrip and after.isspace())):
                return False
            if begin == cut and ((token.single_word and _may_be_word(before)) or (token.lstrip and before.isspace())):
                return False
        return True


def _starts_alone(character: str) -> bool:
    """Return whether no normal form ever joins a character with those before it, or moves it before them."""
    # Marks do, and letters of the Hangul and Kirat Rai scripts; characters unknown to this version of Unicode may.
    if "\u1100" <= character <= "\u11ff" or "\U00016d40" <= character <= "\U00016d7f":
        return False
    category = unicodedata.category(character)
    return category[0] != "M" and category not in ("Cn", "Cs")


def _may_be_word(character: str) -> bool:
    return not character.isascii() or character.isalnum() or character == "_"


def _has_plain_words(splits: list[dict[str, Any]]) -> bool:
    """Return whether these are GPT-2's words, or the whole text, perhaps with digits or punctuation apart."""
    *others, last = splits or [{}]
    return (
        last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and all(
            part["type"] == "Digits"
            or (part["type"] == "Punctuation" and part["behavior"] in ("Isolated", "Contiguous"))
            for part in others
        )
    )


def _merges_plainly(library: tokenizers.Tokenizer) -> bool:
    """Return whether the encoding of a word depends on nothing but its bytes."""
    model = library.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    odd = model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return not odd and all(model.token_to_id(character) is not None for character in alphabet)


def _splits_at_spaces(splits: list[dict[str, Any]]) -> bool:
    """Return whether a word never has a character with a space after it, however the text before it is split."""
    certain = False
    for number, part in enumerate(splits):
        kind, last = part["type"], number == len(splits) - 1
        if kind == "Split":
            expression = part["pattern"].get("Regex")
            if part["behavior"] == "Isolated" or (part["behavior"] == "Removed" and part["invert"]):
                certain |= expression in WORDS
            if expression not in WORDS | RUNS or part["behavior"] not in ("Isolated", "Removed"):
                return False
        elif kind == "ByteLevel" and last:
            certain |= part["use_regex"]
        elif kind in _SPLITTERS:
            certain = True
        elif kind != "Digits" and (kind != "Punctuation" or part["behavior"] not in ("Isolated", "Contiguous")):
            return False
    return certain
