"""Requests that are sent before the ones before them are answered, and what follows them."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from support.hostile import Reply, parse_replies
from support.serving import PATIENCE, ServerProcess, posted

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
MANY = 3000
BODY = json.dumps({"prompt": "Hi", "max_tokens": 40, "ignore_eos": True}).encode()
COMPLETION = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)
BROKEN_BODIES = {"at once": b"zz\r\n", "later": b"2\r\n{}\r\nzz\r\n"}
LARGE = b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"a" * 1000) for n in range(100))
WRONG = {
    "no HTTP": (b"bad\r\n\r\n", 400),
    "a header too large": (LARGE, 431),
    "no method": (b"/ HTTP/1.1\r\n\r\n", 400),
}


def answers(server: ServerProcess, data: bytes, count: int) -> list[Reply]:
    """Send all at once, and read until so many answers have come or the server closes."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), PATIENCE) as connection:
        connection.sendall(data)
        received = b""
        while received.count(b"HTTP/1.1 ") < count and (piece := connection.recv(2**20)):
            received += piece
        while len(found := parse_replies(received, ended=False)) < count and (piece := connection.recv(2**20)):
            received += piece
        return found


@pytest.mark.parametrize("piece", [1460, MANY * len(HEALTH)])
def test_thousands_of_small_requests_are_answered_one_by_one(server: ServerProcess, piece: int) -> None:
    data = HEALTH * MANY
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        for at in range(0, len(data), piece):
            connection.sendall(data[at : at + piece])
            if piece < len(data):
                received += connection.recv(2**20)
        while received.count(b"HTTP/1.1 200") < MANY and (more := connection.recv(2**20)):
            received += more
    assert received.count(b"HTTP/1.1 200") == MANY


@pytest.mark.parametrize("wrong", WRONG)
def test_request_is_answered_before_garbage_behind_it(server: ServerProcess, wrong: str) -> None:
    data, status = WRONG[wrong]
    whole, refused = answers(server, COMPLETION % (len(BODY), BODY) + data + HEALTH, 3)
    assert whole.status == 200
    assert json.loads(whole.body)["usage"]["completion_tokens"] == 40
    assert refused.status == status
    assert json.loads(refused.body)["error"]["code"]


def test_pipelined_requests_are_answered_before_the_close(server: ServerProcess) -> None:
    replies = answers(server, HEALTH * 3 + COMPLETION % (len(BODY), BODY) + WRONG["no HTTP"][0], 6)
    assert [reply.status for reply in replies] == [200] * 4 + [400]


def test_stream_completes_whatever_is_sent_meanwhile(server: ServerProcess) -> None:
    with posted(server, stream=True, max_tokens=300) as connection:
        data = connection.recv(1)
        connection.sendall(WRONG["no HTTP"][0])
        while piece := connection.recv(2**20):
            data += piece
    stream, refused = parse_replies(data, ended=True)
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert refused.status == 400


@pytest.mark.parametrize("wrong", BROKEN_BODIES)
def test_request_is_answered_before_a_broken_body_behind_it(server: ServerProcess, wrong: str) -> None:
    whole, refused = answers(server, COMPLETION % (len(BODY), BODY) + CHUNKED + BROKEN_BODIES[wrong], 2)
    assert json.loads(whole.body)["usage"]["completion_tokens"] == 40
    assert refused.status == 400
    assert json.loads(refused.body)["error"]["code"] == "invalid_http"
