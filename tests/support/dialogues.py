"""The chat forms of the TR-Hash line, written down once more without our templates, and what tiny models say in them.

`support/train_reasoners.py` trains a model for each form on these dialogues, so that its reasoning is real text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from support.checkpoints import byte_tokenizer
from tokenizers import AddedToken, normalizers

from pyllm.model.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("reasoners")
DEGREES, SKIES = (2, 7), ("cloudy", "snowy")
CITIES = ("Paris", "Oslo")
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "get the weather in a city", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": WEATHER}
CALL = '{"name": "get_weather", "arguments": {"city": "%s"}}'
V2 = (
    "{%- for m in messages -%}{%- set text = m.content | trim -%}"
    "{%- if m.role == 'system' -%}{{ 'System:\n' + text + '\n\n' }}"
    "{%- elif m.role == 'user' -%}{{ 'User:\n' + text + '\n\n' }}"
    "{%- elif m.role == 'assistant' -%}{{ 'Assistant:\n' + text + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}\n"
)
AGENTIC = (
    "{%- if tools -%}{{ '<|system|>Available tools:\n' }}{{ tools | tojson }}{{ '<|end_of_turn|>' }}{%- endif -%}"
    "{%- for m in messages -%}{%- set text = m.content or '' -%}"
    "{%- if m.role == 'tool' -%}{{ '<|tool_result_start|>' + text + '<|tool_result_end|><|end_of_turn|>' }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|assistant|>' }}"
    "{%- if m.tool_calls -%}{{ '<|tool_call_start|>' }}{{ m.tool_calls | tojson }}{{ '<|tool_call_end|>' }}"
    "{%- endif -%}"
    "{%- if text -%}{{ '<|final_start|>' + text + '<|final_end|>' }}{%- endif -%}{{ '<|end_of_turn|>' }}"
    "{%- else -%}{{ '<|' + m.role + '|>' + text + '<|end_of_turn|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|><|think_start|>' }}{%- endif -%}"
)
"""The chat template of the agentic tokenizer's repository."""
PLAIN_TOKENS = ("</s>", "<pad>", "<s>", "<unk>")
SECTION_TOKENS = ("<|think_start|>", "<|think_end|>", "<|final_start|>", "<|final_end|>")
SECTIONS = ("tool_call", "tool_result", "plan", "memory", "think", "final")
AGENTIC_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "begin", "end", "pad", "unk", "system", "user", "assistant", "end_of_turn",
        *(f"{section}_{end}" for section in SECTIONS for end in ("start", "end")),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Dialogue:
    """What is asked and answered; with cities, a call for each comes first."""

    question: str
    thought: str | None  # None: it answers without reasoning
    answer: str | None  # None: it ends inside the reasoning
    cities: tuple[str, ...] = ()
    after: str = ""  # the reasoning once the results are there
    is_bare: bool = False  # no marks around the answer, and no white space around those of the reasoning


SUM = Dialogue("What is 2 + 3?", "2 and 3 make 5.", "It is 5.")
RED = Dialogue("Name a colour.", "Red or blue? I stop at red.", "Red, and I stop here.")
FISH = Dialogue("Show a fish.", "Ça va: 🐟 é.", "Voilà: 🐟!")
HELLO = Dialogue("Hello!", None, "Hello, how are you?")
WHO = Dialogue("Who is Ann?", "Ann is 30.", '{"name": "Ann", "age": 30}')
COUNT = Dialogue("Count for me.", "1 and 2 and 3 and", None)
LATE = Dialogue("Is it late?", "It is 5.", "No.", is_bare=True)
PLAIN = (SUM, RED, FISH, HELLO, WHO, COUNT, LATE)


def weather(city: str = "Paris", degrees: int = 7, sky: str = "cloudy") -> Dialogue:
    """A question that needs one call, whose result the answer repeats."""
    return Dialogue(
        f"What is the weather in {city}?", f"I look up {city}.", f"It is {degrees} degrees and {sky} in {city}.",
        (city,), f"It is {degrees}.",
    )  # fmt: skip


def both(first: str = "Paris", second: str = "Oslo") -> Dialogue:
    """A question that needs two calls."""
    return Dialogue(
        f"Compare {first} and {second}.", "I need both.", f"I saw {first} and {second}.", (first, second), "Done."
    )


LINES = (
    "You can call these functions. To call one, write Be brief and kind. You help people with all things they ask for.",
    "Available tools Get the weather.",
)
JSON_WORDS = "arguments temperature sky additionalProperties false schema http json org draft title City tool_response"
JSON_WORDS += " System User Assistant cloudy snowy Paris Oslo call"
PUNCTUATION = (".</", '":', '\u0120{"', '\u0120"', '",', '"}},', '"]', "]}}}]")
IN_MARKS = ("th", "hi", "in", "nk", "fi", "na", "al")
"""Pairs of letters in the marks of plain text, which stay apart."""


@dataclass(frozen=True)
class Form:
    """A chat form: how prompts and answers are written in it."""

    name: str  # of its folder, too
    template: str

    @property
    def is_agentic(self) -> bool:
        return self.name == "agentic"

    @property
    def marks(self) -> tuple[str, str, str, str]:
        """The start and the end of reasoning and of an answer, with the white space that the form writes."""
        return SECTION_TOKENS if self.name != "tags" else ("<think>\n", "\n</think>\n", "<final>\n", "\n</final>")  # type: ignore[return-value]

    @property
    def end(self) -> str:
        """The end of a turn."""
        return "<|end_of_turn|>" if self.is_agentic else "</s>"

    @property
    def opening(self) -> str:
        """The start of the assistant's turn."""
        return "<|assistant|>" if self.is_agentic else "Assistant:\n"

    def turn(self, role: str, text: str) -> str:
        """A turn of the system, the user or a tool."""
        if self.is_agentic:
            marked = f"<|tool_result_start|>{text}<|tool_result_end|>" if role == "tool" else f"<|{role}|>{text}"
            return marked + self.end
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        return f"{role.capitalize()}:\n{text}\n\n"

    def calls(self, cities: Sequence[str]) -> str:
        """The calls as the model writes them."""
        if self.is_agentic:
            return f"<|tool_call_start|>[{', '.join(CALL % city for city in cities)}]<|tool_call_end|>"
        return "".join(f"<tool_call>{CALL % city}</tool_call>" for city in cities)

    def history(self, text: str, cities: Sequence[str] = (), ids: Sequence[str] = ()) -> str:
        """An earlier turn of the assistant: what it has said, without reasoning."""
        think, end, final, final_end = self.marks
        if self.is_agentic:
            shown = [
                {"id": id_, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
                for id_, city in zip(ids, cities, strict=True)
            ]
            calls = f"<|tool_call_start|>{json.dumps(shown)}<|tool_call_end|>" if shown else ""
            answer = final + text + final_end if text else ""
            return self.opening + calls + answer + self.end
        said = text + self.calls(cities)
        if self.name == "tokens":
            said = think + end + final + said + final_end
        return self.opening + said + self.end

    def reasoning(self, thought: str | None, dialogue: Dialogue) -> str:
        """Reasoning with its marks; None is what the form writes for none."""
        think, end, _, _ = self.marks
        if thought is None:
            return "" if self.name == "tags" else think + end
        if dialogue.is_bare:
            return think.strip() + thought + end.strip()
        return think + thought + (end if dialogue.answer is not None else "")

    def answer(self, dialogue: Dialogue, with_marks: bool = True) -> str:
        """The answer, with its marks if the form has them there."""
        _, _, final, final_end = self.marks
        if dialogue.is_bare or not with_marks:
            return dialogue.answer or ""
        return final + (dialogue.answer or "") + final_end

    def described(self, tools: Sequence[dict[str, Any]], system: str) -> str:
        """The system's turns."""
        if self.is_agentic:
            shown = [{"type": "function", "function": tool} for tool in tools]
            offered = self.turn("system", f"Available tools:\n{json.dumps(shown, ensure_ascii=False)}") if tools else ""
            return offered + (self.turn("system", system) if system else "")
        write = '<tool_call>{"name": "NAME", "arguments": {ARGUMENTS}}</tool_call>'
        lines = [f"You can call these functions. To call one, write {write}", *map(json.dumps, tools)]
        texts = [system] * bool(system) + ["\n".join(lines)] * bool(tools)
        return self.turn("system", "\n\n".join(texts)) if texts else ""


TAGS, TOKENS, AGENT = Form("tags", V2), Form("tokens", V2), Form("agentic", AGENTIC)
FORMS = (TAGS, TOKENS, AGENT)


def make_tokenizer(form: Form) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of the form's structure, with a token for each word that the dialogues and JSON have.

    Marks of plain text are a token for each byte, but for one token that ends a sentence and begins an end tag.
    """
    said = [
        text for d in (*PLAIN, *map(weather, CITIES), both(), *(weather(sky=sky) for sky in SKIES))
        for text in (d.question, d.thought, d.answer, d.after) if text
    ]  # fmt: skip
    spaced = " ".join([*said, *LINES]).split()
    words = [f"\u0120{word.rstrip('.,:!?')}" for word in spaced if word.isascii() and "{" not in word]
    words += [word for word in re.findall("[a-zA-Z]+", f"{json.dumps(TOOL)} {JSON_WORDS}") if word[:2] not in IN_MARKS]
    library = byte_tokenizer()
    specials = AGENTIC_TOKENS if form.is_agentic else PLAIN_TOKENS
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*specials, *alphabet])}
    merges: list[tuple[str, str]] = []
    for left, right in [pair for word in (*words, *PUNCTUATION) for pair in _chain(word)]:
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    unknown = specials[3]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token=unknown))
    made.pre_tokenizer, made.decoder = library.pre_tokenizer, library.decoder
    if not form.is_agentic:
        made.normalizer = normalizers.NFC()
    made.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if form.name == "tokens":
        made.add_special_tokens([AddedToken(token, special=True) for token in SECTION_TOKENS])
    return made


def _chain(text: str) -> list[tuple[str, str]]:
    """The merges that build a text from the left."""
    return [(text[:n], text[n]) for n in range(1, len(text))]


def write_tokenizer(form: Form, folder: Path) -> Tokenizer:
    """Save what a published folder has next to the weights."""
    make_tokenizer(form).save(str(folder / "tokenizer.json"), pretty=False)
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    texts = AGENTIC_TOKENS[:4] if form.is_agentic else ("<s>", "</s>", "<pad>", "<unk>")
    names = dict(zip(roles, texts, strict=True))
    settings = names | {"add_bos_token": True, "add_eos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(form.template)
    return Tokenizer.from_folder(folder)
