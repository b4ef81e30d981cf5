"""What `Front` does in Ray Serve's proxy: routes, second tries, errors at the end of broken streams, bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pyllm.server.replicas.affinity import Route, decode_route, route_of_session

REPLICA, RETRY, EVENTS = (b"x-pyllm-replica", b"r1"), (b"x-pyllm-retry", b"1"), (b"content-type", b"text/event-stream")


class Serve:
    """An application as Serve's proxy is one; an answer whose last piece is None breaks off there."""

    def __init__(self, *answers: Any) -> None:
        self.routes: list[Route] = []
        self.bodies: list[bytes] = []
        self._answers = list(answers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sessions = [value.decode() for name, value in scope["headers"] if name == b"x-session-id"]
        self.routes.append(decode_route(sessions[-1] if sessions else ""))
        self.bodies.append((await receive())["body"])
        answer = self._answers.pop(0)
        if answer is None:
            return
        status, headers, pieces = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces):
            if piece is None:
                return
            await send({"type": "http.response.body", "body": piece, "more_body": number + 1 < len(pieces)})


class Caller:
    """A client of a `Front`: what it sends, and what it has got."""

    def __init__(self, serve: Serve) -> None:
        from pyllm.server.replicas.front import Front

        self.front = Front(serve)

    def post(self, path: str, body: Any, *headers: tuple[bytes, bytes], method: str = "POST") -> list[dict[str, Any]]:
        data = body if isinstance(body, list) else [json.dumps(body).encode()]
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in data]
        messages[-1]["more_body"] = False
        sent: list[dict[str, Any]] = []

        async def receive() -> Any:
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        asyncio.run(self.front(scope, receive, send))
        return sent


def text_of(sent: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


def test_a_body_is_read_first_and_sent_whole() -> None:
    serve = Serve((200, [REPLICA], [b"a", b"b"]))
    sent = Caller(serve).post("/v1//completions/", [b'{"prompt"', b': "Hi"}'])
    assert serve.bodies == [b'{"prompt": "Hi"}']
    assert len(serve.routes[0].marks) == 1
    assert (sent[0]["status"], text_of(sent), sent[-1]["more_body"]) == (200, b"ab", False)


def test_a_session_of_the_client_names_the_route() -> None:
    serve = Serve((200, [REPLICA], [b"a"]), (200, [REPLICA], [b"a"]))
    Caller(serve).post("/v1/completions", {"prompt": "Hi"}, (b"x-session-id", b"mine"))
    Caller(serve).post("/v1/completions", {"prompt": "Hi", "prompt_cache_key": "mine"})
    assert serve.routes == [route_of_session("mine")] * 2


def test_a_replica_that_refuses_is_passed_over() -> None:
    refusal = (503, [REPLICA, RETRY], [b"gone"])
    serve = Serve(refusal, (503, [(b"x-pyllm-replica", b"r2"), RETRY], [b"gone"]), (200, [REPLICA], [b"a"]))
    sent = Caller(serve).post("/v1/completions", {"prompt": "Hi"})
    assert [route.avoid for route in serve.routes] == [(), ("r1",), ("r1", "r2")]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (sent[0]["status"], text_of(sent)) == (200, b"a")
    last = Caller(Serve(*[refusal] * 5)).post("/v1/completions", {"prompt": "Hi"})
    assert (last[0]["status"], last[0]["headers"], text_of(last)) == (503, [REPLICA], b"gone")


@pytest.mark.parametrize(
    ("answer", "code"),
    [(None, "replica_dead"), ((404, [], [b"Path not found"]), "no_replica"), ((503, [], [b"Too busy"]), "no_replica")],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_an_answer_that_never_began_is_a_503(answer: Any, code: str, path: str) -> None:
    sent = Caller(Serve(answer)).post(path, {"prompt": "Hi"})
    assert sent[0]["status"] == 503
    assert json.loads(text_of(sent))["error"]["code"] == code
    assert (json.loads(text_of(sent)).get("type") == "error") == (path == "/v1/messages")


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    sent = Caller(Serve((200, [REPLICA, EVENTS], [b"data: 1\n\n", None]))).post("/v1/completions", {"prompt": "Hi"})
    first, second, rest = text_of(sent).split(b"\n\n")
    assert (first, rest) == (b"data: 1", b"")
    assert json.loads(second.removeprefix(b"data: "))["error"]["code"] == "replica_dead"
    assert sent[-1]["more_body"], "the server then closes the connection"
    whole = Caller(Serve((200, [REPLICA], [b"{", None]))).post("/v1/completions", {"prompt": "Hi"})
    assert text_of(whole) == b"{"
    assert whole[-1]["more_body"]


def test_a_kept_response_is_asked_of_its_replica() -> None:
    made = (200, [REPLICA], [b'{"id":"re', b'sp_7","object":"response"}'])
    serve = Serve(made, made, (200, [REPLICA], [b"{}"]), (200, [REPLICA], [b"{}"]))
    caller = Caller(serve)
    caller.post("/v1/responses", {"input": "Hi"})
    caller.post("/v1/responses", {"input": "More", "previous_response_id": "resp_7"})
    caller.post("/v1/responses/resp_7", {}, method="GET")
    caller.post("/v1/responses/resp_8", {}, method="GET")
    first, *others = serve.routes
    assert [(route.marks, route.pinned) for route in others] == [(first.marks, True), (first.marks, True), ((), False)]


def test_bodies_have_a_bound() -> None:
    serve = Serve()
    sent = Caller(serve).post("/v1/completions", [b" " * 2**20] * 9)
    assert (sent[0]["status"], json.loads(text_of(sent))["error"]["code"]) == (413, "body_too_large")
    assert serve.bodies == []


def test_other_routes_pass_untouched() -> None:
    serve = Serve((404, [], [b"of another application"]), None)
    assert text_of(Caller(serve).post("/other/v1/completions", {})) == b"of another application"
    assert Caller(serve).post("/v1/files", {}) == []
    assert serve.routes == [Route()] * 2
