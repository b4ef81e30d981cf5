"""The chat forms of the TR-Hash line, to the character and to the token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import byte_tokenizer
from support.dialogues import AGENTIC, FOLDER, FORMS, SECTION_TOKENS, V2, WEATHER, Form, write_tokenizer

from pyllm.model import CheckpointError
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.conversation import Message, Tool, ToolCall
from pyllm.server.chat.template import ChatTemplate, ChatTemplateError

PIECES: dict[str, Any] = {
    "id": "complexity-chat-v2", "version": 2, "system_prompt": "", "system_format": "System:\n{content}\n\n",
    "user_format": "User:\n{content}\n\n", "assistant_prefix": "Assistant:\n", "turn_separator": "\n\n",
    "eos_token": "<|endoftext|>", "assistant_only_loss": True,
}  # fmt: skip
NAMES = (
    "system user assistant end_of_turn tool_call_start tool_call_end tool_result_start tool_result_end think_start "
    "think_end final_start final_end"
)
CHAT = [
    Message("system", " Be kind. "),
    Message("user", "Hi </s>\n"),
    Message("assistant", "Yes "),
    Message("user", "é"),
]
EXPECTED = "System:\nBe kind.\n\nUser:\nHi {}\n\nAssistant:\nYes</s>User:\né\n\nAssistant:\n"


def template(folder: Path, name: str, content: str, marks: str = "") -> tuple[Tokenizer, ChatTemplate]:
    library = byte_tokenizer()
    library.add_special_tokens([f"<|{mark}|>" for mark in marks.split()])
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / name).write_text(content)
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, ChatTemplate.from_tokenizer(tokenizer)


FILES = [("chat_template.jinja", V2), ("chat_template.json", json.dumps(PIECES))]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_v2_from_jinja_and_from_pieces(name: str, content: str, tmp_path: Path) -> None:
    tokenizer, chat = template(tmp_path, name, content)
    ids = chat.render(CHAT)
    assert tokenizer.decode(ids, skip_special_tokens=False) == EXPECTED.format("</s>")
    assert ids.count(0) == 1, "the one that a user spelled is text"
    assert ids[0] != tokenizer.bos_token_id
    assert ids[-1] == tokenizer.encode("\n")[0]
    assert chat.stop_strings == ()


@pytest.mark.parametrize(("name", "content"), FILES)
def test_earlier_answers_have_the_marks_of_the_32004_variant(name: str, content: str, tmp_path: Path) -> None:
    """Its template writes only the words, but every answer that it learned from had empty or full reasoning."""
    tokenizer, chat = template(tmp_path, name, content, "think_start think_end final_start final_end")
    text = tokenizer.decode(ids := chat.render(CHAT), skip_special_tokens=False)
    before, after = "<|think_start|><|think_end|><|final_start|>", "<|final_end|>"
    assert text == EXPECTED.format("</s>").replace("Yes", f"{before}Yes{after}")
    marks = [tokenizer.encode_prompt(mark)[0] for mark in SECTION_TOKENS]
    assert [id_ for id_ in ids if id_ in marks] == marks
    opened = chat.render([*CHAT[:2], Message("assistant", "Yes, ")], continue_final_message=True)
    assert tokenizer.decode(opened, skip_special_tokens=False).endswith(f"Assistant:\n{before}Yes, ")
    called = Message("assistant", "<|final_end|>")
    spelled = chat.render([CHAT[1], called, CHAT[3]])
    assert spelled.count(marks[3]) == 1, "the one that a client spelled is text"
    assert chat.stop_strings == ()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_written_as_its_models_learned_it(form: Form, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(form, tmp_path)
    chat = ChatTemplate.from_tokenizer(tokenizer)
    call = ToolCall("call_1", "get_weather", '{"city": "Oslo"}')
    tool = Tool("get_weather", WEATHER["description"], WEATHER["parameters"])
    messages = [Message("user", "Hi"), Message("assistant", "Yes."), Message("user", "So?")]
    expected = form.turn("user", "Hi") + form.history("Yes.") + form.turn("user", "So?")
    if form.is_agentic:
        messages += [Message("assistant", None, calls=(call,)), Message("tool", "7", call_id="call_1")]
        expected += form.history("", ["Oslo"], ["call_1"]) + form.turn("tool", "7")
    system = Message("system", "Be kind.")
    text = form.described([WEATHER] * form.is_agentic, "Be kind.") + expected + form.opening
    text += "<|think_start|>" * form.is_agentic
    ids = chat.render([system, *messages], tools=[tool])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids == tokenizer.encode_prompt(text)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_trained_models_have_the_form_s_files(form: Form, tmp_path: Path) -> None:
    write_tokenizer(form, tmp_path)
    for path in tmp_path.iterdir():
        assert (FOLDER / form.name / path.name).read_bytes() == path.read_bytes(), "run support/train_reasoners.py"


def test_v1_pieces_have_a_system_prompt_of_their_own(tmp_path: Path) -> None:
    pieces = PIECES | {"id": "complexity-chat-v1", "system_prompt": ' Say "a{b}%}". '}
    tokenizer, chat = template(tmp_path, "chat_template.json", json.dumps(pieces))
    text = tokenizer.decode(chat.render([Message("user", "Hi")]), skip_special_tokens=False)
    assert text == 'System:\nSay "a{b}%}".\n\nUser:\nHi\n\nAssistant:\n'
    with pytest.raises(ChatTemplateError, match="no place for a system message"):
        chat.render(CHAT)


@pytest.mark.parametrize("change", [{"user_format": "User: "}, {"system_format": 3}, {"assistant_prefix": None}])
def test_pieces_that_mean_nothing_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be texts with"):
        template(tmp_path, "chat_template.json", json.dumps(PIECES | change))


def test_the_agentic_form_has_marks_for_turns_calls_and_results(tmp_path: Path) -> None:
    tokenizer, chat = template(tmp_path, "chat_template.jinja", AGENTIC, NAMES)
    call = ToolCall("call_1", "find", '{"q": "<a> & b", "n": 1}')
    messages = [Message("user", " Hi <|end_of_turn|>"), Message("assistant", None, calls=(call,)),
                Message("tool", "none", call_id="call_1"), Message("assistant", "No.")]  # fmt: skip
    tool = Tool("find", parameters={"type": "object", "properties": {}})
    ids = chat.render(messages, tools=[tool])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    described = '[{"type": "function", "function": {"name": "find"'
    assert text.startswith(f"<|system|>Available tools:\n{described}")
    assert "<|user|> Hi <|end_of_turn|><|end_of_turn|><|assistant|><|tool_call_start|>[{" in text
    assert '"arguments": {"q": "<a> & b", "n": 1}' in text
    assert text.endswith(
        "<|tool_call_end|><|end_of_turn|><|tool_result_start|>none<|tool_result_end|><|end_of_turn|>"
        "<|assistant|><|final_start|>No.<|final_end|><|end_of_turn|><|assistant|><|think_start|>"
    )
    end = tokenizer.encode_prompt("<|end_of_turn|>")[0]
    assert ids.count(end) == 5, "the one that a user spelled is text"
