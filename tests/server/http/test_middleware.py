"""What every request meets: limits, keys, ids, states of the server, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import httpx
import pytest

from pyllm.engine.errors import EngineDeadError
from pyllm.server.api.fields import ErrorAnswer
from pyllm.server.chat.template import ChatTemplateError
from pyllm.server.http.errors import ApiError, to_api_error

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def error_of(response):
    return ErrorAnswer.model_validate_json(response.content).error


def test_long_texts_are_read_off_the_event_loop(harness, monkeypatch):
    threads = []
    encode = harness.tokenizer.encode

    def note(text, **options):
        if text.startswith("x"):
            threads.append(threading.current_thread() is threading.main_thread())
        return encode(text, **options)

    monkeypatch.setattr(harness.tokenizer, "encode", note)
    harness.engine.configure(max_model_len=10_000)
    harness.complete(prompt="x" * 5000)
    harness.complete(prompt="x")
    assert threads == [False, True]


def test_unknown_routes_and_methods_have_the_same_shape(harness):
    assert error_of(harness.get("/v2/nothing")).code == "unknown_url"
    assert harness.get("/health/").status_code == 404
    response = harness.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response).code == "method_not_allowed"


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
    for path in ("/health", "/ready", "/metrics", *pages):
        assert harness.get(path).status_code == 200
    tricks = ("http://test//health", "http://test//docs", "/health/../v1/models", "/healthx", "/docs/x", "/docs/")
    guarded = ("/v1/models", "/version", "/nowhere", *tricks)
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


def test_web_pages_of_other_origins_are_allowed_only_by_name(harness, make_harness):
    assert "access-control-allow-origin" not in harness.get("/v1/models", origin="http://a.example").headers
    opened = make_harness(allowed_origins=("http://a.example",), api_key=("k",))
    assert opened.get("/v1/models", origin="http://a.example").headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in opened.get("/v1/models", origin="http://b.example").headers


def test_states_of_the_server_show_in_health_and_ready(harness):
    assert harness.get("/health").status_code == harness.get("/ready").status_code == 200
    harness.service.draining = True
    assert harness.get("/health").status_code == 200
    assert error_of(harness.chat()).code == "shutting_down"
    harness.service.draining, harness.service.model = False, None
    assert harness.get("/health").status_code == harness.get("/metrics").status_code == 200
    for response in (harness.get("/ready"), harness.chat(), harness.get("/v1/models")):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert error_of(response).code == "loading"
    harness.service.model = harness.model
    harness.engine.error = "gone"
    for response in (harness.get("/health"), harness.get("/ready"), harness.complete()):
        assert response.status_code == 503
        assert error_of(response).code == "engine_dead"


def test_engine_that_dies_on_the_way_ends_answers_with_an_error(harness, events_of):
    async def die(client):
        task = asyncio.create_task(client.post(CHAT, json={"messages": [USER], "stream": True, "n": 2}))
        await asyncio.sleep(0.05)
        harness.engine.error = "gone"
        harness.engine.release.set()
        return await task

    harness.engine.hold_after = 3
    events = events_of(harness.run(die))
    assert events[-1]["error"]["code"] == "engine_dead"
    assert 'finished_reason="error",model_name="org/tiny"} 2.0' in harness.get("/metrics").text
    assert 'finished_reason="abort",model_name="org/tiny"} 0.0' in harness.get("/metrics").text


def test_failed_sequence_is_a_500_or_an_error_event(harness, events_of):
    harness.engine.fail_after = 2
    response = harness.chat(n=3)
    assert response.status_code == 500
    assert error_of(response).type == "server_error"
    assert harness.engine.running == set()
    assert events_of(harness.chat(n=3, stream=True))[-1]["error"]["code"] == "internal_error"
    assert harness.engine.running == set()


def test_a_fault_inside_is_a_500_that_tells_nothing(harness, monkeypatch, caplog):
    def fail(*_, **__):
        raise KeyError("secret detail")

    monkeypatch.setattr(harness.engine, "submit", fail)
    response = harness.chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_each_kind_of_failure_has_its_status():
    assert to_api_error(ChatTemplateError("no")).status == 400
    assert to_api_error(EngineDeadError("gone")).status == 503
    own = ApiError(418, "tea")
    assert to_api_error(own) is own


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_a_429_with_retry_after(harness, stream):
    harness.engine.most = 3
    response = harness.chat(n=4, stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    error = error_of(response)
    assert (error.type, error.code, error.param) == ("rate_limit_error", "queue_full", None)
    assert harness.engine.requests == [], "all or none"
    assert harness.chat(n=3, stream=stream).status_code == 200


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


def test_openapi_has_the_real_models_and_their_bounds(harness):
    schema = harness.get("/openapi.json").json()
    models = schema["components"]["schemas"]
    reference = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatCompletionRequest"
    temperature = models["ChatCompletionRequest"]["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    for model, field in (("ChatCompletionRequest", "n"), ("CompletionRequest", "prompt")):
        assert "1024" in models[model]["properties"][field]["description"]
    text = json.dumps(schema)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= models.keys()
    assert "HTTPValidationError" not in models


@pytest.mark.parametrize("path", ["/v1/models", "/llm/v1/models"])
def test_root_path_works_stripped_and_unstripped(make_harness, path):
    harness = make_harness(root_path="/llm", api_key=("k",))
    assert harness.get(path, authorization="Bearer k").status_code == 200
    assert harness.get(path).status_code == 401
    assert harness.get("/llm/health").status_code == harness.get("/health").status_code == 200
    assert harness.get("/llmx/health", authorization="Bearer k").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/", "/docs", "/v1/models"])
def test_whatever_can_be_got_can_be_asked_for_its_head(harness, path):
    answer = harness.run(lambda client: client.head(path))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == harness.get(path).headers["content-type"]


def test_a_page_of_another_origin_is_refused_in_our_words(make_harness):
    harness = make_harness(allowed_origins=("http://mine",))

    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return harness.run(lambda client: client.options("/v1/models", headers=headers))

    assert preflight("http://mine").status_code == 200
    refused = preflight("http://other")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "cors"
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("own", ["a tokens=1 status=500", 'say "x"', "a;b"])
def test_a_request_id_that_would_confuse_the_log_is_replaced(harness, own):
    assert harness.get("/version", **{"x-request-id": own}).headers["x-request-id"] != own


def test_the_version_has_a_route(harness):
    assert harness.get("/version").json()["version"]


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
