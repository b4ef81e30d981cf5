"""`POST /v1/responses` and what is kept of it: items in, items out, events, the store, and what is refused."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from pyllm.engine.messages import SamplingParams, TokenLogprobs
from pyllm.server import responses
from pyllm.server.chat_template import ChatTemplate
from pyllm.server.protocol.responses import InputItemList, ResponseEvent, ResponseObject
from pyllm.server.response_events import Answer
from pyllm.server.response_store import KeptResponse, ResponseStore
from pyllm.server.tools import FORMATS, CallReader
from pyllm.server.turn import Turn

REPLY = "Hello, wörld!"
REPLY_TOKENS = 15  # 14 bytes and the end
EVENT = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
USAGE = {
    "prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}  # fmt: skip


@pytest.fixture
def create(harness):
    """Make a response; a whole answer comes as JSON after it was held against both models of it."""

    def create(expect: int = 200, **fields):
        response = harness.post("/v1/responses", {"input": "Hi"} | fields)
        assert response.status_code == expect, response.text
        if expect != 200:
            return response.json()["error"]
        if fields.get("stream"):
            return events_of(response.text)
        ResponseObject.model_validate_json(response.content)
        Response.model_validate_json(response.content)
        return response.json()

    return create


@pytest.fixture
def long_context(harness):
    """Room for descriptions of tools, of which each byte is a token here."""
    harness.engine.info = msgspec.structs.replace(harness.engine.info, max_model_len=1500)


def events_of(text):
    """The events, after a look at their numbers, their names and their shapes."""
    blocks = [block for block in text.split("\n\n")[:-1] if not block.startswith(":")]
    pairs = [block.split("\n") for block in blocks]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        ResponseEvent.model_validate(event)
        assert type(EVENT.validate_python(event)).model_fields["type"].annotation.__args__ == (event["type"],)
    return events


def types_of(events):
    """The events' types, each once where it repeats."""
    return [kind.removeprefix("response.") for kind, _ in itertools.groupby(event["type"] for event in events)]


def prompts(harness):
    return [harness.tokenizer.decode(prompt) for _, prompt, _ in harness.engine.requests]


def without_ids(value):
    """A response without what differs each time."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return [without_ids(entry) for entry in value] if isinstance(value, list) else value


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


def test_stream_has_all_events_in_order_and_ends_with_the_whole_answer(create):
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
def test_logprobs_are_of_the_texts_tokens_the_same_whole_and_streamed(create, top):
    whole = create(**top)["output"][0]["content"][0]["logprobs"]
    assert bytes(byte for entry in whole for byte in entry["bytes"]).decode() == REPLY
    assert {len(entry["top_logprobs"]) for entry in whole} == {top.get("top_logprobs", 0)}
    events = create(stream=True, **top)
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [entry for event in deltas for entry in event["logprobs"]] == whole
    assert all(bytes(b for e in event["logprobs"] for b in e["bytes"]).decode() == event["delta"] for event in deltas)
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole


def test_logprobs_show_the_tokens_of_a_character_that_the_end_leaves_unfinished_as_a_chat_does(create, harness):
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


def test_items_of_every_kind_reach_the_prompt_in_order(create, harness, long_context):
    create(
        instructions="Obey.",
        tools=[WEATHER],
        input=[
            {"role": "developer", "content": "Note."},
            {"role": "user", "content": [{"type": "input_text", "text": "Ask"}, {"type": "input_text", "text": "me"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "Rain"},
        ],
    )  # fmt: skip
    (prompt,) = prompts(harness)
    place = 0
    for text in ("Obey.", "Note.", "Ask", "me", "Wait.", "get_weather", "Rain"):
        place = prompt.index(text, place)


def test_a_response_goes_on_after_an_earlier_one_without_its_instructions(create, harness):
    first = create(instructions="Obey.", input="One")
    second = create(input="Two", previous_response_id=first["id"])
    create(input=[], previous_response_id=second["id"])
    create(input=None, previous_response_id=second["id"])
    seen = prompts(harness)
    assert "Obey." in seen[0]
    assert "Obey." not in seen[1]
    assert seen[1].index("One") < seen[1].index(REPLY) < seen[1].index("Two")
    assert seen[2] == seen[3]
    assert seen[2].count(REPLY) == 2
    assert second["previous_response_id"] == first["id"]


def test_a_stream_is_kept_like_a_whole_answer(create, harness):
    events = create(input="One", stream=True)
    kept = harness.get(f"/v1/responses/{events[-1]['response']['id']}").json()
    assert kept == events[-1]["response"]
    create(input="Two", previous_response_id=kept["id"])
    assert prompts(harness)[1].index("One") < prompts(harness)[1].index(REPLY)


def test_a_conversation_goes_on_though_its_first_response_is_deleted(create, harness):
    first = create(input="One")
    second = create(input="Two", previous_response_id=first["id"])
    deleted = harness.run(lambda client: client.delete(f"/v1/responses/{first['id']}"))
    assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
    create(input="Three", previous_response_id=second["id"])
    assert "One" in prompts(harness)[2]
    assert harness.get(f"/v1/responses/{first['id']}").status_code == 404


def test_items_may_be_named_by_their_id(create, harness):
    message = create()["output"][0]
    create(input=[{"role": "user", "content": "Ah"}, {"type": "item_reference", "id": message["id"]}])
    assert REPLY in prompts(harness)[1]
    error = create(400, input=[{"type": "item_reference", "id": "msg_0"}])
    assert (error["param"], error["code"]) == ("input[0].id", "item_not_found")
    twice = [{"type": "item_reference", "id": message["id"]}, {"type": "item_reference", "id": message["id"]}]
    assert create(400, input=twice)["param"] == "input[1].id"


def test_items_of_one_response_are_read_once_and_without_their_logprobs(create, harness, long_context, monkeypatch):
    reads = []
    read = KeptResponse.output_items
    monkeypatch.setattr(KeptResponse, "output_items", lambda kept: reads.append(read(kept)) or reads[-1])
    harness.engine.reply = f"Let me look. {CALL}"
    first = create(tools=[WEATHER], max_output_tokens=100, top_logprobs=2)
    assert first["output"][0]["content"][0]["logprobs"]
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "Rain"}
    second = create(input=[*references, result])
    assert len(reads) == 1
    listed = harness.get(f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in listed] == ["message", "function_call", "function_call_output"]
    assert listed[0]["content"] == [first["output"][0]["content"][0] | {"logprobs": []}]
    create(input="And?", previous_response_id=first["id"])
    assert len(reads) == 2
    assert harness.get(f"/v1/responses/{first['id']}").json() == first


@pytest.mark.parametrize("field", ["previous_response_id", "input[1].id"])
def test_too_much_of_earlier_responses_is_refused(create, harness, monkeypatch, field):
    first, second = create(), create()
    monkeypatch.setattr(responses, "MAX_BODY_BYTES", 450)  # room for one conversation, or two answers
    if field == "previous_response_id":
        create(previous_response_id=first["id"])
        monkeypatch.setattr(responses, "MAX_BODY_BYTES", 100)
        error = create(400, previous_response_id=first["id"])
    else:
        one, two = ({"type": "item_reference", "id": answer["output"][0]["id"]} for answer in (first, second))
        create(input=[one, two])
        monkeypatch.setattr(responses, "MAX_BODY_BYTES", 300)
        create(input=[one])
        error = create(400, input=[one, two])
    assert error["param"] == field


def test_input_items_are_listed_newest_first_in_pages(create, harness):
    first = create(input="One")
    second = create(input=[{"role": "user", "content": "Two"}], previous_response_id=first["id"])
    path = f"/v1/responses/{second['id']}/input_items"
    page = harness.get(path)
    InputItemList.model_validate_json(page.content)
    ResponseItemList.model_validate_json(page.content)
    texts = [item["content"][0]["text"] for item in page.json()["data"]]
    assert texts == ["Two", REPLY, "One"]
    assert page.json()["has_more"] is False
    start = harness.get(f"{path}?limit=2&order=asc").json()
    assert [item["content"][0]["text"] for item in start["data"]] == ["One", REPLY]
    assert start["has_more"] is True
    rest = harness.get(f"{path}?limit=2&order=asc&after={start['last_id']}").json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["Two"]
    assert rest["first_id"] == rest["last_id"] == rest["data"][0]["id"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "limit=0020", f"limit={'0' * 5000}", "limit=\u0661", "order=up", "order=DESC",
     "after=msg_0", "foo=1", "include=x"],
    ids=lambda query: query[:20],
)  # fmt: skip
def test_a_wrong_query_is_refused_by_name(create, harness, query):
    answer = harness.get(f"/v1/responses/{create()['id']}/input_items?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


def test_what_is_not_kept_is_not_found(create, harness):
    answer = create(store=False)
    assert answer["store"] is False
    for path in (answer["id"], f"{answer['id']}/input_items", "resp_0"):
        assert harness.get(f"/v1/responses/{path}").json()["error"]["code"] == "response_not_found"
    error = create(400, previous_response_id=answer["id"])
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert harness.post("/v1/responses/resp_0/cancel").status_code == 404
    assert harness.run(lambda client: client.delete("/v1/responses/resp_0")).status_code == 404


def test_a_stream_of_a_kept_response_and_its_cancellation_are_refused(create, harness):
    path = f"/v1/responses/{create()['id']}"
    assert harness.get(f"{path}?stream=true").json()["error"]["param"] == "stream"
    assert harness.get(f"{path}?stream=false&include[]=message.output_text.logprobs").status_code == 200
    assert harness.post(f"{path}/cancel").status_code == 400


def test_the_store_forgets_what_is_longest_unused_and_stays_within_its_bytes():
    def response(number, size=100):
        return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * size}]}

    store = ResponseStore(max_responses=3, max_bytes=4000)
    for number in range(3):
        store.put(response(number), b"[]")
    assert store.find("resp_0")
    store.put(response(3), b"[]")
    assert [bool(store.find(f"resp_{number}")) for number in range(4)] == [True, False, True, True]
    assert store.find_holder("msg_1") is None
    assert store.find_holder("msg_3").output_items() == response(3)["output"]
    store.put(response(4, size=1700), b"[]")
    assert (len(store), store.size <= 4000) == (2, True)
    store.put(response(5, size=2000), b"[]")
    assert store.find("resp_5") is None
    for number in (3, 4):
        store.remove(f"resp_{number}")
    assert (len(store), store.size) == (0, 0)


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


def long_items(harness):
    room = harness.engine.info.max_model_len
    return [{"role": "user", "content": f"{number:02}" + "." * (room // 8)} for number in range(12)]


def test_too_long_an_input_is_refused_unless_truncation_drops_its_oldest_items(create, harness):
    error = create(400, input=long_items(harness))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    answer = create(input=long_items(harness), truncation="auto", instructions="Obey.", max_output_tokens=20)
    assert answer["truncation"] == "auto"
    assert answer["usage"]["input_tokens"] + 20 <= harness.engine.info.max_model_len
    (prompt,) = prompts(harness)
    kept = [number for number in range(12) if f"{number:02}." in prompt]
    assert kept == list(range(kept[0], 12))
    assert len(kept) > 3
    assert "Obey." in prompt
    create(400, input="." * 500, truncation="auto")


def test_truncation_drops_the_result_of_a_call_that_is_gone(create, harness):
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": json.dumps({"x": "." * 120})}
    words = [{"role": "user", "content": text} for text in ("Ask." + "." * 60, "Well?")]
    items = [words[0], call, words[1], {"type": "function_call_output", "call_id": "c1", "output": "Rain"}, words[1]]
    create(400, input=items)
    create(input=items, truncation="auto")
    (prompt,) = prompts(harness)
    assert "Well?" in prompt
    assert "Rain" not in prompt
    short = call | {"arguments": "{}"}
    create(input=[words[0], words[0], words[0], short, items[3]], truncation="auto")
    assert "Rain" in prompts(harness)[1]
    create(400, input=[], instructions="." * 300, truncation="auto")


@pytest.mark.parametrize("size", [100, 1])
def test_truncation_reads_the_items_once_and_renders_little_more_than_what_fits(create, harness, monkeypatch, size):
    chats, rendered = [], []
    to_chat, render = responses.to_chat, ChatTemplate.render
    monkeypatch.setattr(responses, "to_chat", lambda *given: chats.append(to_chat(*given)) or chats[-1])
    monkeypatch.setattr(
        ChatTemplate, "render", lambda *given, **more: rendered.append(len(given[1])) or render(*given, **more)
    )
    items = [{"role": "user", "content": f"{number:04}" + "." * size} for number in range(1000)]
    create(input=items, truncation="auto", max_output_tokens=20)
    kept = [number for number in range(1000) if f"{number:04}" in prompts(harness)[0]]
    assert kept == list(range(kept[0], 1000))
    assert len(chats) == 1
    assert sum(rendered) < 100


def test_too_many_items_or_calls_together_are_refused(create, monkeypatch):
    first = create(input="One")
    monkeypatch.setattr(responses, "MAX_ITEMS", 2)
    assert create(400, input="Two", previous_response_id=first["id"])["param"] == "input"
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    assert create(400, input=[call] * 129)["param"] == "input"


def test_truncation_leaves_alone_what_fits(create, harness):
    create(input="One", truncation="auto")
    create(input="One")
    assert prompts(harness)[0] == prompts(harness)[1]


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
        ({"tools": [WEATHER], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": [{"type": "function_call_output", "call_id": "c1", "output": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
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
        ({"messages": []}, "messages"),
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


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_a_tool_choice_without_tools_is_harmless_unless_it_needs_one(create, choice):
    assert create(tool_choice=choice)["tool_choice"] == choice
    assert create(400, tool_choice="required")["param"] == "tool_choice"
    unknown = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}
    assert create(400, tools=[WEATHER], tool_choice=unknown)["param"] == "tool_choice"


@pytest.fixture
def outputs(harness):
    def outputs(pieces):
        reader = lambda: CallReader(FORMATS["hermes"], {"get_weather"})  # noqa: E731
        turn = Turn(prompt=[1], params=SamplingParams(logprobs=0), reader=reader)
        answer = Answer({"id": "resp_1", "output": []}, turn, harness.tokenizer)
        for piece in pieces:
            ids = harness.tokenizer.encode(piece)
            answer.take(piece, [TokenLogprobs(token_id=id_, logprob=-1.0, top=[]) for id_ in ids])
        answer.finish("stop", USAGE)
        return without_ids(answer.response["output"])

    return outputs


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


def test_text_after_a_call_is_a_message_of_its_own(outputs):
    kinds = [item["type"] for item in outputs([f"{CALL} Done.{CALL}"])]
    assert kinds == ["function_call", "message", "function_call"]
