"""`POST /v1/responses`: items out, events, logprobs, functions, and what is refused."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import msgspec
import pytest
from support.responses_client import CALL, REPLY, WEATHER, creator, prompts, types_of, without_ids

from pyllm.engine.messages import SamplingParams, TokenLogprobs
from pyllm.server.api.responses.events import ResponseWriter
from pyllm.server.chat.tool_calls import FORMATS, CallReader
from pyllm.server.chat.turn import Turn

ONE_STORE = pytest.mark.parametrize("store_url", ["memory"], indirect=True)
"""For what never comes to a store."""
REPLY_TOKENS = 15  # 14 bytes and the end
USAGE = {
    "prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}  # fmt: skip


@pytest.fixture
def harness(make_harness, store_url):
    return make_harness(response_store=store_url)


@pytest.fixture
def create(harness):
    return creator(harness)


@pytest.fixture
def long_context(harness):
    """Allow long descriptions of tools: each byte is a token here."""
    harness.engine.configure(max_model_len=1500)


def test_whole_answer_has_openai_shape_text_and_counts(create, harness):
    answer = create(model="alias", metadata={"a": "b"}, user="me", instructions="Be kind.")
    (message,) = answer["output"]
    assert message["content"] == [{"type": "output_text", "text": REPLY, "annotations": [], "logprobs": []}]
    assert (message["role"], message["status"], answer["status"]) == ("assistant", "completed", "completed")
    assert answer["id"].startswith("resp_")
    assert message["id"].startswith("msg_")
    usage = answer["usage"]
    assert usage["input_tokens"] == len(harness.engine.requests[0][1])
    assert usage["output_tokens"] == REPLY_TOKENS
    assert usage["total_tokens"] == usage["input_tokens"] + REPLY_TOKENS
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    echo = {"model": "alias", "metadata": {"a": "b"}, "user": "me", "instructions": "Be kind.", "temperature": 1.0}
    echo |= {"tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"}}
    echo |= {"error": None, "incomplete_details": None, "store": True, "truncation": "disabled", "top_p": 1.0}
    assert answer.items() >= echo.items()


def test_stream_has_all_events_and_ends_with_the_whole_answer(create):
    events = create(stream=True)
    assert types_of(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "".join(deltas) == REPLY == events[-4]["text"]
    assert all(deltas)
    assert events[-2]["item"] == events[-1]["response"]["output"][0]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert without_ids(events[-1]["response"]) == without_ids(create())


@pytest.mark.parametrize("top", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
def test_logprobs_belong_to_the_text_whole_and_streamed(create, top):
    whole = create(**top)["output"][0]["content"][0]["logprobs"]
    assert bytes(byte for entry in whole for byte in entry["bytes"]).decode() == REPLY
    assert {len(entry["top_logprobs"]) for entry in whole} == {top.get("top_logprobs", 0)}
    events = create(stream=True, **top)
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [entry for event in deltas for entry in event["logprobs"]] == whole
    assert all(bytes(b for e in event["logprobs"] for b in e["bytes"]).decode() == event["delta"] for event in deltas)
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole


def test_logprobs_show_the_tokens_of_an_unfinished_character(create, harness):
    for length in (9, 1):  # the first byte of ö; and of an answer that is nothing else
        harness.engine.reply = harness.engine.reply if length == 9 else "ö"
        chat = harness.chat(max_tokens=length, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"][
            "content"
        ]
        answer = create(max_output_tokens=length, top_logprobs=1)
        assert answer["output"][0]["content"][0]["logprobs"] == chat
        events = create(max_output_tokens=length, top_logprobs=1, stream=True)
        deltas = [event for event in events if event["type"].endswith("text.delta")]
        assert [entry for event in deltas for entry in event["logprobs"]] == chat
        assert without_ids(events[-1]["response"]) == without_ids(answer)


def test_logprobs_of_a_stopped_text_are_those_of_what_is_shown(create):
    logprobs = create(stop=["wö"], top_logprobs=1)["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs) == "Hello, "


def test_an_answer_that_is_cut_is_incomplete(create):
    answer = create(max_output_tokens=4)
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["max_output_tokens"], answer["completed_at"]) == (4, None)
    events = create(max_output_tokens=4, stream=True)
    assert events[-1]["type"] == "response.incomplete"
    assert without_ids(events[-1]["response"]) == without_ids(answer)


def test_an_empty_answer_is_an_empty_message(create, harness):
    harness.engine.reply = ""
    assert create()["output"][0]["content"][0]["text"] == ""
    events = create(stream=True)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""
    assert "output_text.delta" not in types_of(events)


def test_a_failure_in_a_stream_is_its_last_event(create, harness):
    harness.engine.fail_after = 4
    events = create(stream=True)
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["output"][0]["content"][0]["text"] == "Hel"
    harness.engine.fail_after = 4
    assert create(500)["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_completed_exactly_if_its_arguments_are(create, harness, stream):
    harness.engine.configure(max_model_len=1000)
    for reply, limit, statuses in (
        (CALL, len(CALL), ["completed"]),
        (f"{CALL}\n{CALL}", len(CALL) + 20, ["completed"]),
        (f"{CALL}\n{CALL}", 2 * len(CALL) - 20, ["completed", "incomplete"]),
        (CALL[:-20], 900, ["incomplete"]),
        (f"{CALL} Done.", len(CALL) + 4, ["completed", "incomplete"]),
    ):
        harness.engine.reply = reply
        answer = create(tools=[WEATHER], max_output_tokens=limit, stream=stream)
        response = answer[-1]["response"] if stream else answer
        assert [item["status"] for item in response["output"]] == statuses
        assert response["status"] == ("completed" if limit == 900 else "incomplete")


def test_what_the_engine_refuses_later_names_no_field(create, harness, monkeypatch):
    process = harness.engine.processor.process

    def refuse(output, now=None):
        error = "The grammar cannot be used: it is too slow."
        refused = msgspec.structs.replace(output, token_ids=[], finish_reason="error", error=error, refused=True)
        return process(refused, now)

    monkeypatch.setattr(harness.engine.processor, "process", refuse)
    error = create(400)
    assert (error["param"], error["message"]) == (None, "The grammar cannot be used: it is too slow.")
    last = create(stream=True)[-1]
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "invalid_prompt")
    anthropic = {"model": "alias", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    answer = harness.post("/v1/messages", anthropic)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)


def test_null_fields_mean_their_defaults(create, harness):
    names = list(harness.app.openapi()["components"]["schemas"]["ResponseRequest"]["properties"])
    create(**dict.fromkeys(name for name in names if name != "input"))
    create()
    first, second = (params for _, _, params in harness.engine.requests)
    assert first == second


def test_sampling_fields_reach_the_engine(create, harness):
    create(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop="x", stop_token_ids=[9], min_tokens=1,
        presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.1, logit_bias={"5": 2}, bad_words=["no"],
        priority=4, cache_salt="s", max_output_tokens=6, skip_special_tokens=False, include_stop_str_in_output=True,
    )  # fmt: skip
    ((_, _, params),) = harness.engine.requests
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, 3)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, 0.5, 1.1)
    assert (params.max_tokens, params.min_tokens, params.stop_token_ids) == (6, 1, (9,))
    assert "x" in params.stop
    assert params.logit_bias == {5: 2.0}
    assert params.bad_words
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens
    assert harness.engine.extras == [(4, "s")]


@ONE_STORE
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "id": "rs_1"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, {"type": "function"}]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c1", "output": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"reasoning": {"budget": 5}}, "reasoning.budget"),
        ({"include": ["thoughts"]}, "include[0]"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"truncation": "middle"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"n": 2}, "n"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_done_is_refused_by_name(create, harness, fields, param):
    error = create(400, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert not any(word in error["message"] for word in (".function", "response_format", "messages["))
    assert not harness.engine.requests


def test_an_unknown_model_is_not_found(create):
    assert create(404, model="gpt-4o")["code"] == "model_not_found"


def test_a_function_call_is_an_item_the_same_whole_and_streamed(create, harness, long_context):
    harness.engine.reply = f"Let me look. {CALL}"
    answer = create(tools=[WEATHER], max_output_tokens=100)
    message, call = answer["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    assert answer["tools"] == [WEATHER]
    events = create(tools=[WEATHER], max_output_tokens=100, stream=True)
    assert types_of(events)[2:] == [
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call["arguments"]
    assert without_ids(events[-1]["response"]) == without_ids(answer)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"get_weather", "get_time"}), ({"type": "function", "name": "get_time"}, {"get_time"}),
     ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}, {"get_time"})],
)  # fmt: skip
def test_a_tool_choice_is_repeated_as_it_was_asked(create, harness, long_context, choice, names):
    harness.engine.reply = CALL
    answer = create(tools=[WEATHER, {"type": "function", "name": "get_time"}], tool_choice=choice)
    assert answer["tool_choice"] == choice
    assert [tool["name"] for tool in answer["tools"]] == ["get_weather", "get_time"]
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        assert "get_time" in prompts(harness)[0]
        assert "get_weather" not in prompts(harness)[0]
        assert [item["type"] for item in answer["output"]] == ["message"]


@ONE_STORE
@pytest.mark.parametrize("choice", ["none", "auto"])
def test_a_tool_choice_without_tools_must_not_require_one(create, choice):
    assert create(tool_choice=choice)["tool_choice"] == choice
    assert create(400, tool_choice="required")["param"] == "tool_choice"
    unknown = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}
    assert create(400, tools=[WEATHER], tool_choice=unknown)["param"] == "tool_choice"


@pytest.fixture
def outputs(harness):
    def outputs(pieces):
        stored = []

        async def put(response):
            stored.append(response)

        reader = lambda: CallReader(FORMATS["hermes"], {"get_weather"})  # noqa: E731
        turn = Turn(prompt=[1], params=SamplingParams(logprobs=0), reader=reader)
        choice = SimpleNamespace(finish_reason="stop", stop_reason=None)
        generation = SimpleNamespace(with_logprobs=True, choices=[choice], usage=lambda: USAGE)
        writer = ResponseWriter({"id": "resp_1", "output": []}, turn, generation, harness.tokenizer, put)
        for piece in pieces:
            ids = harness.tokenizer.encode(piece)
            logprobs = [TokenLogprobs(token_id=id_, logprob=-1.0, top=[]) for id_ in ids]
            writer.piece(0, SimpleNamespace(text=piece, logprobs=logprobs, sections=[]))
        writer.closing()
        asyncio.run(writer.settle())
        assert stored == [writer.response]
        return without_ids(writer.response["output"])

    return outputs


@ONE_STORE
@pytest.mark.parametrize(
    "text",
    [
        f"Hm. {CALL}{CALL}",
        f"{CALL} Done, {{really}}.\n{CALL} <b>Bye</b>",
        'A <tool_call>{"name": "unknown", "arguments": {}}</tool_call> is none.',
        "a < b and {c} > d",
        f"{CALL}So",
    ],
)
def test_where_the_text_is_cut_makes_no_difference_to_the_items(outputs, text):
    whole = outputs([text])
    for size in (1, 2, 3, 7, 30):
        assert outputs([text[start : start + size] for start in range(0, len(text), size)]) == whole


@ONE_STORE
def test_text_after_a_call_is_a_message_of_its_own(outputs):
    kinds = [item["type"] for item in outputs([f"{CALL} Done.{CALL}"])]
    assert kinds == ["function_call", "message", "function_call"]
