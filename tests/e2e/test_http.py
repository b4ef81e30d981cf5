"""Plain HTTP: every route's methods, headers and errors, and a stream's bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bodies import POSTS
from support.serving import PATIENCE, ServerProcess

STREAMS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
GETS = {
    "/v1/models": "application/json",
    "/v1/models/tiny": "application/json",
    "/v1/models/team/alias": "application/json",
    "/health": "application/json",
    "/ready": "application/json",
    "/ping": "application/json",
    "/is_sleeping": "application/json",
    "/version": "application/json",
    "/server_info": "application/json",
    "/get_model_info": "application/json",
    "/health_generate": "application/json",
    "/tokenizer_info": "application/json",
    "/metrics": "text/plain",
    "/openapi.json": "application/json",
    "/docs": "text/html",
    "/": "text/html",
}
"""Each route that shows something, with its content type."""
OPEN = ["/health", "/ready", "/ping", "/is_sleeping", "/metrics"]
"""What is shown without a key: no orchestrator has one."""
VOLATILE = {"id", "created", "created_at", "completed_at", "usage"}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object; Anthropic's routes put members of their own next to it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    content = answer.json()
    if answer.request.url.path.startswith("/v1/messages"):
        assert content["type"] == "error"
    else:
        assert content.keys() == {"error"}
    error = content["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1000
    assert str(Path(__file__).parents[2]) not in error["message"]
    assert ".py" not in error["message"]
    return error


@pytest.mark.parametrize("path", POSTS)
class TestEveryRouteThatTakesABody:
    def test_answers_in_json_with_the_callers_request_id(self, http: httpx.Client, path: str) -> None:
        answer = http.post(path, json=POSTS[path], headers={"x-request-id": "raw-7"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "raw-7"
        assert answer.headers["content-length"] == str(len(answer.content))

    def test_makes_a_request_id_where_none_is_sent(self, http: httpx.Client, path: str) -> None:
        ids = {http.post(path, json=POSTS[path]).headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2

    @pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
    def test_refuses_other_methods(self, http: httpx.Client, path: str, method: str) -> None:
        answer = http.request(method, path)
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "POST"

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff"])
    def test_refuses_what_is_no_json_object(self, http: httpx.Client, path: str, body: bytes) -> None:
        error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)

    def test_refuses_other_content_types_and_encodings(self, http: httpx.Client, path: str) -> None:
        body = json.dumps(POSTS[path]).encode()
        error_of(http.post(path, content=body, headers={"content-type": "text/plain"}), 415)
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        error_of(http.post(path, content=body, headers=headers), 415)

    def test_refuses_a_body_too_large(self, http: httpx.Client, path: str) -> None:
        large = json.dumps(POSTS[path] | {"user": "x" * (8 * 2**20)}).encode()
        error_of(http.post(path, content=large, headers={"content-type": "application/json"}), 413)

    def test_names_an_unknown_field(self, http: httpx.Client, path: str) -> None:
        error = error_of(http.post(path, json=POSTS[path] | {"colour": 1}), 400)
        assert error["param"] == "colour"
        assert "colour" in error["message"]

    def test_names_an_unknown_model(self, http: httpx.Client, path: str) -> None:
        error = error_of(http.post(path, json=POSTS[path] | {"model": "gpt-4o"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")

    def test_names_a_missing_field(self, http: httpx.Client, path: str) -> None:
        needed = next(name for name in ("messages", "prompt", "input", "tokens") if name in POSTS[path])
        error = error_of(http.post(path, json={k: v for k, v in POSTS[path].items() if k != needed}), 400)
        assert error["param"] == needed or needed in error["message"]

    def test_takes_null_for_every_optional_field(self, http: httpx.Client, path: str) -> None:
        page = http.get("/openapi.json").json()
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        nulls = dict.fromkeys(name for name in fields["properties"] if name not in POSTS[path])
        plain, decorated = (http.post(path, json=body) for body in (POSTS[path], nulls | POSTS[path]))
        assert decorated.status_code == 200, decorated.text
        same = [{k: v for k, v in answer.json().items() if k not in VOLATILE} for answer in (plain, decorated)]
        if path != "/v1/responses":  # its items have ids of their own
            assert same[0] == same[1]


@pytest.mark.parametrize("path", GETS)
class TestEveryRouteThatShowsSomething:
    def test_answers_with_its_content_type(self, http: httpx.Client, path: str) -> None:
        answer = http.get(path, headers={"x-request-id": "raw-8"})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(GETS[path])
        assert answer.headers["x-request-id"] == "raw-8"

    def test_refuses_other_methods(self, http: httpx.Client, path: str) -> None:
        answer = http.post(path, json={})
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/v2", "/v1/images/generations", "/v1/chat/completions/x", "/chat/completions", "/V1/models"]
)
def test_an_unknown_route_is_not_found_with_any_method(http: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert error_of(http.request(method, path), 404)["code"] == "unknown_url"


@pytest.mark.parametrize("path", STREAMS)
class TestEveryStream:
    def test_is_an_event_stream_that_no_proxy_holds_back(self, http: httpx.Client, path: str) -> None:
        answer = http.post(path, json=POSTS[path] | {"stream": True}, headers={"x-request-id": "raw-9"})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "raw-9"
        assert "no-store" in answer.headers["cache-control"]
        assert answer.headers["x-accel-buffering"] == "no"
        assert "content-length" not in answer.headers

    def test_is_made_of_events_and_nothing_else(self, http: httpx.Client, path: str) -> None:
        answer = http.post(path, json=POSTS[path] | {"stream": True})
        *events, end = answer.content.split(b"\n\n")
        assert end == b""
        for event in events:
            for line in event.split(b"\n"):
                assert line.startswith((b"data: ", b"event: ", b":"))
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    json.loads(line.removeprefix(b"data: "))

    def test_refuses_before_it_begins(self, http: httpx.Client, path: str) -> None:
        error = error_of(http.post(path, json=POSTS[path] | {"stream": True, "temperature": 9}), 400)
        assert error["param"] == "temperature"
        error_of(http.post(path, json=POSTS[path] | {"stream": True, "model": "x"}), 404)


def test_a_chat_streams_bytes(http: httpx.Client) -> None:
    """To the letter: role first, then content, then the end, then the counts, then the mark."""
    body = POSTS["/v1/chat/completions"] | {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"allowed_token_ids": [71], "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "b"})
    created = json.loads(answer.text.partition("\n")[0].removeprefix("data: "))["created"]
    head = f'"id":"chatcmpl-b","created":{created},"model":"tiny","object":"chat.completion.chunk"'

    def chunk(delta: str, reason: str = "null") -> str:
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'
        return f'data: {{{head},"choices":[{choice}],"usage":null}}'

    usage = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == 3
    first, *middle, last, counts, done, end = answer.text.split("\n\n")
    assert first == chunk('{"role":"assistant","content":""}')
    text = "".join(json.loads(m.removeprefix("data: "))["choices"][0]["delta"]["content"] for m in middle)
    assert len(text) == 3
    assert len(set(text)) == 1
    assert middle == [chunk(json.dumps({"content": m}, separators=(",", ":"))) for m in contents(middle)]
    assert last == chunk("{}", '"length"')
    assert json.loads(counts.removeprefix("data: ")) == json.loads(f'{{{head},"choices":[]}}') | {"usage": usage}
    assert (done, end) == ("data: [DONE]", "")


def contents(chunks: list[str]) -> list[str]:
    return [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"]["content"] for chunk in chunks]


def test_a_completion_streams_bytes(http: httpx.Client) -> None:
    body = POSTS["/v1/completions"] | {"stream": True, "allowed_token_ids": [71], "ignore_eos": True}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "b"})
    *chunks, last, done, end = answer.text.split("\n\n")
    created = json.loads(last.removeprefix("data: "))["created"]
    head = (
        f'data: {{"id":"cmpl-b","object":"text_completion","created":{created},"model":"tiny","choices":[{{"index":0,'
    )
    for chunk in chunks:
        assert chunk.startswith(head + '"text":"')
        assert chunk.endswith('","logprobs":null,"finish_reason":null}]}')
    assert last == head + '"text":"","logprobs":null,"finish_reason":"length"}]}'
    assert (done, end) == ("data: [DONE]", "")


def test_messages_stream_named_events(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=POSTS["/v1/messages"] | {"stream": True})
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in answer.text.split("\n\n")[:-1]]
    names = [event["event"] for event in events]
    assert names == [json.loads(event["data"])["type"] for event in events]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])


def test_responses_stream_named_and_numbered_events(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json=POSTS["/v1/responses"] | {"stream": True})
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in answer.text.split("\n\n")[:-1]]
    contents = [json.loads(event["data"]) for event in events if event["data"] != "[DONE]"]
    assert [event["event"] for event in events if event["data"] != "[DONE]"] == [c["type"] for c in contents]
    assert [content["sequence_number"] for content in contents] == list(range(len(contents)))
    assert contents[0]["type"] == "response.created"
    assert contents[-1]["type"] in ("response.completed", "response.incomplete")


@pytest.fixture(scope="module")
def locked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that wants a key."""
    flags = ("--dtype", "float32", "--api-key", "first", "--api-key", "second", "--served-model-name", "tiny")
    log = tmp_path_factory.mktemp("locked") / "log"
    with (
        ServerProcess(log, str(checkpoint), *flags) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/models/tiny", "/v1/nothing"])
def test_without_a_valid_key_everything_is_refused(locked: httpx.Client, path: str) -> None:
    body = {"json": POSTS[path]} if path in POSTS else {}
    method = "POST" if path in POSTS else "GET"
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"authorization": "Bearer"}):
        answer = locked.request(method, path, headers=headers, **body)
        assert error_of(answer, 401)["code"] == "invalid_api_key"
    for key in ("first", "second"):
        answer = locked.request(method, path, headers={"authorization": f"Bearer {key}"}, **body)
        assert answer.status_code == (404 if path == "/v1/nothing" else 200)


@pytest.mark.parametrize("path", OPEN)
def test_health_and_metrics_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_x_api_key_header_is_accepted(locked: httpx.Client) -> None:
    path = "/v1/messages/count_tokens"
    assert locked.post(path, json=POSTS[path], headers={"x-api-key": "first"}).status_code == 200
    error_of(locked.post(path, json=POSTS[path], headers={"x-api-key": "wrong"}), 401)


@pytest.mark.parametrize(
    "data", [b"no HTTP at all\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]
)
def test_what_is_no_http_is_refused_in_the_same_shape(server: ServerProcess, data: bytes) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"
