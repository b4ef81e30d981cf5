"""The grammar of a turn with tools: which texts it lets a model write."""

from __future__ import annotations

import asyncio
from typing import Any

import llguidance
import pytest
from support.grammars import check_grammar

from pyllm.engine.errors import RequestError
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.conversation import Conversation, Message, Tool, ToolChoice
from pyllm.server.chat.structured_output import json_schema_grammar, regex_grammar
from pyllm.server.chat.tool_calls import FORMATS
from pyllm.server.chat.tool_choice import arguments_schema, read_tools
from pyllm.server.flags import DEMO_FOLDER

TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)
INTEGER = {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False,
}  # fmt: skip


TOOLS = [
    Tool("strict", strict=True, parameters=INTEGER),
    Tool("no-arguments", parameters_field="second"),
    Tool("loose", parameters_field="third", parameters={"properties": {"q": {"type": "string"}}}),
]
AUTO: dict[str, Any] = {}
SINGLE: dict[str, Any] = {"parallel_tool_calls": False}
REQUIRED: dict[str, Any] = {"tool_choice": ToolChoice("required")}
NAMED: dict[str, Any] = {"tool_choice": ToolChoice("named", ("no-arguments",))}


class Vocabulary:
    """The demo model's tokens, for the grammar library."""

    eos_token_id = TOKENIZER.eos_token_id
    bos_token_id = None
    tokens = [TOKENIZER.token_bytes(id_) for id_ in range(TOKENIZER.vocab_size)]  # noqa: RUF012
    special_token_ids = sorted(TOKENIZER.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        return TOKENIZER.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


LIBRARY = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))


def accepts(fields: dict[str, Any], text: str, name: str, answer: str | None = None) -> bool:
    """Whether a whole turn may be `text`."""
    conversation = Conversation(messages=[Message("user", "?")], tools=TOOLS, **fields)
    tools = read_tools(conversation, FORMATS[name])
    assert tools is not None
    found = tools.grammar(answer)
    assert found is not None
    grammar, _ = found
    asyncio.run(check_grammar(grammar, "tools"))
    matcher = llguidance.LLMatcher(LIBRARY, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = [*TOKENIZER.encode_prompt(text), TOKENIZER.eos_token_id]
    return bool(matcher.validate_tokens(ids) == len(ids))


@pytest.mark.parametrize("name", sorted(name for name, format_ in FORMATS.items() if format_.ids is None))
def test_calls_are_held_to_the_choice(name: str) -> None:
    format_ = FORMATS[name]
    right, wrong = format_.write("strict", '{"x": 3}'), format_.write("strict", '{"y": 3}')
    empty, other = format_.write("no-arguments", "{}"), format_.write("loose", '{"other": 1}')
    two = right + format_.separator + empty
    expected = {
        # text: (auto, auto without parallel calls, required, required without, named)
        "hello": (True, True, False, False, False),
        "": (True, True, False, False, False),
        right: (True, True, True, True, False),
        empty: (True, True, True, True, True),
        format_.write("no-arguments", '{"a": 1}'): (False,) * 5,
        wrong: (False,) * 5,
        format_.write("unknown", "{}"): (False,) * 5,
        two: (True, False, True, False, False),
        other: (True, True, False, False, False),  # only strict functions are held to their schema in a free choice
        format_.write("loose", '{"q": "1"}'): (True, True, True, True, False),
    }
    choices = [AUTO, SINGLE, REQUIRED, REQUIRED | SINGLE, NAMED]
    for text, allowed in expected.items():
        assert tuple(accepts(fields, text, name) for fields in choices) == allowed, text


def test_marked_call_may_appear_inside_text() -> None:
    call = FORMATS["hermes"].write("strict", '{"x": 3}')
    assert accepts(AUTO, f"One.\n{call}\ntwo {call} <tool_ three", "hermes")
    assert accepts(SINGLE, f"One {call}", "hermes")
    assert not accepts(SINGLE, f"{call} one", "hermes")
    assert not accepts(AUTO, "<tool_call>no", "hermes")
    assert not accepts(REQUIRED, f"One {call}", "hermes")
    assert accepts(AUTO, 'One {"name": 3}', "json")


def test_an_answer_of_a_format_may_be_calls_instead() -> None:
    call = FORMATS["hermes"].write("strict", '{"x": 3}')
    for answer, text in ((json_schema_grammar({"type": "object"}), '{"a": 1}'), (regex_grammar("hel+o"), "hello")):
        assert accepts(AUTO, text, "hermes", answer)
        assert accepts(AUTO, call + call, "hermes", answer)
        assert not accepts(AUTO, call + text, "hermes", answer)
        assert not accepts(AUTO, "other", "hermes", answer)


def test_tools_that_are_too_complex_together_are_refused() -> None:
    """128 tools of a few kilobytes each made a grammar of 22 MB, which took half a minute."""
    wide = {"type": "object", "properties": {f"p{n}": True for n in range(140)}, "minProperties": 100}
    tools = [Tool(f"t{n}", parameters=wide, parameters_field=f"tools[{n}].parameters") for n in range(128)]
    conversation = Conversation(messages=[Message("user", "?")], tools=tools, tool_choice=ToolChoice("required"))
    options = read_tools(conversation, FORMATS["hermes"])
    assert options is not None
    with pytest.raises(RequestError, match="too complex together") as caught:
        options.grammar(None)
    assert 5 < int((caught.value.param or "")[6:].partition("]")[0]) < 20


def test_arguments_have_only_declared_members() -> None:
    def of(parameters: dict[str, Any] | None) -> dict[str, Any]:
        return arguments_schema(Tool("f", parameters=parameters))

    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    assert of(None) == of({}) == of({"type": "object"}) == closed
    assert of({"type": "object", "additionalProperties": True}) == {"type": "object", "additionalProperties": True}
    assert of({"anyOf": [{"required": ["a"]}]}) == {"type": "object", "anyOf": [{"required": ["a"]}]}
