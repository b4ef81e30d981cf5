"""Tool calls in text: every format, whole and in pieces, and what only looks like a call."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.served_model import find_format
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.chat.tool_calls import FORMATS, CallReader, ToolCallFormat, detect_format
from pyllm.server.flags import DEMO_FOLDER, ConfigError

HERMES, JSON, LLAMA = (FORMATS[name] for name in ("hermes", "json", "llama3_json"))
KNOWN = frozenset({"f", "get_weather"})
PARIS = '{"city": "Paris"}'
CALL = HERMES.write("get_weather", PARIS)

Read = tuple[str, list[tuple[str, str]], str]


def read(pieces: list[str], format_: ToolCallFormat = HERMES, *, forced: bool = False, cut: str | None = None) -> Read:
    """The content, the (name, arguments) of each call, and the finish reason, as the pieces of a turn add up."""
    reader = CallReader(format_, KNOWN, forced=forced)
    content, names, arguments = "", [], []
    ids: set[str] = set()
    for piece in [*map(reader.feed, pieces), reader.finish(cut)]:
        for call in piece:
            if isinstance(call, str):
                content += call
            elif call.name is not None:
                assert (call.index, call.arguments) == (len(names), "")
                assert call.id is not None
                assert call.id.startswith("call_")
                assert call.id not in ids
                ids.add(call.id)
                names.append(call.name)
                arguments.append("")
            else:
                assert call.id is None
                assert call.arguments, "no piece is empty"
                arguments[call.index] += call.arguments
    return content, list(zip(names, arguments, strict=True)), reader.finish_reason


CASES: list[tuple[ToolCallFormat, str, Any]] = [
    (HERMES, "Hello.", ("Hello.", [], "stop")),
    (HERMES, "  a \n", ("  a \n", [], "stop")),
    (HERMES, "", ("", [], "stop")),
    (HERMES, " \n", (" \n", [], "stop")),
    (HERMES, CALL, ("", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, f"\nI'll look.\n{CALL}\n", ("\nI'll look.", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, f"{CALL}\n{CALL}", ("", [("get_weather", PARIS)] * 2, "tool_calls")),
    (HERMES, f"One.{CALL}\nTwo.", ("One.\nTwo.", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, '<tool_call>\n{ "name" : "f" ,\n"parameters": {} }\n</tool_call>', ("", [("f", "{}")], "tool_calls")),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")], "tool_calls")),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")], "tool_calls")),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", [("f", '{"a": 1}')], "tool_calls")),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}', ("", [("f", '{"a": 1}')], "tool_calls")),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
     ("", [("f", '{"a": 1}')], "tool_calls")),
    (HERMES, HERMES.write("f", '{"a": "}</tool_call>\\"{"}'),
     ("", [("f", '{"a": "}</tool_call>\\"{"}')], "tool_calls")),
    (HERMES, HERMES.write("f", '{"a": [{"b": {}}, "é🙂"]}'), ("", [("f", '{"a": [{"b": {}}, "é🙂"]}')], "tool_calls")),
    # The end is missing, or some of it.
    (HERMES, CALL[:-1], ("", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, CALL.removesuffix("</tool_call>"), ("", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, CALL.removesuffix("}</tool_call>"), ("", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, CALL.removesuffix("}}</tool_call>"), ("", [("get_weather", PARIS[:-1])], "stop")),
    (HERMES, CALL.removesuffix("</tool_call>") + " Done.", (" Done.", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, CALL[:20], (CALL[:20], [], "stop")),
    (HERMES, "a <tool_", ("a <tool_", [], "stop")),
    # It is no call.
    (HERMES, HERMES.write("g", "{}"), (HERMES.write("g", "{}"), [], "stop")),
    (HERMES, "<tool_call>nonsense", ("<tool_call>nonsense", [], "stop")),
    (HERMES, "<tool_call>{nonsense}</tool_call>", ("<tool_call>{nonsense}</tool_call>", [], "stop")),
    (HERMES, f"<tool_call>{CALL}", ("<tool_call>", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, "<tool_call>" + "{" + CALL, ("<tool_call>{", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, '<tool_call>{"name": ["f"]}</tool_call>', ('<tool_call>{"name": ["f"]}</tool_call>', [], "stop")),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
     ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [], "stop")),
    (HERMES, '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>',
     ('<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>', [], "stop")),
    # Arguments that are no JSON arrive as written.
    (HERMES, HERMES.write("f", '{"a": oops}'), ("", [("f", '{"a": oops}')], "tool_calls")),
    # Bare JSON.
    (JSON, JSON.write("get_weather", PARIS), ("", [("get_weather", PARIS)], "tool_calls")),
    (LLAMA, LLAMA.write("f", "{}") + "; " + LLAMA.write("f", PARIS), ("", [("f", "{}"), ("f", PARIS)], "tool_calls")),
    (JSON, " " + JSON.write("f", "{}") + "\nDone.", ("\nDone.", [("f", "{}")], "tool_calls")),
    (JSON, "See " + JSON.write("f", "{}"), ("See " + JSON.write("f", "{}"), [], "stop")),
    (JSON, '{"name": "Ann", "age": 3}', ('{"name": "Ann", "age": 3}', [], "stop")),
    (JSON, '{"name": "f\\', ('{"name": "f\\', [], "stop")),
    (JSON, '\n{"na', ('\n{"na', [], "stop")),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "text", "expected"), CASES)
def test_turn_parses_the_same_whole_and_by_character(format_: ToolCallFormat, text: str, expected: Read) -> None:
    assert read([text], format_) == expected
    assert read(list(text), format_) == expected


SCRAPS = st.sampled_from([
    CALL, HERMES.start("f"), JSON.start("f"), LLAMA.start("get_weather"), JSON.start("g"), "<tool_call>",
    "</tool_call>", '{"a": "\\"}"}', '{"name": "f", "arguments": ', "}", "{", '"', "\\", "\n", " ", ";",
    "é🙂", "x", "[1, 2]",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(SCRAPS, max_size=8).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_where_a_text_is_cut_makes_no_difference(text: str, cuts: list[int], name: str) -> None:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert read(pieces, FORMATS[name]) == read([text], FORMATS[name]) == read(list(text), FORMATS[name])


CUT: list[tuple[ToolCallFormat, str, Any]] = [
    (HERMES, "Hello", ("Hello", [], "stop")),
    (HERMES, "a <", ("a", [], "length")),
    (HERMES, "a <b", ("a <b", [], "stop")),
    (HERMES, " \n<tool_", ("", [], "length")),
    (HERMES, "<tool_call>\n", ("", [], "length")),
    (HERMES, '<tool_call>{"name": "g', ("", [], "length")),
    (HERMES, '<tool_call>{"name": "f"}</tool_', ("", [], "length")),
    (HERMES, f"{CALL}\n<tool_call>" + '{"na', ("", [("get_weather", PARIS)], "length")),
    (HERMES, CALL.removesuffix("}}</tool_call>"), ("", [("get_weather", PARIS[:-1])], "length")),
    (HERMES, CALL.removesuffix("l>"), ("", [("get_weather", PARIS)], "tool_calls")),
    (HERMES, f"{CALL} Done", (" Done", [("get_weather", PARIS)], "tool_calls")),
    (JSON, "{", ("", [], "length")),
    (JSON, ' {"name": "f", "arg', ("", [], "length")),
    (JSON, '{"name": "Ann", "ag', ('{"name": "Ann", "ag', [], "stop")),
    (JSON, " \n", (" \n", [], "stop")),
    (LLAMA, LLAMA.write("f", "{}") + '; {"', ("", [("f", "{}")], "length")),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "text", "expected"), CUT)
def test_a_call_that_was_cut_off_leaves_no_markup(format_: ToolCallFormat, text: str, expected: Read) -> None:
    assert read([text], format_, cut="") == expected
    assert read(list(text), format_, cut="") == expected


@pytest.mark.parametrize(
    ("format_", "text", "stop", "expected"),
    [
        (HERMES, "a <", "b", ("a <", [], "stop")),
        (HERMES, "a <", "tool", ("a", [], "length")),
        (HERMES, "a <", "tool_call>{", ("a", [], "length")),
        (HERMES, "a <", "t<", ("a <", [], "stop")),
        (HERMES, "<tool_call>", "{", ("", [], "length")),
        (JSON, "{", '"answer"', ("{", [], "stop")),
        (JSON, "{", '"name": 5', ("{", [], "stop")),
        (JSON, "{", '"name', ("", [], "length")),
        (JSON, '{"name": "f', '"', ("", [], "length")),
    ],
)
def test_a_stop_string_cuts_a_call_only_if_it_continues_it(
    format_: ToolCallFormat, text: str, stop: str, expected: Read
) -> None:
    assert read([text], format_, cut=stop) == expected
    assert read(list(text), format_, cut=stop) == expected


@settings(max_examples=400, deadline=None)
@given(
    calls=st.lists(
        st.sampled_from(["{}", PARIS, '{"a": [{"b": "}</tool_call>"}], "c": "\\""}']), min_size=1, max_size=3
    ),
    before=st.sampled_from(["", "Look: ", "\n", "1 < 2", "{"]),
    name=st.sampled_from(sorted(FORMATS)),
    forced=st.booleans(),
    data=st.data(),
)
def test_markup_is_never_content_wherever_it_is_cut(
    calls: list[str], before: str, name: str, forced: bool, data: st.DataObject
) -> None:
    format_ = FORMATS[name]
    before = before if format_.opening and not forced else ""
    text = before + format_.separator.join(format_.write("f", arguments) for arguments in calls)
    text = text[: data.draw(st.integers(0, len(text)))]
    borders = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    found = read([text[a:b] for a, b in pairwise(borders)], format_, forced=forced, cut="")
    assert found == read([text], format_, forced=forced, cut="") == read([*text], format_, forced=forced, cut="")
    content, made, reason = found
    assert before.rstrip().startswith(content.rstrip())
    assert [arguments for _, arguments in made[:-1]] == calls[: len(made)][:-1]
    is_whole = bool(made) and made[-1][1] == calls[len(made) - 1]
    assert not made or calls[len(made) - 1].startswith(made[-1][1])
    assert reason in (("tool_calls", "length") if is_whole else ("length",) if forced else ("length", "stop"))


def test_a_forced_turn_has_no_content() -> None:
    for text in ("", "Hello", "<", "<tool_call>", f" {CALL} Done"):
        content, calls, reason = read([text], forced=True, cut="")
        assert (content, reason) == ("", "tool_calls" if calls else "length")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1, max_size=3),
    name=st.sampled_from(sorted(FORMATS)),
    indent=st.sampled_from([None, 1]),
)
def test_arguments_round_trip_as_text(calls: list[Any], name: str, indent: int) -> None:
    texts = [json.dumps(arguments, ensure_ascii=False, indent=indent) for arguments in calls]
    format_ = FORMATS[name]
    turn = format_.separator.join(format_.write("f", text) for text in texts)
    assert read(list(turn), format_) == ("", [("f", text) for text in texts], "tool_calls")


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = CallReader(HERMES, KNOWN)
    assert [call.name for call in reader.feed(HERMES.start("f") + '{"text": "on')] == ["f", None]
    assert [call.arguments for call in reader.feed("ce upon")] == ["ce upon"]
    assert [call.arguments for call in reader.feed(' a time"')] == [' a time"']


def test_content_is_held_back_only_while_it_may_begin_a_call() -> None:
    reader = CallReader(HERMES, KNOWN)
    assert [reader.feed(text) for text in ("a <", "b", " <tool_call>", "no", "!")] == [
        ["a"], [" <b"], [], [" <tool_call>no"], ["!"],
    ]  # fmt: skip
    bare = CallReader(JSON, KNOWN)
    assert [bare.feed(text) for text in ('{"na', 'me"', ': "Ann"', ", 1", "}")] == [
        [], [], [], ['{"name": "Ann", 1'], ["}"],
    ]  # fmt: skip


def test_the_format_is_found_in_the_template() -> None:
    assert detect_format("{{ '<tool_call>' }}") == "hermes"
    assert detect_format('{"name": function name, "parameters": dictionary}') == "llama3_json"
    assert detect_format('{"name": "x", "arguments": {}}') == "json"
    assert detect_format("{{ messages }}") == "hermes"


def test_a_parser_is_named_or_follows_the_template() -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    template = ChatTemplate(tokenizer, '{{ messages }}{# {\'name\': "name", "parameters"} #}')
    assert find_format("auto", template, tokenizer) is LLAMA
    assert find_format("json", template, tokenizer) is JSON
    with pytest.raises(ConfigError, match=r"--tool-call-parser hermse is unknown; did you mean hermes\?"):
        find_format("hermse", template, tokenizer)
    with pytest.raises(ConfigError, match=r"known parsers: auto, hermes, json, llama3_json, agentic\."):
        find_format("x", template, tokenizer)
    with pytest.raises(ConfigError, match="agentic needs a tokenizer with the special tokens"):
        find_format("agentic", template, tokenizer)


def test_content_and_calls_keep_their_order() -> None:
    parts = CallReader(HERMES, KNOWN).feed(f"One.{CALL}Two.{CALL} Three.")
    assert [part if isinstance(part, str) else part.index for part in parts] == ["One.", 0, 0, "Two.", 1, 1, " Three."]


GROWING = [
    '<tool_call>{"name": "',
    '<tool_call>{"a": "',
    "<tool_call>",
    "",
    '{"name": "',
    CALL.removesuffix("}</tool_call>"),
]
GROWING += ['<tool_call>{"name": "f", "arguments": {"a": "']


@pytest.mark.parametrize("form", [HERMES, JSON], ids=["hermes", "json"])
@pytest.mark.parametrize("unit", [" ", "x", "<tool_call>{", '<tool_call>{"', '{"name": "f", "arguments": {}};', CALL])
@pytest.mark.parametrize("start", GROWING)
def test_a_piece_costs_the_same_however_long_the_text_is(form: ToolCallFormat, unit: str, start: str) -> None:
    def work(length: int) -> float:
        text = start + unit * (length // len(unit))
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        began = time.thread_time()
        assert read(pieces, form) == read([text], form)
        return time.thread_time() - began

    # The least of several, since the garbage collector may run in any of them.
    short = min(work(3000) for _ in range(3))
    assert min(work(12_000) for _ in range(3)) < 8 * max(short, 0.05)


def test_markup_that_is_too_long_is_content() -> None:
    assert read([" " * 5000 + CALL], JSON)[:2] == (" " * 5000 + CALL, [])
    late = '<tool_call>{"arguments": {"text": "' + "x" * 9000 + '"}, "name": "f"}</tool_call>'
    for step in (7, len(late)):
        content, calls, _ = read([late[at : at + step] for at in range(0, len(late), step)])
        assert (content, [name for name, _ in calls]) == ("", ["f"])
