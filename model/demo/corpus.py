"""What the demo model is trained on: public-domain prose, and question-answer pairs made here.

Every pair has a key (its operands, words or wording). One key in ten, chosen by its hash, is held back
for the evaluation and is never trained on. The same random generator gives the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pyllm.model.demo import tables as t

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat with the answer that it should get.

    Attributes:
        kind: which skill it is about.
        key: what makes it this question and not another; decides whether it is held back.
        messages: OpenAI messages; those of the assistant are what the model learns to write.
        tools: OpenAI tools offered to the model.
    """

    kind: str
    key: str
    messages: list[Message]
    tools: tuple[Message, ...] = ()

    @property
    def held_back(self) -> bool:
        """Kept for the evaluation: about one key in ten, never one of the README's questions."""
        if self.key in t.ALWAYS_TRAINED:
            return False
        return hashlib.sha256(f"{self.kind}:{self.key}".encode()).digest()[0] < 26


def vary(rng: Random, template: str) -> str:
    """A template as hasty people type it; `{fields}` stay whole."""
    if rng.random() < 0.45:
        return template
    parts = re.split(r"(\{\w+\})", template)
    how = rng.random()
    for i in range(0, len(parts), 2):
        if how < 0.25:
            parts[i] = parts[i].lower()
        elif how < 0.3:
            parts[i] = parts[i].upper()
        elif how < 0.45 and len(parts[i]) > 6:  # a typing error
            at = rng.randrange(1, len(parts[i]) - 1)
            parts[i] = parts[i][:at] + rng.choice(("", parts[i][at] * 2)) + parts[i][at + 1 :]
        elif how < 0.55:
            parts[i] = "".join(c for c in unicodedata.normalize("NFD", parts[i]) if not unicodedata.combining(c))
    if how > 0.5:
        parts[-1] = parts[-1].replace(" ?", "?").replace(" !", "!")
    if rng.random() < 0.35:
        parts[-1] = re.sub(r" ?[.?!]$", "", parts[-1])
    text = "".join(parts)
    return text.replace("'", "’") if rng.random() < 0.15 else text


class Pairs:
    """Draws question-answer pairs; `words` are those to spell."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.kinds: dict[str, tuple[float, Callable[[Random, str, str], Sample]]] = {
            "greeting": (0.8, lambda r, a, b: self.known(r, a, b, "greeting", t.GREETINGS)),
            "small talk": (1.0, lambda r, a, b: self.known(r, a, b, "small talk", t.SMALL_TALK)),
            "identity": (1.0, lambda r, a, b: self.known(r, a, b, "identity", t.IDENTITY)),
            "server help": (3.2, self.help),
            "facts": (1.6, self.facts),
            "arithmetic": (3.0, self.arithmetic),
            "numbers": (0.8, self.numbers),
            "dates": (1.0, self.dates),
            "spelling": (1.3, self.spelling),
            "counting": (0.8, self.counting),
            "letters": (0.8, self.letters),
            "translation": (2.2, self.translation),
            "json": (1.8, self.json),
            "tool call": (2.0, self.tool_call),
            "tool answer": (1.2, self.tool_answer),
            "repeat": (0.6, self.repeat),
            "memory": (1.2, self.memory),
            "not known": (1.4, self.not_known),
        }

    def draw(self, rng: Random, held_back: bool, kind: str | None = None, langs: str = "") -> Sample:
        """One question with its answer; `langs` fixes the languages of question and answer ("en fr")."""
        names = list(self.kinds)
        while True:
            chosen = kind or rng.choices(names, [weight for weight, _ in self.kinds.values()])[0]
            ask = rng.choice(("en", "en", "fr"))
            ask, reply = langs.split() if langs else (ask, ask)
            sample = self.kinds[chosen][1](rng, ask, reply)
            if sample.held_back == held_back:
                return sample

    def first_question(self, rng: Random) -> Sample:
        """One of the questions that newcomers ask first, without a system message that could change the answer."""
        kind = rng.choice(("greeting", "identity", "server help", "arithmetic"))
        while True:
            sample = self.draw(rng, False, kind)
            if sample.key in t.ALWAYS_TRAINED or kind == "arithmetic":
                return sample

    def conversation(self, rng: Random, turns: int | None = None) -> Sample:
        """A chat for training: one or several questions, often under a system message."""
        turns = turns or rng.choices((1, 2, 3, 4, 6), (60, 15, 12, 8, 5))[0]
        ask = rng.choice(("en", "en", "fr"))
        reply, system = ask, None
        style = rng.random()
        if style < 0.25:
            system = rng.choice(t.NEUTRAL_SYSTEM[ask])
        elif style < 0.37:
            reply = rng.choice(("en", "fr"))
            system = rng.choice(t.LANGUAGE_SYSTEM[reply])
            if rng.random() < 0.3:
                system = f"{rng.choice(t.NEUTRAL_SYSTEM[reply])} {system}"
        samples = [self.draw(rng, False, langs=f"{ask} {reply}") for _ in range(turns)]
        for i, sample in enumerate(samples[1:], 1):  # only the first may bring a system message or tools
            while sample.tools or sample.messages[0]["role"] == "system":
                sample = samples[i] = self.draw(rng, False, langs=f"{ask} {reply}")
        first = samples[0]
        tools = first.tools
        if not tools and rng.random() < 0.06:  # tools that the question does not need
            tools = tuple(self.tool(rng.choice(t.TOOLS)) for _ in range(rng.randint(1, 2)))
        messages = [message for sample in samples for message in sample.messages]
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return Sample(first.kind, first.key, messages, tools)

    def drill(self, rng: Random) -> str:
        """A page of sums or of spelt words without questions: many facts in few tokens."""
        lines = []
        make = rng.choices((self.arithmetic, self.spelling, self.counting), (5, 4, 1))[0]
        for _ in range(rng.randint(4, 12)):
            sample = self.draw(rng, False, make.__name__, "en en")
            answer = sample.messages[-1]["content"]
            lines.append(f"Spell {sample.key}: {answer}" if make == self.spelling else answer)
        return "\n".join(lines)

    # Each of the following draws one question: rng, language of the question, language of the answer.

    def known(self, rng: Random, ask: str, reply: str, kind: str, table: list[t.Known]) -> Sample:
        """A question from a table of wordings and answers."""
        entry = rng.choice(table)
        question = rng.choice(entry[ask]).strip()
        return Sample(kind, question, chat(vary(rng, question), entry[reply + " answer"][0]))

    def help(self, rng: Random, ask: str, reply: str) -> Sample:
        """How to use the server."""
        entry = rng.choice(t.HELP)
        question = rng.choice(entry[ask])
        if not question.endswith(("?", ".")):  # a verb phrase to be put in a frame
            frame = rng.choice(t.HELP_FRAMES[ask])
            question = frame.replace("{x}", question)
            question = question[0].upper() + question[1:]
        return Sample("server help", question, chat(vary(rng, question), entry[reply + " answer"][0]))

    def facts(self, rng: Random, ask: str, reply: str) -> Sample:
        """Capitals and a little general knowledge."""
        if rng.random() < 0.4:
            return self.known(rng, ask, reply, "facts", t.FACTS)
        country = rng.choice(t.CAPITALS)
        template = rng.choice(t.CAPITAL_QUESTIONS[ask])
        names = dict(zip(("en", "fr", "en city", "fr city"), country.split("|"), strict=True))
        answer = t.CAPITAL_ANSWER[reply].format(x=names[reply], city=names[reply + " city"])
        key = f"{names['en']}, {template}"
        return Sample("facts", key, chat(vary(rng, template).format(x=names[ask]), answer))

    def arithmetic(self, rng: Random, ask: str, reply: str) -> Sample:
        """Sums and differences below a hundred, products up to twelve."""
        op = rng.choices("+-×", (5, 4, 2))[0]
        top = 12 if op == "×" else rng.choice((10, 20, 99, 99, 99))
        a, b = rng.randint(0, top), rng.randint(0, top)
        if op == "-" and b > a:
            a, b = b, a
        result = {"+": a + b, "-": a - b, "×": a * b}[op]
        question = vary(rng, rng.choice(t.SUMS[op][ask])).format(a=a, b=b)
        return Sample("arithmetic", f"{a}{op}{b}", chat(question, f"{a} {op} {b} = {result}."))

    def numbers(self, rng: Random, ask: str, reply: str) -> Sample:
        """Larger of two, even or odd."""
        a, b = rng.sample(range(100), 2)
        if rng.random() < 0.3:
            question = vary(rng, rng.choice(t.PARITY[ask])).format(a=a)
            return Sample("numbers", f"{a}", chat(question, t.PARITY_ANSWER[reply][a % 2].format(a=a)))
        question = vary(rng, rng.choice(t.LARGER[ask])).format(a=a, b=b)
        answer = t.LARGER_ANSWER[reply].format(a=max(a, b), b=min(a, b))
        return Sample("numbers", f"{a},{b}", chat(question, answer))

    def dates(self, rng: Random, ask: str, reply: str) -> Sample:
        """Next and previous days and months, lengths of months."""
        what = rng.choice(("day", "month", "length"))
        names = t.DAYS if what == "day" else t.MONTHS
        i, step = rng.randrange(len(names[ask])), rng.choice((1, -1))
        to = (i + step) % len(names[ask])
        table = t.LENGTH if what == "length" else t.NEXT[what] if step == 1 else t.PREVIOUS[what]
        template = rng.choice(table[ask])
        days = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[i % 12]
        answer = table[reply + " answer"][0].format(x=names[reply][i], y=names[reply][to], n=days)
        if what == "length" and i == 1:
            answer = t.FEBRUARY[reply]
        question = vary(rng, template).format(x=names[ask][i])
        return Sample("dates", f"{names['en'][i]}, {template}", chat(question, answer))

    def spelling(self, rng: Random, ask: str, reply: str) -> Sample:
        """A word letter by letter."""
        word = rng.choice(self.words)
        return Sample("spelling", word, chat(vary(rng, rng.choice(t.SPELL[ask])).format(x=word), "-".join(word) + "."))

    def letters(self, rng: Random, ask: str, reply: str) -> Sample:
        """How many letters a word has."""
        word = rng.choice(self.words)
        answer = f"{'-'.join(word)}: {len(word)} {'letters' if reply == 'en' else 'lettres'}."
        return Sample("letters", word, chat(vary(rng, rng.choice(t.LETTERS[ask])).format(x=word), answer))

    def counting(self, rng: Random, ask: str, reply: str) -> Sample:
        """From one number to another."""
        a = rng.choice((1, 1, rng.randint(0, 90)))
        b = a + rng.randint(2, 12)
        answer = ", ".join(str(n) for n in range(a, b + 1)) + "."
        return Sample("counting", f"{a},{b}", chat(vary(rng, rng.choice(t.COUNT[ask])).format(a=a, b=b), answer))

    def translation(self, rng: Random, ask: str, reply: str) -> Sample:
        """A common word from English to French or back."""
        pair = rng.choice(t.WORDS)
        to = rng.choice(("en", "fr"))
        word, other = pair if to == "fr" else pair[::-1]
        template = rng.choice(t.TRANSLATE[f"{ask}, {to}"])
        answer = t.TRANSLATION[f"{reply}, {to}"].format(x=word, y=other)
        return Sample("translation", f"{word}, {template}", chat(vary(rng, template).format(x=word), answer))

    def json(self, rng: Random, ask: str, reply: str) -> Sample:
        """A JSON object filled from a sentence."""
        sentence, names = rng.choice(t.RECORDS[ask])
        values = {kind: value(rng, kind) for kind in names}
        asked = rng.sample(list(names), rng.randint(max(1, len(names) - 1), len(names)))
        text = sentence.format(**values)
        fields = [names[kind] for kind in asked]
        listed = ", ".join(fields)
        if len(fields) > 1 and rng.random() < 0.5:
            listed = f"{', '.join(fields[:-1])} {'and' if ask == 'en' else 'et'} {fields[-1]}"
        answer = json.dumps({names[kind]: values[kind] for kind in asked}, ensure_ascii=False)
        key = " ".join(str(v) for v in values.values())
        if rng.random() < 0.25:
            system = rng.choice(t.JSON_SYSTEM[ask]).format(fields=listed)
            return Sample("json", key, [{"role": "system", "content": system}, *chat(text, answer)])
        question = vary(rng, rng.choice(t.JSON_QUESTIONS[ask])).format(fields=listed, text=text)
        return Sample("json", key, chat(question, answer))

    def tool(self, spec: t.Tool) -> Message:
        """A tool as an OpenAI request describes it."""
        types = {"int": "integer"}
        properties = {p: {"type": types.get(kind, "string")} for p, kind in spec.params.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {
            "name": spec.name, "description": spec.description, "parameters": parameters,
        }}  # fmt: skip

    def tool_call(self, rng: Random, ask: str, reply: str) -> Sample:
        """One of the offered tools is called with what the question names."""
        spec = self.made_up_tool(rng) if rng.random() < 0.35 else rng.choice(t.TOOLS)
        arguments = {p: value(rng, kind) for p, kind in spec.params.items()}
        template = rng.choice(spec.ask[ask])
        question = vary(rng, template).format(**arguments)
        offered = {spec.name: spec}
        for _ in range(rng.randint(0, 3)):
            other = self.made_up_tool(rng) if rng.random() < 0.3 else rng.choice(t.TOOLS)
            offered.setdefault(other.name, other)
        tools = [self.tool(s) for s in offered.values()]
        rng.shuffle(tools)
        return Sample("tool call", f"{spec.name} {arguments}", called(question, spec, arguments), tuple(tools))

    def made_up_tool(self, rng: Random) -> t.Tool:
        """A tool with a name that nobody has seen, so that names are read and not remembered."""
        verb, noun = rng.choice(t.TOOL_VERBS), rng.choice(t.TOOL_NOUNS)
        name = f"{verb}_{noun}" if rng.random() < 0.8 else f"{verb}_{rng.choice(self.words)}"
        kind = rng.choice(("word", "name", "city", "int"))
        param = rng.choice(t.TOOL_PARAMS[kind])
        field = "{" + param + "}"
        ask = {lang: [frame.format(name=name, verb=verb, noun=noun, param=param, value=field) for frame in frames]
               for lang, frames in t.TOOL_FRAMES.items()}  # fmt: skip
        return t.Tool(name, {param: kind}, f"{verb} a {noun}", ask, "", {}, {})

    def tool_answer(self, rng: Random, ask: str, reply: str) -> Sample:
        """The tool's result is put into a sentence."""
        spec = rng.choice([s for s in t.TOOLS if s.result])
        arguments = {p: value(rng, kind) for p, kind in spec.params.items()}
        results = {p: value(rng, kind) for p, kind in spec.results.items()}
        if spec.name == "add":
            results = {"sum": arguments["a"] + arguments["b"]}
        question = vary(rng, rng.choice(spec.ask[ask])).format(**arguments)
        answer = spec.answer[reply].format(**arguments, **{k: words(v, reply) for k, v in results.items()})
        result = {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(results, ensure_ascii=False)}
        messages = [*called(question, spec, arguments), result, {"role": "assistant", "content": answer}]
        return Sample("tool answer", f"{arguments} {results}", messages, (self.tool(spec),))

    def repeat(self, rng: Random, ask: str, reply: str) -> Sample:
        """Says what it is told to say."""
        text = " ".join(rng.choice(self.words) for _ in range(rng.randint(1, 6)))
        return Sample("repeat", text, chat(vary(rng, rng.choice(t.REPEAT[ask])).format(x=text), text))

    def memory(self, rng: Random, ask: str, reply: str) -> Sample:
        """Remembers what was said some turns before, or in the system message."""
        entry = rng.choice(t.MEMORY)
        x = value(rng, entry["kind"][0])
        template = rng.choice(entry["recall " + ask])
        tail = chat(vary(rng, template), entry["recalled " + reply][0].format(x=x))
        if entry.get("system " + ask):
            head = [{"role": "system", "content": rng.choice(entry["system " + ask]).format(x=x)}]
            return Sample("memory", f"{x}", head + tail)
        told = chat(vary(rng, rng.choice(entry["tell " + ask])).format(x=x), entry["told " + reply][0].format(x=x))
        between: list[Message] = []
        while rng.random() < 0.4:
            kind = rng.choice(("arithmetic", "server help", "dates", "small talk"))
            between += self.draw(rng, False, kind, f"{ask} {reply}").messages
        return Sample("memory", f"{x}", told + between + tail)

    def not_known(self, rng: Random, ask: str, reply: str) -> Sample:
        """Says plainly that it does not know, or asks back."""
        if rng.random() < 0.2:
            text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(2))
            return Sample("not known", text, chat(text, t.ASK_BACK[reply]))
        if rng.random() < 0.05:
            question = vary(rng, t.NO_NAME[ask][0])
            return Sample("not known", question, chat(question, t.NO_NAME[reply][1]))
        template = rng.choice(t.UNKNOWN[ask])
        x = rng.choice(t.UNKNOWN_TOPICS[ask])
        question = vary(rng, template).format(x=x, name=value(rng, "name"), year=rng.randint(1900, 2030))
        return Sample("not known", f"{x}, {template}", chat(question, t.DECLINE[reply]))


def chat(question: str, answer: str) -> list[Message]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def called(question: str, spec: t.Tool, arguments: dict[str, Any]) -> list[Message]:
    """A question and the tool call that it leads to."""
    call = {"id": "call_0", "type": "function", "function": {"name": spec.name, "arguments": arguments}}
    return [{"role": "user", "content": question}, {"role": "assistant", "content": None, "tool_calls": [call]}]


def value(rng: Random, kind: str) -> Any:
    """A value for a field: a number for "int", "age", "price" …, else text; names are often made up."""
    if kind in t.NUMBERS:
        return rng.randint(*t.NUMBERS[kind])
    if kind in ("name", "city") and rng.random() < 0.35:
        return "".join(rng.choice(t.SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
    return rng.choice(t.VALUES[kind])


def words(item: Any, lang: str) -> Any:
    """A tool's English word in the answer's language."""
    return t.RESULT_WORDS.get(item, item) if lang == "fr" and isinstance(item, str) else item
