"""Grammars of answers and calls begin after the reasoning, whatever its marks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
import pytest
from support.checkpoints import byte_tokenizer
from tokenizers import AddedToken

from pyllm.engine.grammar.checker import Vocabulary, compile_grammar, try_grammar
from pyllm.engine.grammar.object_keys import KeyTokens, tracker_for
from pyllm.engine.messages import Marks
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.conversation import Tool
from pyllm.server.chat.reasoning import GrammarMarks, find_marks
from pyllm.server.chat.structured_output import json_schema_grammar
from pyllm.server.chat.tool_calls import FORMATS, ToolCallFormat
from pyllm.server.chat.tool_choice import ToolOptions

NAMES = ("think_start", "think_end", "final_start", "final_end", "tool_call_start", "tool_call_end")


def make_tokenizer() -> Tokenizer:
    library = byte_tokenizer()
    library.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in NAMES])
    return Tokenizer(library)


TOKENIZER = make_tokenizer()
TOKENS = find_marks("auto", TOKENIZER, "", "") or Marks()
PIECES = [TOKENIZER.token_bytes(id_) for id_ in range(TOKENIZER.vocab_size)]
LIBRARY = Vocabulary(PIECES, sorted(TOKENIZER.special_ids), [0]).tokenizer(TOKENIZER.encode)
INTEGER = {"type": "integer"}
ANSWER = json_schema_grammar(
    {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": False}
)
TOOL = Tool("f", parameters={"type": "object", "properties": {"x": INTEGER}}, parameters_field="p")
CALL = '{"name": "f", "arguments": {"x":1}}'
AGENTIC = replace(FORMATS["agentic"], ids=(TOKENS.ids[4], TOKENS.ids[5]))
TAGGED = ("<think>\nhm < {", "</think>", '\n<final>\n{"a":1}\n</final>', f"<tool_call>{CALL}</tool_call>")
MARKED = ("<|think_start|>hm {", "<|think_end|>", '<|final_start|>{"a":1}<|final_end|>',
          f"<|tool_call_start|>[{CALL}]<|tool_call_end|>")  # fmt: skip
FORMS = [
    pytest.param(Marks(), FORMATS["hermes"], TAGGED, id="tags"),
    pytest.param(TOKENS, AGENTIC, MARKED, id="tokens"),
]


def accepts(grammar: str, text: str) -> bool:
    assert try_grammar(LIBRARY, grammar) == ""
    matcher = compile_grammar(LIBRARY, grammar)
    return all(matcher.consume_token(id_) for id_ in TOKENIZER.encode_prompt(text)) and matcher.is_accepting()


@pytest.mark.parametrize(("marks", "form", "texts"), FORMS)
def test_an_answer_follows_its_grammar_after_free_reasoning(
    marks: Marks, form: ToolCallFormat, texts: tuple[str, ...]
) -> None:
    thought, end, answer, _ = texts
    grammar = GrammarMarks(marks, TOKENIZER, True).around(ANSWER)
    for text in (thought + end + answer, thought + end + '{"a":1}', answer.lstrip(), '{"a":1}'):
        assert accepts(grammar, text), text
    for text in (thought + end + '{"b":1}', "hm", thought, thought + end):
        assert not accepts(grammar, text), text
    inside = GrammarMarks(msgspec.structs.replace(marks, starts_in="reasoning"), TOKENIZER, True).around(ANSWER)
    assert accepts(inside, "hm {" + end + answer)
    assert not accepts(inside, answer.lstrip())
    off = GrammarMarks(marks, TOKENIZER, False).around(ANSWER)
    assert accepts(off, answer.lstrip())
    assert not accepts(off, thought + end + answer)


@pytest.mark.parametrize("mode", ["required", "auto"])
@pytest.mark.parametrize(("marks", "form", "texts"), FORMS)
def test_calls_follow_reasoning(
    marks: Marks, form: ToolCallFormat, texts: tuple[str, ...], mode: Literal["required", "auto"]
) -> None:
    thought, end, answer, call = texts
    opening = "" if marks.ids else "\n"
    options = ToolOptions(tools=[TOOL], mode=mode, parallel=False, format=form)
    for inner in (None, ANSWER) if mode == "auto" else (None,):
        made = options.grammar(inner, GrammarMarks(marks, TOKENIZER, True))
        assert made is not None
        grammar = made[0]
        assert accepts(grammar, thought + end + call)
        assert accepts(grammar, thought + end + opening + call)
        assert accepts(grammar, call)
        assert not accepts(grammar, call.replace('"x"', '"y"')) or mode == "auto"
        assert not accepts(grammar, call + call)
        assert accepts(grammar, thought + end + answer) == (mode == "auto")
        assert accepts(grammar, "words") == (mode == "auto" and inner is None)


def test_calls_between_special_tokens_need_no_reasoning() -> None:
    made = ToolOptions(tools=[TOOL], mode="required", parallel=True, format=AGENTIC).grammar(None)
    assert made is not None
    assert accepts(made[0], f"<|tool_call_start|>[{CALL}, {CALL}]<|tool_call_end|>")
    assert not accepts(made[0], f"<|tool_call_start|>{CALL}<|tool_call_end|>")


def test_keys_repeat_in_reasoning_only() -> None:
    loose = json_schema_grammar({"type": "object", "additionalProperties": INTEGER})
    tracker = tracker_for(GrammarMarks(TOKENS, TOKENIZER, True).around(loose), KeyTokens(PIECES))
    assert tracker is not None
    for id_ in TOKENIZER.encode_prompt('<|think_start|>{"a":{"a<|think_end|><|final_start|>{"a":1,"a'):
        tracker.consume(id_)
    quote = TOKENIZER.encode('"')[0]
    bits = np.full(-(-len(PIECES) // 8), 255, np.uint8)
    tracker.forbid(bits)
    assert not bits[quote >> 3] >> (quote & 7) & 1
