"""What the demo model is trained on: questions and answers made here, in English and French.

The same random generator draws the same chats. Nothing that is held back is ever drawn: the held-out items of
`items.py`, and any text that shares five words in a row with a question of `benchmarks/demo/questions.jsonl`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

from pyllm.model.demo import items as i
from pyllm.model.demo import tables as t
from pyllm.model.demo import wordings as w
from pyllm.model.demo.copied import Copied
from pyllm.model.demo.help_wordings import MORE, SYNONYMS
from pyllm.model.demo.phrasing import Sample, Values, capital, chat, expand, fill, phrase, vary

QUESTIONS: Final = Path(__file__).parents[2] / "benchmarks" / "demo" / "questions.jsonl"
RUN: Final = 5
"""How many words in a row no training text shares with a held-back question."""


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


class Corpus:
    """Draws chats; `pieces` are parts of words for made-up words to spell, best all of the tokenizer's."""

    def __init__(self, pieces: Sequence[str] = ()) -> None:
        self.held_back = HeldBack()
        self.words = {lang: [x for x in i.WORDS[lang] if not i.is_held_out("word", x)] for lang in i.LANGUAGES}
        self.countries = [country for country in i.COUNTRIES if not country.held_out]
        self.pieces = list(pieces)
        self.values = Values(self.words)
        self.copied = copied = Copied(self.words, self.values, self.draw)
        self.known_names = {words_of(n)[-1] for c in i.COUNTRIES for n in (*c.name.values(), *c.capital.values())}
        self.help_entries = [self._help_entry(entry) for entry in t.HELP]
        groups = {lang: [group.split("|") for group in SYNONYMS[lang]] for lang in i.LANGUAGES}
        self.synonyms = {lang: {word: group for group in groups[lang] for word in group} for lang in i.LANGUAGES}
        self.kinds: dict[str, tuple[float, Callable[[Random, str, str], Sample]]] = {
            "greeting": (1.2, self.greeting), "small talk": (0.7, self.small_talk), "identity": (0.7, self.identity),
            "help": (4.0, self.help), "facts": (0.6, self.facts), "capitals": (2.4, self.capitals),
            "sums": (3.2, self.sums), "dates": (2.0, self.dates), "counting": (1.2, self.counting),
            "spelling": (1.8, self.spelling), "letters": (0.3, self.letters), "translation": (0.8, self.translation),
            "json": (2.4, copied.json), "tool call": (2.2, copied.tool_call), "tool answer": (0.4, copied.tool_answer),
            "repeat": (0.5, copied.repeat), "memory": (0.7, copied.memory), "context": (1.2, copied.context),
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
            tools = tuple(self.copied.tool(rng.choice(t.TOOLS)) for _ in range(rng.randint(1, 2)))
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
