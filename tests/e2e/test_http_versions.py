"""HTTP/1.0 clients, and connections that close after a response."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from support.bodies import POSTS
from support.serving import PATIENCE, ServerProcess

STREAMS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


def exchange(server: ServerProcess, path: str, version: str, body: dict | None = None, *headers: str) -> list[bytes]:
    """The status and headers of an answer, and after an empty line its body, up to the end of the connection."""
    url, data = httpx.URL(server.url), b"" if body is None else json.dumps(body).encode()
    head = [f"{'GET' if body is None else 'POST'} {path} HTTP/{version}", "host: x", *headers]
    head += [f"content-length: {len(data)}", "content-type: application/json"] if data else []
    with socket.create_connection((url.host, url.port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join([*head, "\r\n"]).encode() + data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer.lower().split(b"\r\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_on_a_connection_that_closes(server: ServerProcess, path: str, version: str) -> None:
    body = POSTS[path] | {"stream": True}
    lines = exchange(server, path, version, body, "connection: close")
    assert lines[0].endswith(b" 200 ok")
    head, text = lines[: lines.index(b"")], b"\n".join(lines[lines.index(b"") + 1 :])
    assert [line for line in head if line.startswith(b"connection:")] == [b"connection: close"]
    assert (b"transfer-encoding: chunked" in head) == (version == "1.1")
    assert text.startswith((b"data: ", b"event: ")) == (version == "1.0")
    if version == "1.0":
        assert text.endswith(b"\n\n")
        whole = httpx.post(f"{server.url}{path}", json=body, timeout=PATIENCE).text
        assert text.count(b"data: ") == whole.count("data: ")


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/", "/metrics", "/docs/swagger-ui.css", "/nowhere"])
def test_http_1_0_gets_whole_bodies(server: ServerProcess, path: str, connection: str) -> None:
    lines = exchange(server, path, "1.0", POSTS.get(path), f"connection: {connection}")
    head, body = lines[: lines.index(b"")], b"\r\n".join(lines[lines.index(b"") + 1 :])
    assert lines[0].endswith(b"404 not found" if path == "/nowhere" else b"200 ok")
    assert not [line for line in head if line.startswith(b"transfer-encoding")]
    assert b"content-length: %d" % len(body) in head
    assert [line for line in head if line.startswith(b"connection:")] == [b"connection: close"]


def test_a_long_stream_reaches_an_http_1_0_client_whole(server: ServerProcess) -> None:
    """So long that the client's reading pauses the server's writing."""
    fields = {"prompt": "Hi", "max_tokens": 500, "ignore_eos": True, "stream": True, "logprobs": 20}
    lines = exchange(server, "/v1/completions", "1.0", fields)
    events = b"\n".join(lines[lines.index(b"") + 1 :]).split(b"\n\n")
    assert events[-2:] == [b"data: [done]", b""]
    assert len(json.loads(events[0][6:])["choices"]) == 1
