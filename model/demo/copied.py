"""Questions whose answers are copied: into JSON, into tool calls, or from what the user said before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from pyllm.model.demo import items as i
from pyllm.model.demo import tables as t
from pyllm.model.demo import wordings as w
from pyllm.model.demo.phrasing import Message, Sample, Values, called, capital, chat, expand, fill, vary


class Copied:
    """Draws them: each method takes the generator, the language of the question and the language of the answer."""

    def __init__(self, words: dict[str, list[str]], values: Values, draw: Callable[[Random, str, str], Sample]) -> None:
        """`draw` draws a question of a kind in given languages, to be asked in between."""
        self._words = words
        self._values = values
        self._draw = draw

    def json(self, rng: Random, ask: str, reply: str) -> Sample:
        """A JSON object filled from a sentence, or from a list of fields."""
        if rng.random() < 0.55:
            sentence, names = rng.choice(t.RECORDS[ask])
            sentence = expand(rng, sentence)
            values = {kind: self._values.draw(rng, kind.rstrip("2"), ask) for kind in names}
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
            names = [self._values.ident(rng) for _ in names]
        values = {name: self._values.draw(rng, "any", lang) for name in names}
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
        arguments = {p: self._values.draw(rng, kind, ask) for p, kind in spec.params.items()}
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
        verb, noun = rng.choice(t.TOOL_VERBS), rng.choice(t.TOOL_NOUNS + self._words["en"][:: rng.randint(3, 9)])
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
        arguments = {p: self._values.draw(rng, kind, ask) for p, kind in spec.params.items()}
        results = {p: self._values.draw(rng, kind, ask) for p, kind in spec.results.items()}
        if spec.name == "add":
            results = {"sum": arguments["a"] + arguments["b"]}
        question = fill(vary(rng, ask, expand(rng, rng.choice(spec.ask[ask]))), arguments)
        answer = spec.answer[reply].format(**arguments, **{k: in_language(v, reply) for k, v in results.items()})
        result = {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(results, ensure_ascii=False)}
        messages = [*called(question, spec.name, arguments), result, {"role": "assistant", "content": answer}]
        return Sample("tool answer", messages, (self.tool(spec),))

    def repeat(self, rng: Random, ask: str, reply: str) -> Sample:
        """Says what it is asked to say."""
        text = " ".join(rng.choice(self._words[ask]) for _ in range(rng.randint(1, 5)))
        text = self._values.code(rng) if rng.random() < 0.3 else text
        return Sample("repeat", chat(fill(vary(rng, ask, rng.choice(t.REPEAT[ask])), {"x": text}), text))

    def memory(self, rng: Random, ask: str, reply: str) -> Sample:
        """Remembers the user's name or city, or its own name from the system message."""
        entry = rng.choice(t.MEMORY)
        x = self._values.draw(rng, entry["kind"][0], ask)
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
            between += self._draw(rng, rng.choice(("sums", "help", "dates", "capitals")), f"{ask} {reply}").messages
        return between

    def context(self, rng: Random, ask: str, reply: str) -> Sample:
        """What the user said before, in the same message or some turns earlier."""
        tell, question, x = _split(rng.choice(w.CONTEXT[ask]))
        kind = rng.choice(("name", "code", "word", "city"))
        fields = {"r": rng.choice(w.RELATIVES[ask]), "o": rng.choice(w.OBJECTS[ask]), "b": rng.choice(w.PLACES[ask]),
                  "f": rng.choice(("food", "colour", "book", "game", "song")), "d": rng.choice(i.DAYS[ask]),
                  "x": self._values.draw(rng, kind, ask)}  # fmt: skip
        said, asked = (fill(expand(rng, part), fields) for part in (tell, question))
        answer = capital(fill(x, fields)) + "."
        if rng.random() < 0.65:
            joint = rng.choice((" ", " ", " So, ", " Then: ") if ask == "en" else (" ", " ", " Alors, ", " Donc : "))
            return Sample("context", chat(said + joint + asked, answer))
        noted = "I will remember that." if reply == "en" else "Je m'en souviendrai."
        return Sample("context", chat(said, noted) + self._between(rng, ask, reply) + chat(asked, answer))


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
