"""What the demo model is trained on: questions and answers made here, in English and French.

The same random generator draws the same chats. Nothing that is held back is ever drawn: the held-out items of
`items.py`, and any text that shares five words in a row with a question of `benchmarks/demo/questions.jsonl`.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from pyllm.model.demo import items as i
from pyllm.model.demo import tables as t
from pyllm.model.demo import wordings as w
from pyllm.model.demo.help_wordings import MORE, SYNONYMS

Message = dict[str, Any]
QUESTIONS: Final = Path(__file__).parents[2] / "benchmarks" / "demo" / "questions.jsonl"
RUN: Final = 5
"""How many words in a row no training text shares with a held-back question."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat with the answers that it should get, and the OpenAI tools offered in it."""

    kind: str
    messages: list[Message]
    tools: tuple[Message, ...] = ()


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def runs_of(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each `RUN` words in a row, or all of a shorter text."""
    yield from (tuple(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1)))


def held_out_words() -> set[str]:
    """The words that no training text has: those to spell, and the last ones of countries' and capitals' names."""
    words = {word for lang in i.LANGUAGES for word in i.WORDS[lang] if i.is_held_out("word", word)}
    names = [n for c in i.COUNTRIES if c.held_out for n in (*c.name.values(), *c.capital.values())]
    return words | {words_of(name)[-1] for name in names}


class HeldBack:
    """Knows what training must not contain."""

    def __init__(self) -> None:
        questions = [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
        self._runs = {run for question in questions for run in runs_of(words_of(question))}
        self._words = held_out_words()

    def touches(self, text: str) -> bool:
        """Whether the text has a held-out word, or a run of words of a held-back question."""
        words = words_of(text)
        return not self._words.isdisjoint(words) or not self._runs.isdisjoint(runs_of(words))

    def allows(self, sample: Sample) -> bool:
        """Whether the chat may be trained on."""
        return not any(self.touches(m["content"]) for m in sample.messages if m["content"])


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


class Corpus:
    """Draws chats; `pieces` are parts of words for made-up words to spell, best all of the tokenizer's."""

    def __init__(self, pieces: Sequence[str] = ()) -> None:
        self.held_back = HeldBack()
        self.words = {lang: [x for x in i.WORDS[lang] if not i.is_held_out("word", x)] for lang in i.LANGUAGES}
        self.countries = [country for country in i.COUNTRIES if not country.held_out]
        self.pieces = list(pieces)
        self.values = Values(self.words)
        self.known_names = {words_of(n)[-1] for c in i.COUNTRIES for n in (*c.name.values(), *c.capital.values())}
        self.help_entries = [self._help_entry(entry) for entry in t.HELP]
        groups = {lang: [group.split("|") for group in SYNONYMS[lang]] for lang in i.LANGUAGES}
        self.synonyms = {lang: {word: group for group in groups[lang] for word in group} for lang in i.LANGUAGES}
        self.kinds: dict[str, tuple[float, Callable[[Random, str, str], Sample]]] = {
            "greeting": (1.2, self.greeting), "small talk": (0.7, self.small_talk), "identity": (0.7, self.identity),
            "help": (4.0, self.help), "facts": (0.6, self.facts), "capitals": (2.4, self.capitals),
            "sums": (3.2, self.sums), "dates": (2.0, self.dates), "counting": (1.2, self.counting),
            "spelling": (1.8, self.spelling), "letters": (0.3, self.letters), "translation": (0.8, self.translation),
            "json": (2.4, self.json), "tool call": (2.2, self.tool_call), "tool answer": (0.4, self.tool_answer),
            "repeat": (0.5, self.repeat), "memory": (0.7, self.memory), "context": (1.2, self.context),
            "unknown": (3.0, self.unknown), "first": (0.5, self.first),
        }  # fmt: skip

    @staticmethod
    def _help_entry(entry: t.Known) -> t.Known:
        more = [wordings for begin, wordings in MORE.items() if entry["en answer"][0].startswith(begin)]
        return entry | {
            lang: entry[lang] + [x for wordings in more for x in 2 * wordings[lang]] for lang in i.LANGUAGES
        }

    def draw(self, rng: Random, kind: str | None = None, langs: str = "") -> Sample:
        """One question with its answer; `langs` fixes the languages of question and answer ("en fr")."""
        names = list(self.kinds)
        while True:
            chosen = kind or rng.choices(names, [weight for weight, _ in self.kinds.values()])[0]
            ask = rng.choice(i.LANGUAGES)
            ask, reply = langs.split() if langs else (ask, ask)
            sample = self.kinds[chosen][1](rng, ask, reply)
            if self.held_back.allows(sample):
                return sample

    def conversation(self, rng: Random, turns: int | None = None) -> Sample:
        """A chat for training: one or several questions, often under a system message."""
        turns = turns or rng.choices((1, 2, 3, 4), (80, 10, 6, 4))[0]
        ask = rng.choice(i.LANGUAGES)
        reply, system = ask, None
        style = rng.random()
        if style < 0.2:
            system = rng.choice(t.NEUTRAL_SYSTEM[ask])
        elif style < 0.25:
            reply = rng.choice(i.LANGUAGES)
            system = rng.choice(t.LANGUAGE_SYSTEM[reply])
        samples = [self.draw(rng, langs=f"{ask} {reply}") for _ in range(turns)]
        for at, sample in enumerate(samples[1:], 1):  # only the first may bring a system message or tools
            while sample.tools or sample.messages[0]["role"] == "system":
                sample = samples[at] = self.draw(rng, langs=f"{ask} {reply}")
        first = samples[0]
        tools = first.tools
        if not tools and rng.random() < 0.03:  # tools that the question does not need
            tools = tuple(self.tool(rng.choice(t.TOOLS)) for _ in range(rng.randint(1, 2)))
        messages = [message for sample in samples for message in sample.messages]
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return Sample(first.kind, messages, tools)

    def drill(self, rng: Random) -> str:
        """A page of sums or of spelt words without questions: many facts in few tokens."""
        kind = rng.choices(("sums", "spelling", "counting"), (6, 4, 1))[0]
        lines = []
        for _ in range(rng.randint(3, 8)):
            sample = self.draw(rng, kind, "en en")
            answer = sample.messages[-1]["content"]
            lines.append(f"{answer.replace('-', '').rstrip('.')}: {answer}" if kind == "spelling" else answer)
        return "\n".join(lines)

    # Each of the following draws one question: rng, language of the question, language of the answer.

    def _known(self, rng: Random, ask: str, reply: str, kind: str, table: list[t.Known]) -> Sample:
        entry = rng.choice(table)
        return Sample(kind, chat(vary(rng, ask, rng.choice(entry[ask]).strip()), entry[reply + " answer"][0]))

    def small_talk(self, rng: Random, ask: str, reply: str) -> Sample:
        """Jokes, stories, compliments."""
        return self._known(rng, ask, reply, "small talk", t.SMALL_TALK)

    def identity(self, rng: Random, ask: str, reply: str) -> Sample:
        """What the model is."""
        return self._known(rng, ask, reply, "identity", t.IDENTITY)

    def facts(self, rng: Random, ask: str, reply: str) -> Sample:
        """A little general knowledge."""
        return self._known(rng, ask, reply, "facts", t.FACTS)

    def first(self, rng: Random, ask: str, reply: str) -> Sample:
        """One of the questions that newcomers ask first, as they are."""
        question, kind = rng.choice(t.FIRST[ask])
        if kind == "sum":
            return Sample("first", chat(question, self.sum_answer(7, "+", 5)))
        tables: list[t.Known] = {"help": t.HELP, "identity": t.IDENTITY}[kind] if kind != "greeting" else []
        if kind == "greeting":
            return Sample("first", chat(question, w.GREETINGS[0][1][reply]))
        entry = next(entry for entry in tables if question in entry[ask])
        return Sample("first", chat(question, entry[reply + " answer"][0]))

    def greeting(self, rng: Random, ask: str, reply: str) -> Sample:
        """Hello, thanks, goodbye."""
        wordings, answers = rng.choice(w.GREETINGS)
        text = expand(rng, rng.choice(wordings[ask]))
        text = text if rng.random() < 0.7 else text.lower() if rng.random() < 0.7 else vary(rng, ask, text)
        return Sample("greeting", chat(capital(text) if rng.random() < 0.6 else text, answers[reply]))

    def help(self, rng: Random, ask: str, reply: str) -> Sample:
        """How to use the server."""
        entry = rng.choice(self.help_entries)
        question = self.reworded(rng, ask, expand(rng, rng.choice(entry[ask])))
        if not question.endswith(("?", ".")):
            frame = rng.choice(t.HELP_FRAMES[ask] if rng.random() < 0.6 else t.LOOSE_FRAMES[ask])
            question = capital(frame.replace("{x}", question))
        if rng.random() < 0.12:  # as typed into a search box: some words are missing
            question = " ".join(word for word in question.split(" ") if rng.random() < 0.8 or len(word) > 5)
        return Sample("help", chat(vary(rng, ask, question), entry[reply + " answer"][0]))

    def reworded(self, rng: Random, lang: str, text: str) -> str:
        """The text with some words replaced by others that may stand for them."""
        known = self.synonyms[lang]
        words = text.split(" ")
        return " ".join(rng.choice(known[x]) if x in known and rng.random() < 0.35 else x for x in words)

    def capitals(self, rng: Random, ask: str, reply: str) -> Sample:
        """The capital of a country, the country of a capital, the language of a country."""
        country = rng.choice(self.countries)
        what = rng.choices(("capital", "country", "language"), (5, 3, 4))[0]
        if what == "language" and country.language is None:
            what = "capital"
        table = {"capital": w.CAPITAL, "country": w.COUNTRY, "language": w.LANGUAGE}[what]
        template = phrase(rng, ask, table[ask])
        names = self.country_fields(country.name[ask]) | {"c": country.capital[ask]}
        question = fill(vary(rng, ask, template), names)
        x, city = country.name[reply], country.capital[reply]
        if what == "language":
            assert country.language is not None
            spoken = country.language[reply]
            answer = f"People in {x} speak {spoken}." if reply == "en" else f"{capital(i.into(x))}, on parle {spoken}."
        elif what == "capital":
            answer = f"The capital of {x} is {city}." if reply == "en" else f"La capitale {i.of(x)} est {city}."
        else:
            answer = f"{city} is the capital of {x}." if reply == "en" else f"{city} est la capitale {i.of(x)}."
        return Sample("capitals", chat(question, answer))

    @staticmethod
    def country_fields(name: str) -> dict[str, str]:
        """A country's name in the places of a wording."""
        return {"x": name, "X": capital(name), "of": i.of(name), "in": i.into(name), "In": capital(i.into(name))}

    def sums(self, rng: Random, ask: str, reply: str) -> Sample:
        """Sums and differences of numbers up to 50."""
        op = rng.choice("+-")
        while True:
            top = rng.choice((10, 20, 50, 50, 50, 50))
            a, b = rng.randint(0, top), rng.randint(0, top)
            a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
            if not i.pair_is_held_out(a, b):
                break
        template = phrase(rng, ask, (w.PLUS if op == "+" else w.MINUS)[ask])
        return Sample("sums", chat(fill(vary(rng, ask, template), {"a": a, "b": b}), self.sum_answer(a, op, b)))

    @staticmethod
    def sum_answer(a: int, op: str, b: int) -> str:
        """The sum, after that of the last digits where they carry or borrow: "7 + 5 = 12, 27 + 15 = 42."."""
        low_a, low_b = a % 10, b % 10
        if op == "-":
            borrow = f"1{low_a} - {low_b} = {10 + low_a - low_b}, " if low_a < low_b and a > 19 else ""
            return f"{borrow}{a} - {b} = {a - b}."
        carry = f"{low_a} + {low_b} = {low_a + low_b}, " if low_a + low_b > 9 and max(a, b) > 9 else ""
        return f"{carry}{a} + {b} = {a + b}."

    def dates(self, rng: Random, ask: str, reply: str) -> Sample:
        """The next and the previous day or month, and how long a month is."""
        what = rng.choices(("next", "previous", "length"), (5, 5, 3))[0]
        month = what == "length" or rng.random() < 0.55
        names = i.MONTHS if month else i.DAYS
        at = rng.randrange(len(names["en"]))
        template = phrase(rng, ask, {"next": w.NEXT, "previous": w.PREVIOUS, "length": w.LENGTH}[what][ask])
        kind = {"en": ("day", "month"), "fr": ("jour", "mois")}[ask][month]
        fields = {"x": names[ask][at], "X": capital(names[ask][at]), "kind": kind}
        question = fill(vary(rng, ask, template.replace("{kind}", kind)), fields)
        x = names[reply][at]
        if what == "length":
            days = i.MONTH_LENGTHS[at]
            answer = f"{x} has {days} days." if reply == "en" else f"{capital(x)} a {days} jours."
            answer = t.FEBRUARY[reply] if at == 1 else answer
        else:
            y = names[reply][(at + (1 if what == "next" else -1)) % len(names[reply])]
            place = {"en": ("after", "before"), "fr": ("après", "avant")}[reply][what == "previous"]
            answer = f"{y} is {place} {x}." if reply == "en" else f"{capital(y)} est {place} {x}."
        return Sample("dates", chat(question, answer))

    def word(self, rng: Random, lang: str) -> str:
        """A word to spell: a common one, pieces put together, or random letters."""
        how = rng.random()
        if how < 0.45 or not self.pieces:
            return rng.choice(self.words[lang])
        if how < 0.9:
            return "".join(rng.choice(self.pieces) for _ in range(rng.choice((1, 2, 2, 3))))[:12]
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7)))

    def spelling(self, rng: Random, ask: str, reply: str) -> Sample:
        """A word letter by letter."""
        word = self.word(rng, ask)
        return Sample("spelling", chat(self._about_word(rng, ask, w.SPELL, word), "-".join(word) + "."))

    def letters(self, rng: Random, ask: str, reply: str) -> Sample:
        """How many letters a word has."""
        word = self.word(rng, ask)
        answer = f"{'-'.join(word)}: {len(word)} {'letters' if reply == 'en' else 'lettres'}."
        return Sample("letters", chat(self._about_word(rng, ask, w.LETTERS, word), answer))

    @staticmethod
    def _about_word(rng: Random, lang: str, wordings: w.Wordings, word: str) -> str:
        template = vary(rng, lang, phrase(rng, lang, wordings[lang]))
        if template.startswith("{q}") and rng.random() < 0.7:
            word = capital(word)
        quoted = rng.choices(("{}", '"{}"', "'{}'", "« {} »" if lang == "fr" else "“{}”"), (6, 2, 1, 1))[0]
        return fill(template, {"q": quoted.format(word)})

    def counting(self, rng: Random, ask: str, reply: str) -> Sample:
        """From one number to another, up or down."""
        up = rng.random() < 0.65
        a = rng.choice((1, rng.randint(0, 50), rng.randint(0, 50), rng.randint(0, 88)))
        b = a + rng.randint(2, 12)
        numbers = list(range(a, b + 1)) if up else list(range(b, a - 1, -1))
        template = phrase(rng, ask, (w.UP if up else w.DOWN)[ask])
        question = fill(vary(rng, ask, template), {"a": numbers[0], "b": numbers[-1]})
        return Sample("counting", chat(question, ", ".join(map(str, numbers)) + "."))

    def translation(self, rng: Random, ask: str, reply: str) -> Sample:
        """A common word from English to French or back."""
        pair = rng.choice(t.WORDS)
        to = rng.choice(("en", "fr"))
        word, other = pair if to == "fr" else pair[::-1]
        template = rng.choice(t.TRANSLATE[f"{ask}, {to}"])
        answer = t.TRANSLATION[f"{reply}, {to}"].format(x=word, y=other)
        return Sample("translation", chat(fill(vary(rng, ask, template), {"x": word}), answer))

    def json(self, rng: Random, ask: str, reply: str) -> Sample:
        """A JSON object filled from a sentence, or from a list of fields."""
        if rng.random() < 0.55:
            sentence, names = rng.choice(t.RECORDS[ask])
            sentence = expand(rng, sentence)
            values = {kind: self.values.draw(rng, kind.rstrip("2"), ask) for kind in names}
            text = sentence.format(**values)
            filled = {names[kind]: values[kind] for kind in names}
        else:
            text, filled = self.listed(rng, ask)
        asked = rng.sample(list(filled), rng.randint(max(1, len(filled) - 2), len(filled)))
        joined = rng.choice((", ", ", ", " ", "; ", "/"))
        listed = joined.join(asked)
        if len(asked) > 1 and rng.random() < 0.4:
            listed = f"{', '.join(asked[:-1])} {'and' if ask == 'en' else 'et'} {asked[-1]}"
        answer = json.dumps({name: filled[name] for name in asked}, ensure_ascii=False)
        if rng.random() < 0.15:
            system = rng.choice(t.JSON_SYSTEM[ask]).format(fields=listed)
            return Sample("json", [{"role": "system", "content": system}, *chat(text, answer)])
        question = vary(rng, ask, expand(rng, rng.choice(t.JSON_QUESTIONS[ask])))
        return Sample("json", chat(fill(question, {"fields": listed, "text": text}), answer))

    def listed(self, rng: Random, lang: str) -> tuple[str, dict[str, Any]]:
        """A text that names fields with their values in one of many ways, and the values by field."""
        count = rng.randint(2, 4)
        names = rng.sample(t.FIELDS[lang], count)
        if rng.random() < 0.15:
            names = [self.values.ident(rng) for _ in names]
        values = {name: self.values.draw(rng, "any", lang) for name in names}
        form = rng.choice(t.FIELD_FORMS[lang])
        parts = [form.format(name=name, value=value) for name, value in values.items()]
        text = rng.choice((", ", ", ", "; ", ". ", " and " if lang == "en" else " et ")).join(parts)
        return capital(text) if text.startswith((names[0], "the", "le ")) and names[0] in t.FIELDS[
            lang
        ] else text, values

    def tool(self, spec: t.Tool) -> Message:
        """A tool as an OpenAI request describes it."""
        types = {"int": "integer", "count": "integer", "minutes": "integer", "amount": "integer"}
        properties = {p: {"type": types.get(kind, "string")} for p, kind in spec.params.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {
            "name": spec.name, "description": spec.description, "parameters": parameters,
        }}  # fmt: skip

    def tool_call(self, rng: Random, ask: str, reply: str) -> Sample:
        """One of the offered tools is called with what the question names."""
        spec = self.made_up_tool(rng) if rng.random() < 0.45 else rng.choice(t.TOOLS)
        arguments = {p: self.values.draw(rng, kind, ask) for p, kind in spec.params.items()}
        question = fill(vary(rng, ask, expand(rng, rng.choice(spec.ask[ask]))), arguments)
        offered = {spec.name: spec}
        for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
            other = self.made_up_tool(rng) if rng.random() < 0.4 else rng.choice(t.TOOLS)
            offered.setdefault(other.name, other)
        tools = [self.tool(s) for s in offered.values()]
        rng.shuffle(tools)
        return Sample("tool call", called(question, spec.name, arguments), tuple(tools))

    def made_up_tool(self, rng: Random) -> t.Tool:
        """A tool with a name that was never seen, so that names are read and not remembered."""
        verb, noun = rng.choice(t.TOOL_VERBS), rng.choice(t.TOOL_NOUNS + self.words["en"][:: rng.randint(3, 9)])
        name = f"{verb}_{noun}"
        params: dict[str, str] = {}
        for _ in range(rng.choice((1, 1, 2))):
            kind = rng.choice(("word", "name", "city", "count", "code", "ident", "mail"))
            params[rng.choice(t.TOOL_PARAMS[kind])] = kind
        named = {}
        for lang, joints in (("en", (" and ", ", ", " with ")), ("fr", (" et ", ", ", " avec "))):
            forms = [rng.choice(t.PARAM_FORMS[lang]).format(name=p, value="{" + p + "}") for p in params]
            named[lang] = rng.choice(joints).join(forms)
        ask = {lang: [frame.format(name=name, verb=verb, noun=noun, values=named[lang]) for frame in frames]
               for lang, frames in t.TOOL_FRAMES.items()}  # fmt: skip
        return t.Tool(name, params, f"{capital(verb)} a {noun}", ask)

    def tool_answer(self, rng: Random, ask: str, reply: str) -> Sample:
        """The tool's result is put into a sentence."""
        spec = rng.choice([s for s in t.TOOLS if s.result])
        arguments = {p: self.values.draw(rng, kind, ask) for p, kind in spec.params.items()}
        results = {p: self.values.draw(rng, kind, ask) for p, kind in spec.results.items()}
        if spec.name == "add":
            results = {"sum": arguments["a"] + arguments["b"]}
        question = fill(vary(rng, ask, expand(rng, rng.choice(spec.ask[ask]))), arguments)
        answer = spec.answer[reply].format(**arguments, **{k: in_language(v, reply) for k, v in results.items()})
        result = {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(results, ensure_ascii=False)}
        messages = [*called(question, spec.name, arguments), result, {"role": "assistant", "content": answer}]
        return Sample("tool answer", messages, (self.tool(spec),))

    def repeat(self, rng: Random, ask: str, reply: str) -> Sample:
        """Says what it is asked to say."""
        text = " ".join(rng.choice(self.words[ask]) for _ in range(rng.randint(1, 5)))
        text = self.values.code(rng) if rng.random() < 0.3 else text
        return Sample("repeat", chat(fill(vary(rng, ask, rng.choice(t.REPEAT[ask])), {"x": text}), text))

    def memory(self, rng: Random, ask: str, reply: str) -> Sample:
        """Remembers the user's name or city, or its own name from the system message."""
        entry = rng.choice(t.MEMORY)
        x = self.values.draw(rng, entry["kind"][0], ask)
        tail = chat(vary(rng, ask, rng.choice(entry["recall " + ask])), entry["recalled " + reply][0].format(x=x))
        if entry.get("system " + ask):
            head = [{"role": "system", "content": rng.choice(entry["system " + ask]).format(x=x)}]
            return Sample("memory", head + tail)
        said = fill(vary(rng, ask, rng.choice(entry["tell " + ask])), {"x": x})
        reply_to_it = chat(said, entry["told " + reply][0].format(x=x))
        return Sample("memory", reply_to_it + self._between(rng, ask, reply) + tail)

    def _between(self, rng: Random, ask: str, reply: str) -> list[Message]:
        """Questions about something else, often none."""
        between: list[Message] = []
        while rng.random() < 0.35:
            between += self.draw(rng, rng.choice(("sums", "help", "dates", "capitals")), f"{ask} {reply}").messages
        return between

    def context(self, rng: Random, ask: str, reply: str) -> Sample:
        """What the user said before, in the same message or some turns earlier."""
        tell, question, x = _split(rng.choice(w.CONTEXT[ask]))
        kind = rng.choice(("name", "code", "word", "city"))
        fields = {"r": rng.choice(w.RELATIVES[ask]), "o": rng.choice(w.OBJECTS[ask]), "b": rng.choice(w.PLACES[ask]),
                  "f": rng.choice(("food", "colour", "book", "game", "song")), "d": rng.choice(i.DAYS[ask]),
                  "x": self.values.draw(rng, kind, ask)}  # fmt: skip
        said, asked = (fill(expand(rng, part), fields) for part in (tell, question))
        answer = capital(fill(x, fields)) + "."
        if rng.random() < 0.65:
            joint = rng.choice((" ", " ", " So, ", " Then: ") if ask == "en" else (" ", " ", " Alors, ", " Donc : "))
            return Sample("context", chat(said + joint + asked, answer))
        noted = "I will remember that." if reply == "en" else "Je m'en souviendrai."
        return Sample("context", chat(said, noted) + self._between(rng, ask, reply) + chat(asked, answer))

    def unknown(self, rng: Random, ask: str, reply: str) -> Sample:
        """Says plainly that it does not know."""
        while True:
            country, place = rng.choice(self.countries), self.values.name(rng)
            if rng.random() < 0.6:
                place = rng.choice(t.OTHER_PLACES[ask])
            values = {
                "k": country.name[ask], "ofk": i.of(country.name[ask]), "ink": i.into(country.name[ask]), "q": place,
                "p": self.values.draw(rng, "name"), "r": rng.choice(w.RELATIVES[ask]), "year": rng.randint(1400, 2060),
                "c": rng.choice(t.VALUES["city"]), "c2": rng.choice(t.VALUES["city"]), "w": rng.choice(self.words[ask]),
                "n": rng.randint(101, 9999), "m": rng.randint(101, 9999),
                "t": expand(rng, rng.choice(t.UNKNOWN_TOPICS[ask])),
                "g": " ".join(self.values.ident(rng) for _ in range(rng.randint(1, 4))),
            }  # fmt: skip
            text = fill(vary(rng, ask, phrase(rng, ask, w.UNKNOWN[ask])), values)
            if self.known_names.isdisjoint(words_of(place)):
                return Sample("unknown", chat(text, w.DECLINE[reply]))


def _split(wording: str) -> Iterator[str]:
    """The three parts of a `CONTEXT` wording: bars within brackets do not part them."""
    part, depth = "", 0
    for sign in wording:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            yield part
            part = ""
        else:
            part += sign
    yield part


def in_language(item: Any, lang: str) -> Any:
    """A tool's English word in the answer's language."""
    return t.RESULT_WORDS.get(item, item) if lang == "fr" and isinstance(item, str) else item
