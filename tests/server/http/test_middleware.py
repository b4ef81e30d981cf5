"""What every request meets: limits, keys, ids, states of the server, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from support.answers import error_of

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def test_request_id_is_taken_over_or_made(harness):
    response = harness.post(CHAT, {"messages": [USER]}, headers={"x-request-id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"
    assert response.json()["id"] == "chatcmpl-my-id.7"
    for bad in ("", "x" * 129, "tab\there"):
        made = harness.get("/v1/models", **{"x-request-id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32
    assert harness.get("/nowhere").headers["x-request-id"]


def test_one_request_id_used_twice_makes_two_requests(harness):
    for _ in range(2):
        assert harness.post(CHAT, {"messages": [USER]}, headers={"x-request-id": "same"}).status_code == 200
    assert len(harness.engine.requests) == 2  # the engine tells two of one name apart


def test_keys_guard_every_route_but_the_public_ones(make_harness):
    harness = make_harness(api_key=("first", "clé"))
    pages = ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json")  # no data, and browsers bring no header
    for path in ("/health", "/ready", "/ping", "/is_sleeping", "/metrics", *pages):
        assert harness.get(path).status_code == 200
    tricks = ("http://test//health", "http://test//docs", "/health/../v1/models", "/healthx", "/docs/x", "/docs/")
    guarded = ("/v1/models", "/version", "/server_info", "/get_model_info", "/health_generate", "/nowhere", *tricks)
    for path in guarded:
        response = harness.get(path)
        assert response.status_code == 401
        assert error_of(response).code == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer firs", "Bearer ", "Basic first", "first", "Bearer first second"):
        assert harness.get("/v1/models", authorization=wrong).status_code == 401
    assert harness.get("/v1/models", authorization="Bearer first").status_code == 200
    accented = {"authorization": "bearer clé".encode()}
    assert harness.run(lambda client: client.get("/v1/models", headers=accented)).status_code == 200


def test_priority_and_salt_reach_the_engine(harness):
    harness.chat(priority=-3, cache_salt="tenant")
    harness.complete(prompt=["a", "b"], priority=5, stream=True)
    harness.complete(priority=None, cache_salt=None)
    assert harness.engine.extras == [(-3, "tenant"), (5, None), (5, None), (0, None)]


def test_outputs_are_batched_and_kept_before_a_failure(harness):
    """The client is slow: while it takes the head, five pieces come, and then a failure."""
    harness.engine.fail_after = 6
    sent = []
    body = json.dumps({"prompt": "Hi", "stream": True}).encode()

    async def receive():
        if body not in sent:
            sent.append(body)
            return {"type": "http.request", "body": body}
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(harness.app(scope_of("/v1/completions"), receive, send), 5))
    (events,) = [message["body"].split(b"\n\n") for message in sent[1:] if message.get("body")]
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:5]) == "Hello"
    assert b"internal_error" in events[5]
    assert events[6:] == [b"data: [DONE]", b""]


def scope_of(path):
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip


def test_a_probe_does_not_wait_for_requests_that_came_together(harness):
    async def answer(path):
        received = iter([{"type": "http.request", "body": b'{"prompt": "Hi"}'}])

        async def receive():
            return next(received, None) or await asyncio.Event().wait()

        async def send(_):
            pass

        await harness.app(scope_of(path), receive, send)
        return len(harness.engine.requests)

    async def crowd():
        return await asyncio.gather(*(answer("/v1/completions") for _ in range(200)), answer("/health"))

    *_, started = asyncio.run(crowd())
    assert len(harness.engine.requests) == 200
    assert started < 50


async def disconnect(harness, path, fields, *, after=0.05):
    """Call the application as a server does, and hang up after some seconds; return what was sent until then."""
    sent = []
    messages = [{"type": "http.request", "body": json.dumps(fields).encode()}] if fields else []

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(after)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(harness.app(scope_of(path), receive, send), 5)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
def test_client_gone_aborts_every_choice(harness, stream, hold_after, caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    harness.engine.hold_after = hold_after
    fields = {"prompt": ["a", "b"], "n": 3, "stream": stream}
    sent = asyncio.run(disconnect(harness, "/v1/completions", fields))
    assert harness.engine.running == set()
    assert len(harness.engine.aborted) == 6
    assert harness.service.in_flight == 0
    assert bool(sent) == stream
    assert 'finished_reason="abort",model_name="org/tiny"} 6.0' in harness.get("/metrics").text
    assert " 499 " in caplog.records[-1].getMessage()


def test_client_gone_while_sending_the_body_is_no_error(harness, caplog):
    sent = asyncio.run(disconnect(harness, CHAT, None, after=0))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sent == []


def test_idle_streams_carry_comments(make_harness):
    harness = make_harness(sse_keep_alive_interval=0.02)
    harness.engine.hold_after = 0
    sent = asyncio.run(disconnect(harness, CHAT, {"messages": [USER], "stream": True}, after=0.2))
    assert b"".join(message.get("body", b"") for message in sent).count(b": keep-alive\n\n") >= 3


def test_log_line_has_status_and_tokens_but_no_text(harness, caplog):
    caplog.set_level(logging.DEBUG, logger="pyllm.server")
    harness.chat(messages=[{"role": "user", "content": "my secret"}], max_tokens=4, stream=True)
    line = caplog.records[-1].getMessage()
    assert "POST /v1/chat/completions 200" in line
    assert "completion_tokens=4" in line
    assert "secret" not in caplog.text
    harness.get("/b%0Ac")
    assert "\n" not in caplog.records[-1].getMessage()


def test_metrics_count_only_phases_that_happened(harness):
    harness.complete(max_tokens=1)
    harness.engine.hold_after = 0
    asyncio.run(disconnect(harness, "/v1/completions", {"prompt": "a"}))
    text = harness.get("/metrics").text
    for phase, count in (("queue", 1), ("prefill", 1), ("decode", 0)):
        assert f'pyllm:request_{phase}_time_seconds_count{{model_name="org/tiny"}} {count}.0' in text


@pytest.mark.parametrize("path", ["/v1/models", "/llm/v1/models"])
def test_root_path_works_stripped_and_unstripped(make_harness, path):
    harness = make_harness(root_path="/llm", api_key=("k",))
    assert harness.get(path, authorization="Bearer k").status_code == 200
    assert harness.get(path).status_code == 401
    assert harness.get("/llm/health").status_code == harness.get("/health").status_code == 200
    assert harness.get("/llmx/health", authorization="Bearer k").status_code == 404


@pytest.mark.parametrize("own", ["a tokens=1 status=500", 'say "x"', "a;b"])
def test_a_request_id_that_would_confuse_the_log_is_replaced(harness, own):
    assert harness.get("/version", **{"x-request-id": own}).headers["x-request-id"] != own


def test_proxies_path_prefix_does_not_hide_the_routes(make_harness, caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    harness = make_harness(api_key=("k",))
    transport = httpx.ASGITransport(app=harness.app, root_path="/llm")

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.get(path)).status_code for path in ("/llm/health", "/llm/v1/models")]

    assert asyncio.run(ask()) == [200, 401]
    assert "/llm/v1/models" in caplog.text
    assert "/llm/health" not in caplog.text, "the machines' own questions are for the debug level"


@pytest.mark.parametrize(
    ("flags", "address", "named"),
    [
        ({}, "10.0.0.1", ""),
        ({"fair_scheduling": True}, "10.0.0.1", "10.0.0.1"),
        ({"fair_scheduling": True}, "2001:db8:1:2:3:4:5:6%eth0", "2001:db8:1:2::/64"),
        ({"fair_scheduling": True}, "::ffff:10.0.0.1", "10.0.0.1"),
        ({"fair_scheduling": True}, None, ""),  # a Unix socket
    ],
)
def test_without_keys_clients_are_fair_by_address(make_harness, flags, address, named):
    harness = make_harness(**flags)

    async def ask(client):
        transport = httpx.ASGITransport(app=harness.app, client=(address, 1) if address else None)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            return await other.post(CHAT, json={"messages": [USER]})

    assert harness.run(ask).status_code == 200
    assert harness.engine.clients == [named]


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ({"api_key": ("one",)}, 1),
        ({"api_key": ("one", "two")}, 2),
        ({"api_key": ("one", "two"), "fair_scheduling": False}, 1),
        ({"api_key": ("one",), "fair_scheduling": True}, 1),
    ],
)
def test_several_keys_are_fair_clients(make_harness, flags, kinds):
    harness = make_harness(**flags)
    for key in flags["api_key"]:
        answer = harness.post(CHAT, {"messages": [USER]}, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    assert len(set(harness.engine.clients)) == kinds
    assert not {*flags["api_key"]} & {*harness.engine.clients}
