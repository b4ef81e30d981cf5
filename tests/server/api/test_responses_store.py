"""Stored responses: conversations that continue from them, the lists of their items, and the store."""

from __future__ import annotations

import json
import random
import string
import tracemalloc

import pytest
from openai.types.responses import ResponseItemList
from support.responses_client import CALL, REPLY, WEATHER, creator, prompts

from pyllm.server.api.responses import route as responses
from pyllm.server.api.responses.store import COMPRESS_UP_TO, ResponseStore, StoredResponse, decode_items
from pyllm.server.api.responses.wire import InputItemList
from pyllm.server.http.budget import MemoryBudget


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
    read = StoredResponse.read
    monkeypatch.setattr(StoredResponse, "read", lambda stored: reads.append(stored.item_ids) or read(stored))
    harness.engine.reply = f"Let me look. {CALL}"
    first = create(tools=[WEATHER], max_output_tokens=100, top_logprobs=2)
    assert first["output"][0]["content"][0]["logprobs"]
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "Rain"}
    second = create(input=[*references, result])
    ids = tuple(item["id"] for item in first["output"])
    assert reads == [ids]
    listed = harness.get(f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in listed] == ["message", "function_call", "function_call_output"]
    assert listed[0]["content"] == [first["output"][0]["content"][0] | {"logprobs": []}]
    create(input="And?", previous_response_id=first["id"])
    assert reads.count(ids) == 2
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


def response(number, size=100):
    text = "".join(random.Random(number).choices(string.ascii_letters + string.digits, k=size))
    return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": text}]}


@pytest.mark.parametrize("bounds", [{"max_responses": 40}, {"max_bytes": 9000}], ids=["number", "size"])
def test_a_client_that_fills_the_store_loses_only_its_own(bounds):
    store = ResponseStore(MemoryBudget(2**30), **bounds)
    for number, client in enumerate("abc"):
        store.put(response(number), b"[]", client, client)
    for number in range(10, 200):
        store.put(response(number), b"[]", "d", "d")
    assert [bool(store.find(f"resp_{number}", client)) for number, client in enumerate("abc")] == [True] * 3
    assert store.find("resp_199", "d")
    assert store.find("resp_10", "d") is None
    for number in range(200, 400):
        store.put(response(number), b"[]", "e", "e")
    kept = [sum(bool(store.find(f"resp_{number}", client)) for number in range(400)) for client in "de"]
    assert max(kept) - min(kept) <= 1, "two that want everything get the same"
    assert store.find("resp_0", "a")


def test_stored_responses_count_as_memory_and_give_way_to_it():
    budget = MemoryBudget(100_000)
    store = ResponseStore(budget)
    for number in range(200):
        store.put(response(number), b"[]", "a", "a")
    assert 50_000 < budget.by_kind["responses"] == budget.by_owner["a"] <= 100_000
    count = len(store)
    assert 0 < count < 200
    with budget.hold("requests", 100_000 - budget.used):
        store.put(response(200), b"[]", "a", "a")
        assert 0 < len(store) <= count
        assert budget.used <= 100_000
    for number in range(201):
        if store.find(f"resp_{number}", "a"):
            store.remove(f"resp_{number}")
    assert (len(store), store.size, budget.used) == (0, 0, 0)


def test_the_store_evicts_the_least_recently_used_response():
    store = ResponseStore(MemoryBudget(2**30), max_responses=3, max_bytes=2000)
    for number in range(3):
        store.put(response(number), b"[]")
    assert store.find("resp_0")
    store.put(response(3), b"[]")
    assert [bool(store.find(f"resp_{number}")) for number in range(4)] == [True, False, True, True]
    assert store.find_holder("msg_1") is None
    assert decode_items(store.find_holder("msg_3").read().output) == response(3)["output"]
    store.put(response(4, size=2200), b"[]")
    assert (len(store), store.size <= 2000) == (2, True)
    store.put(response(5, size=3000), b"[]")
    assert store.find("resp_5") is None
    for number in (3, 4):
        store.remove(f"resp_{number}")
    assert (len(store), store.size) == (0, 0)


def test_a_stored_response_takes_less_memory_than_its_json(create):
    body = create(input="How are you?")
    size = len(json.dumps(body))
    assert size > 1000
    store, count = ResponseStore(MemoryBudget(2**30)), 400
    tracemalloc.start()
    try:
        for number in range(count):
            output = [body["output"][0] | {"id": f"msg_{number}"}]
            store.put(body | {"id": f"resp_{number}", "output": output}, b'[{"role":"user","content":"How are you?"}]')
        taken = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    assert len(store) == count
    assert taken < 0.3 * size + 600, "what Python needs for names and objects takes a part too"
    assert store.size / count < 0.3 * size
    assert json.loads(bytes(store.find("resp_7").read().response))["output"][0]["id"] == "msg_7"


@pytest.mark.parametrize("size", [10, COMPRESS_UP_TO])
def test_a_stored_response_is_read_whole_compressed_or_not(size):
    store, items = ResponseStore(MemoryBudget(2**30)), [{"id": "msg_1", "text": "ü" * size}]
    store.put({"id": "resp_1", "output": items, "usage": None}, b'[{"content":"Hi"}]')
    stored = store.find("resp_1")
    response, input_, output = stored.read()
    assert json.loads(bytes(response)) == {"id": "resp_1", "output": items, "usage": None}
    assert decode_items(input_) == [{"content": "Hi"}]
    assert decode_items(output) == items
    assert stored.sizes == (len(response), len(input_), len(output))
    assert len(input_) == len(b'[{"content":"Hi"}]')
