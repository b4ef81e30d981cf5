"""A model that reasons: how it marks its reasoning, and how a request switches that on and off.

The text itself is split into reasoning and answer by `engine/client/sections.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from typing import Literal

import msgspec

from ...engine.grammar.object_keys import REASONING
from ...engine.messages import Marks, Section
from ...model.tokenizer import Tokenizer
from ..flags import ConfigError
from ..http.errors import shorten
from .conversation import Conversation, Message
from .marked_calls import MarkedCallReader
from .parts import Part, Thought, TurnReader
from .template import SECTION_MARKS, TokenIds

PARSERS = ("auto", "none", "tokens", "tags")
"""The values of `--reasoning-parser`: special tokens, or tags in the text."""
SWITCHES = frozenset({"enable_thinking", "include_reasoning", "reasoning_effort", "reasoning_summary"})
"""Variables a request may set for a reasoning model: whether it reasons, whether the reasoning is returned, the effort
hint that decides the first, and whether a response returns it as a summary."""
TOKENS = (*SECTION_MARKS[0], "<|tool_call_start|>", "<|tool_call_end|>")
TAGS = SECTION_MARKS[1]
_REASONING = [
    re.compile(rf"\s*{re.escape(start)}.*?(?:{re.escape(end)}\s*|\Z)", re.DOTALL) for start, end, *_ in SECTION_MARKS
]
TAIL = 24  # tokens at the end of a prompt in which a tag is looked for


def find_marks(parser: str, tokenizer: Tokenizer, template: str, era: str) -> Marks | None:
    """Return the marks that `--reasoning-parser` selects, None if the model has none; raises `ConfigError`.

    "auto" means special tokens if the tokenizer has them, else tags if the chat template has them or the model belongs
    to the TR-Hash line, which was trained on them. Tool calls between special tokens are found in any case.
    """
    if parser not in PARSERS:
        near = difflib.get_close_matches(parser, PARSERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known parsers: {', '.join(PARSERS)}."
        raise ConfigError(f"--reasoning-parser {shorten(parser)} is unknown; {hint}")
    ids = [special_id(tokenizer, text) for text in TOKENS]
    tags = [special_id(tokenizer, text) for text in TAGS]
    if ids[0] < 0 and tags[0] >= 0:
        ids[:4] = tags
    has_tokens = ids[0] >= 0 and ids[1] >= 0
    if parser == "tokens" and not has_tokens:
        needed = " and ".join(TOKENS[:2])
        raise ConfigError(f"--reasoning-parser tokens needs a tokenizer with the special tokens {needed}.")
    if has_tokens and parser in ("auto", "tokens"):
        return Marks(ids=tuple(ids))
    if parser == "tags" or (parser == "auto" and (TAGS[0] in template or era.startswith("TR-Hash"))):
        return Marks()
    return Marks(ids=(-1, -1, -1, -1, *ids[4:])) if ids[4] >= 0 else None


def has_reasoning(marks: Marks | None) -> bool:
    """Whether these marks separate reasoning from the answer."""
    return marks is not None and (not marks.ids or marks.ids[0] >= 0)


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """Return the id of the special token with this text, -1 if there is none."""
    ids = tokenizer.encode_prompt(text) if tokenizer.spells_special(text) else []
    return ids[0] if len(ids) == 1 else -1


def locate(marks: Marks, prompt: TokenIds, conversation: Conversation, tokenizer: Tokenizer) -> Marks:
    """Return the marks for the text after a prompt, which may end with the start of a section."""
    sections: tuple[Literal["reasoning", "content"], ...] = ("reasoning", "content")
    if marks.ids:
        last = prompt[-1] if len(prompt) else -1
        starts = {id_: section for id_, section in zip(marks.ids[0:4:2], sections, strict=True) if id_ >= 0}
        return msgspec.structs.replace(marks, starts_in=starts.get(last))
    continues = conversation.continue_final_message
    text = (conversation.messages[-1].text or "") if continues else tokenizer.decode(prompt[-TAIL:])
    for (start, end), section in zip((marks.think, marks.final), sections, strict=True):
        found = text.rfind(start)
        if found >= 0 and (text.rfind(end) < found if continues else not text[found + len(start) :].strip()):
            more = bool(text[found + len(start) :].strip())
            return msgspec.structs.replace(marks, starts_in=section, continues=more)
    return marks


def without_reasoning(conversation: Conversation) -> list[Message]:
    """Return the messages; earlier answers lose the reasoning that a client has left at the beginning of their text."""
    last = conversation.messages[-1] if conversation.continue_final_message else None
    return [
        replace(message, text=_final_part(message.text) or None)
        if message.role == "assistant" and message.text and message is not last
        else message
        for message in conversation.messages
    ]


def _final_part(text: str) -> str:
    for pattern, (_, _, final, end) in zip(_REASONING, SECTION_MARKS, strict=True):
        at = 0
        while found := pattern.match(text, at):
            at = found.end()
        if at:
            rest = text[at:]
            return rest[len(final) :].rstrip().removesuffix(end).strip() if rest.startswith(final) else rest
    return text


def switch_ids(marks: Marks, is_on: bool, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens to add to a prompt: the start of reasoning, or empty reasoning."""
    inside = marks.starts_in == "reasoning"
    if is_on:
        return [] if inside else [marks.ids[0]] if marks.ids else tokenizer.encode(f"{marks.think[0]}\n")
    if marks.ids:
        return [*marks.ids[inside:2]]
    start, end = marks.think
    return tokenizer.encode(f"\n{end}\n" if inside else f"{start}\n\n{end}\n")


def read_section(reader: TurnReader, section: Section, text: str) -> list[Part]:
    """Turn a piece of one section's text into parts of the turn, using `reader`."""
    if isinstance(reader, MarkedCallReader):
        return reader.read(section, text)
    if section == "reasoning":
        return [Thought(text)]
    return [] if section == "mark" else reader.feed(text)


class GrammarMarks:
    """Lark rules (for llguidance) for what surrounds the answer: reasoning and marks."""

    def __init__(self, marks: Marks, tokenizer: Tokenizer, may_reason: bool) -> None:
        """Take the marks as `locate` returns them."""
        self._texts = [tokenizer.token_text(id_) if id_ >= 0 else "" for id_ in marks.ids[:4]]
        self._texts = self._texts or [*marks.think, *marks.final]
        self._inside = marks.starts_in == "reasoning"
        self._opened = marks.starts_in == "content"
        self._may_reason = may_reason and not self._opened
        self.ids = marks.ids

    @property
    def header(self) -> str:
        """The grammar's first line, which the tracker of keys reads."""
        return REASONING + json.dumps([*self._texts[:3], self._inside])

    def rules(self) -> list[str]:
        """Return the rules `before`, `opened` and `closed`: reasoning, and the marks around an answer."""
        if not self._may_reason and not self._inside:
            before = 'before: ""'
        elif self.ids:
            start, end = (f"<[{id_}]>" for id_ in self.ids[:2])
            before = f"before: THOUGHT? {end}" if self._inside else f"before: ({start} THOUGHT? {end})?"
        else:
            before = "before: THOUGHT" if self._inside else f"before: ({json.dumps(self._texts[0])} THOUGHT)?"
        if self.ids:
            marks = [f"<[{id_}]>?" if id_ >= 0 else '""' for id_ in self.ids[2:4]]
            rules = [before, r"THOUGHT: /(.|\n)+/", f"opened: {marks[0]}", f"closed: {marks[1]}"]
            return [*rules[:2], 'opened: ""' if self._opened else rules[2], rules[3]]
        end, opening, closing = (re.escape(text).replace("/", r"\/") for text in self._texts[1:])
        return [
            before,
            rf"THINKING: /(.|\n)*/ & ~/(.|\n)*{end}(.|\n)*/",
            f"THOUGHT: THINKING {json.dumps(self._texts[1])}",
            # Two tokens, since the lexer does not backtrack: an answer or a call may begin as the mark does.
            "opened: LINES? OPENED?",
            r"LINES: /\n{1,2}/",
            rf"OPENED: /{opening}\n?/",
            "closed: CLOSED?",
            rf"CLOSED: /\n?{closing}\n?/",
        ]

    def around(self, grammar: str) -> str:
        """Return a grammar for the whole turn, whose answer follows `grammar`."""
        lines = [self.header, "start: before opened @answer closed", *self.rules()]
        (part,) = json.loads(grammar)["grammars"]
        return json.dumps(
            {"grammars": [{"name": "turn", "lark_grammar": "\n".join(lines)}, {**part, "name": "answer"}]}
        )
