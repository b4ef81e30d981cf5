"""Stored responses: conversations that continue from them, and the lists of their items, in every kind of store."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from openai.types.responses import ResponseItemList
from support.responses_client import CALL, REPLY, WEATHER, creator, prompts, types_of
from support.serving import PATIENCE

from pyllm.server.api.responses import route as responses
from pyllm.server.api.responses.store import ResponseStore
from pyllm.server.api.responses.wire import InputItemList


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


def test_a_response_continues_another_without_its_instructions(create, harness):
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


def test_a_stream_is_stored_like_a_whole_answer(create, harness):
    events = create(input="One", stream=True)
    stored = harness.get(f"/v1/responses/{events[-1]['response']['id']}").json()
    assert stored == events[-1]["response"]
    create(input="Two", previous_response_id=stored["id"])
    assert prompts(harness)[1].index("One") < prompts(harness)[1].index(REPLY)


def test_a_conversation_continues_after_a_response_is_deleted(create, harness):
    first = create(input="One")
    second = create(input="Two", previous_response_id=first["id"])
    deleted = harness.run(lambda client: client.delete(f"/v1/responses/{first['id']}"))
    assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
    create(input="Three", previous_response_id=second["id"])
    assert "One" in prompts(harness)[2]
    assert harness.get(f"/v1/responses/{first['id']}").status_code == 404


def test_items_may_be_referenced_by_their_id(create, harness):
    message = create()["output"][0]
    create(input=[{"role": "user", "content": "Ah"}, {"type": "item_reference", "id": message["id"]}])
    assert REPLY in prompts(harness)[1]
    error = create(400, input=[{"type": "item_reference", "id": "msg_0"}])
    assert (error["param"], error["code"]) == ("input[0].id", "item_not_found")
    twice = [{"type": "item_reference", "id": message["id"]}, {"type": "item_reference", "id": message["id"]}]
    assert create(400, input=twice)["param"] == "input[1].id"


def test_items_of_a_response_are_read_once_and_without_logprobs(create, harness, long_context, monkeypatch):
    reads = []
    read = ResponseStore.read
    monkeypatch.setattr(ResponseStore, "read", lambda store, found: reads.append(found.id) or read(store, found))
    harness.engine.reply = f"Let me look. {CALL}"
    first = create(tools=[WEATHER], max_output_tokens=100, top_logprobs=2)
    assert first["output"][0]["content"][0]["logprobs"]
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "Rain"}
    second = create(input=[*references, result])
    assert reads == [first["id"]]
    listed = harness.get(f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in listed] == ["message", "function_call", "function_call_output"]
    assert listed[0]["content"] == [first["output"][0]["content"][0] | {"logprobs": []}]
    create(input="And?", previous_response_id=first["id"])
    assert reads.count(first["id"]) == 2
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


def test_a_response_that_is_not_stored_is_not_found(create, harness):
    answer = create(store=False)
    assert answer["store"] is False
    for path in (answer["id"], f"{answer['id']}/input_items", "resp_0"):
        assert harness.get(f"/v1/responses/{path}").json()["error"]["code"] == "response_not_found"
    error = create(400, previous_response_id=answer["id"])
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert harness.post("/v1/responses/resp_0/cancel").status_code == 404
    assert harness.run(lambda client: client.delete("/v1/responses/resp_0")).status_code == 404


def test_streaming_and_cancelling_a_stored_response_are_refused(create, harness):
    path = f"/v1/responses/{create()['id']}"
    assert harness.get(f"{path}?stream=true").json()["error"]["param"] == "stream"
    assert harness.get(f"{path}?stream=false&include[]=message.output_text.logprobs").status_code == 200
    assert harness.post(f"{path}/cancel").status_code == 400


@pytest.fixture
def broken(harness, monkeypatch):
    """A store that cannot be written or read once `break_down` is called, until `repair` is."""
    store = harness.service.responses
    works = {name: getattr(store, name) for name in ("_put", "_find", "_remove", "_probe")}

    async def fail(*arguments):
        raise OSError("the disk is gone")

    def change(repaired):
        for name, work in works.items():
            monkeypatch.setattr(store, name, work if repaired else fail)

    return SimpleNamespace(break_down=lambda: change(False), repair=lambda: change(True))


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_an_answer_that_cannot_be_stored_fails(create, harness, broken):
    """The end of an answer says whether it is stored; a request that finds the store down is refused at once."""
    broken.break_down()
    events = create(stream=True)
    assert types_of(events)[-2:] == ["output_item.done", "failed"]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["content"][0]["text"] == REPLY
    for fields in ({}, {"stream": True}, {"store": False, "previous_response_id": failed["id"]}):
        response = harness.post("/v1/responses", {"input": "Hi"} | fields)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "response_store_unavailable"
        assert int(response.headers["retry-after"]) > 0
    assert len(harness.engine.requests) == 1, "the others were refused before they cost anything"
    assert create(store=False)["status"] == "completed"
    for answer in (harness.get("/v1/responses/x"), harness.run(lambda client: client.delete("/v1/responses/x"))):
        assert answer.status_code == 503


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_whole_answer_that_cannot_be_stored_is_a_503(create, harness, broken):
    broken.break_down()
    assert create(503)["code"] == "response_store_unavailable"
    broken.repair()
    deadline = time.monotonic() + PATIENCE
    while (answer := harness.post("/v1/responses", {"input": "Hi"})).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert harness.get(f"/v1/responses/{answer.json()['id']}").json() == answer.json()
