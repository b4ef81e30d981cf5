"""Requests that ask for another protocol are answered in HTTP/1.1, as if they had not asked.

Java's own client asks for HTTP/2 with every request over plain HTTP, one with a body too.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from support.bodies import POSTS
from support.hostile import Reply, parse_replies
from support.serving import PATIENCE, ServerProcess, wait_for

PATH = "/v1/completions"
BODY = json.dumps(POSTS[PATH]).encode()
JAVA = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABk\r\nupgrade: h2c\r\n"
WEBSOCKET = (
    b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
SEVERAL = b"UPGRADE: h2c, x/1\r\nConnection: keep-alive,UPGRADE\r\nUpgrade: y\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
HOSTILE = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def request(asked: bytes, body: bytes = BODY, line: bytes = b"POST /v1/completions HTTP/1.1", name: str = "") -> bytes:
    """A request with these lines in its header."""
    head = line + b"\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: %s\r\n" % name.encode()
    return head + asked + b"\r\n" + body


CHUNKS = b"transfer-encoding: chunked\r\n"
CHUNKED = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:], b""))


class Connection:
    """A connection on which requests are sent as bytes."""

    def __init__(self, url: str) -> None:
        address = httpx.URL(url)
        self.socket = socket.create_connection((address.host, address.port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def replies(self, count: int) -> list[Reply]:
        """So many answers, or fewer where the connection ends; whatever comes with them is in the list too."""
        while len(found := parse_replies(self._data, ended=False)) < count and (piece := self.socket.recv(2**20)):
            self._data += piece
        self._data = b""
        return found


@pytest.fixture
def connection(server: ServerProcess) -> Iterator[Connection]:
    """An open connection; its requests must leave no warning in the log."""
    said = len(server.settled_log())
    connection = Connection(server.url)
    with connection.socket:
        yield connection
    assert "WARNING" not in server.settled_log()[said:]


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    text: str = json.loads(reply.body)["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def expected(http: httpx.Client) -> str:
    text: str = http.post(PATH, json=POSTS[PATH]).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("asked", [JAVA, WEBSOCKET, SEVERAL], ids=["h2c", "websocket", "several"])
@pytest.mark.parametrize(("framing", "body"), [(LENGTH, BODY), (CHUNKS, CHUNKED)], ids=["length", "chunked"])
def test_the_request_is_answered_and_the_connection_stays(
    connection: Connection, expected: str, asked: bytes, framing: bytes, body: bytes
) -> None:
    for headers in (asked + framing, framing + asked, framing):
        connection.send(request(headers, body))
        (reply,) = connection.replies(1)
        assert text_of(reply) == expected
        assert "upgrade" not in reply.headers
        assert "close" not in reply.headers.get("connection", "")


@pytest.mark.parametrize(("framing", "body"), [(LENGTH, BODY), (CHUNKS, CHUNKED)], ids=["length", "chunked"])
def test_its_bytes_may_come_one_by_one(connection: Connection, expected: str, framing: bytes, body: bytes) -> None:
    data = request(JAVA + framing, body)
    connection.send(*(data[at : at + 1] for at in range(len(data))), request(framing, body))
    assert [text_of(reply) for reply in connection.replies(2)] == [expected] * 2


def test_others_may_follow_it_before_it_is_answered(connection: Connection, expected: str) -> None:
    plain, chunked = (LENGTH, BODY), (CHUNKS, CHUNKED)
    asked = [(JAVA, plain), (b"", chunked), (WEBSOCKET, chunked), (JAVA, plain), (b"", plain), (SEVERAL, plain)]
    data = [request(lines + framing, body, name=f"n{n}") for n, (lines, (framing, body)) in enumerate(asked)]
    for pieces in ([b"".join(data)], data, [b"".join(data)[:700], b"".join(data)[700:]]):
        connection.send(*pieces)
        replies = connection.replies(6)
        assert [reply.headers["x-request-id"] for reply in replies] == [f"n{n}" for n in range(6)]
        assert [text_of(reply) for reply in replies] == [expected] * 6


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: %d\r\n" % len(HOSTILE), HOSTILE),
        (CHUNKS, b"%x\r\n%s\r\n0\r\n\r\n" % (len(HOSTILE), HOSTILE)),
    ],
    ids=["length", "chunked"],
)
def test_a_request_in_its_body_is_none(connection: Connection, framing: bytes, body: bytes, split: bool) -> None:
    head, end = request(JAVA + framing, b"", name="outer"), request(LENGTH, BODY, name="next")
    connection.send(*([head, body, end] if split else [head + body + end]))
    replies = connection.replies(2)
    assert [reply.headers["x-request-id"] for reply in replies] == ["outer", "next"]
    assert [reply.status for reply in replies] == [400, 200]


def test_it_may_wait_until_its_body_is_wanted(connection: Connection, expected: str) -> None:
    connection.send(request(JAVA + LENGTH + b"expect: 100-continue\r\n", b""))
    assert connection.socket.recv(2**20) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(BODY)
    assert [text_of(reply) for reply in connection.replies(1)] == [expected]


def test_without_a_body_it_is_what_its_method_says(connection: Connection) -> None:
    for asked in (JAVA, WEBSOCKET):
        connection.send(request(asked, b"", b"GET /v1/models HTTP/1.1"), request(asked, b"", b"GET /x HTTP/1.1"))
        assert [reply.status for reply in connection.replies(2)] == [200, 404]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (JAVA.replace(b"connection: ", b"connection: close, "), b"POST /v1/completions HTTP/1.1"),
        (JAVA, b"POST /v1/completions HTTP/1.0"),
    ],
    ids=["1.1", "1.0"],
)
def test_a_connection_that_was_to_close_does(connection: Connection, expected: str, asked: bytes, line: bytes) -> None:
    connection.send(request(asked + LENGTH, line=line))
    assert [text_of(reply) for reply in connection.replies(2)] == [expected]


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        (LENGTH + CHUNKS, 400),
        (LENGTH + b"content-length: 3\r\n", 400),
        (b"content-length: -1\r\n", 400),
        (b"transfer-encoding: gzip\r\n", 400),
        (b"x-a: %s\r\n" % (b"a" * 85_000), 431),
    ],
    ids=["both framings", "two lengths", "negative length", "unknown coding", "large header"],
)
def test_what_is_refused_without_it_is_refused_with_it(server: ServerProcess, framing: bytes, status: int) -> None:
    for asked in (b"", JAVA):
        connection = Connection(server.url)
        with connection.socket:
            data = request(asked + framing)
            connection.send(data[:60_000])
            time.sleep(0.1 * (len(data) > 60_000))  # what is unread when the server closes takes its answer away
            connection.send(data[60_000:])
            assert [reply.status for reply in connection.replies(2)] == [status]


def test_a_tunnel_is_refused_and_nothing_behind_it_is_read(server: ServerProcess) -> None:
    for target in (b"x:1", b"http://x/health"):
        connection = Connection(server.url)
        with connection.socket:
            connection.send(b"CONNECT %s HTTP/1.1\r\nhost: x\r\n%s\r\n" % (target, JAVA) + HOSTILE)
            assert [reply.status for reply in connection.replies(2)] == [400]


def test_a_client_that_hangs_up_in_its_stream_is_noticed(server: ServerProcess, connection: Connection) -> None:
    body = json.dumps(POSTS[PATH] | {"max_tokens": 8000, "ignore_eos": True, "stream": True}).encode()
    connection.send(request(JAVA + b"content-length: %d\r\n" % len(body), body))
    wait_for(lambda: b"data: " in connection.socket.recv(2**20), "the stream to begin")
    connection.socket.close()
    server.wait_until_idle()
