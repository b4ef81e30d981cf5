"""How the demo model's questions are written: wordings as people type them, and made-up values to copy from them."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from random import Random
from typing import Any

from pyllm.model.demo import tables as t
from pyllm.model.demo import wordings as w

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat with the answers that it should get, and the OpenAI tools offered in it."""

    kind: str
    messages: list[Message]
    tools: tuple[Message, ...] = ()


_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(rng: Random, wording: str) -> str:
    """Choose among what is in brackets, the inner ones first."""
    while (match := _CHOICE.search(wording)) is not None:
        wording = wording[: match.start()] + rng.choice(match[1].split("|")) + wording[match.end() :]
    return re.sub(r" +([.,])", r"\1", re.sub(r"  +", " ", wording)).strip(" ,")


def fill(text: str, values: dict[str, Any]) -> str:
    """Put the values into the `{fields}` of a text; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), text)


def capital(text: str) -> str:
    """The text with a capital letter first."""
    return text[:1].upper() + text[1:]


def phrase(rng: Random, lang: str, wordings: list[str]) -> str:
    """One wording; a noun phrase (`np:`) in one of the frames for all of them."""
    wording = rng.choice(wordings)
    if wording.startswith("np:"):
        noun = expand(rng, wording.removeprefix("np:"))
        return fill(expand(rng, rng.choice(w.FRAMES[lang])), {"np": noun, "Np": capital(noun)})
    return expand(rng, wording)


def vary(rng: Random, lang: str, template: str) -> str:
    """A template as people type it: more words around it, small letters, errors; `{fields}` stay whole."""
    if rng.random() < 0.3:
        opener = expand(rng, rng.choice(w.OPENERS[lang]))
        small = template[:1].lower() + template[1:]
        template = f"{opener} {template if template[:2].isupper() or rng.random() < 0.3 else small}"
    if rng.random() < 0.2:
        closer = expand(rng, rng.choice(w.CLOSERS[lang]))
        stop = "" if template.endswith(("?", "!")) else rng.choice(("", "."))
        template = re.sub(r" +([,.])", r"\1", f"{template.rstrip(' .')}{stop} {closer}")
    if rng.random() < 0.5:
        return template
    parts = re.split(r"(\{\w+\})", template)
    how = rng.random()
    for at in range(0, len(parts), 2):
        if how < 0.3:
            parts[at] = parts[at].lower()
        elif how < 0.33:
            parts[at] = parts[at].upper()
        elif how < 0.5 and len(parts[at]) > 6:  # a typing error
            place = rng.randrange(1, len(parts[at]) - 1)
            swapped = parts[at][place + 1] + parts[at][place]
            parts[at] = parts[at][:place] + rng.choice(("", parts[at][place] * 2, swapped)) + parts[at][place + 1 :]
        elif how < 0.6:
            parts[at] = "".join(c for c in unicodedata.normalize("NFD", parts[at]) if not unicodedata.combining(c))
    if how > 0.5:
        parts[-1] = parts[-1].replace(" ?", "?").replace(" !", "!")
    if rng.random() < 0.5:
        parts[-1] = re.sub(r" ?[.?!]$", "", parts[-1]) + rng.choice(("", "", "?", ".", "!"))
    text = "".join(parts)
    return text.replace("'", "’") if rng.random() < 0.1 else text


def chat(question: str, answer: str) -> list[Message]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def called(question: str, name: str, arguments: dict[str, Any]) -> list[Message]:
    """A question and the tool call that it leads to."""
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": question}, {"role": "assistant", "content": None, "tool_calls": [call]}]


class Values:
    """Draws what is copied from a question: names, codes, addresses, numbers; most were never seen before."""

    def __init__(self, words: dict[str, list[str]]) -> None:
        self.words = words

    def draw(self, rng: Random, kind: str, lang: str = "en") -> Any:
        """A value of a kind: a number for "int", "age", "price" …, else text."""
        if kind == "any":
            kind = rng.choice(("name", "city", "code", "ident", "mail", "word", "int", "year", "amount"))
        if kind in t.NUMBERS:
            return rng.randint(*t.NUMBERS[kind])
        if kind in ("name", "city") and rng.random() < 0.6:
            return self.name(rng)
        made = {"code": self.code, "ident": self.ident, "mail": self.mail, "name": self.name}.get(kind)
        if made and (kind != "name" or rng.random() < 0.5):
            return made(rng)
        if kind == "year":
            return rng.randint(1900, 2040)
        if kind == "word":
            return rng.choice(self.words[lang])
        return rng.choice(t.VALUES[kind])

    def name(self, rng: Random) -> str:
        """A made-up name of two to four syllables."""
        if rng.random() < 0.5:
            return "".join(rng.choice(t.SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
        pairs = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(2, 4))]
        return "".join([*pairs, rng.choice(("", "", *"lnrstk"))]).capitalize()

    def code(self, rng: Random) -> str:
        """Random letters and digits, sometimes with a dash."""
        upper, digits = string.ascii_uppercase, string.digits
        signs = rng.choice(
            (upper + digits, upper + digits, string.ascii_letters + digits, upper, upper.lower() + digits)
        )
        text = "".join(rng.choice(signs) for _ in range(rng.randint(4, 9)))
        text = text if not text.isdigit() else "K" + text
        return f"{text[:3]}-{text[3:]}" if rng.random() < 0.2 else text

    def ident(self, rng: Random) -> str:
        """Random small letters, or two words joined."""
        if rng.random() < 0.3:
            return "_".join(rng.choice(self.words["en"]) for _ in range(2))
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 8)))

    def mail(self, rng: Random) -> str:
        """An address with random parts."""
        return f"{self.ident(rng)}@{self.ident(rng)}.{rng.choice(('org', 'com', 'fr', 'net', 'io'))}"
