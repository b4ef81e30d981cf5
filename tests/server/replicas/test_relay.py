"""The way between Ray Serve and a replica's server: byte for byte, as it arrives, and closed when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pyllm.server.replicas.affinity import Route
from pyllm.server.replicas.relay import Relay, fetch

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = (
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: mine\r\ndate: now\r\n"
    b"Set-Cookie: a\r\nset-cookie: b\r\n\r\nok"
)


def scope(method: str = "POST", path: bytes = b"/v1/%C3%BC", **fields: Any) -> dict[str, Any]:
    return {
        "type": "http", "method": method, "path": "/v1/ü", "raw_path": path, "query_string": b"a=%20&b",
        "headers": [(b"host", b"x"), (b"x-odd", b"\xff\xfe"), (b"x-two", b"1"), (b"x-two", b"2"), (b"te", b"trailers"),
                    (b"x-request-id", b"mine"), (b"x-session-id", Route(("m",), (1,)).encode().encode())],
    } | fields  # fmt: skip


class Wire:
    """What a relay has sent to Serve, and the body that it gets from there."""

    def __init__(self, *bodies: bytes) -> None:
        self.sent: list[dict[str, Any]] = []
        self._bodies = list(bodies) or [b""]
        self._changed = asyncio.Event()

    async def wait_for(self, size: int) -> None:
        """Wait until so many bytes of a body have passed."""
        while len(self.body) < size:
            self._changed.clear()
            await self._changed.wait()

    async def receive(self) -> dict[str, Any]:
        body = self._bodies.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self._bodies)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self._changed.set()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return found

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@contextlib.asynccontextmanager
async def listening(path: Path, handler: Handler) -> AsyncIterator[str]:
    """A server whose connections `handler` answers."""
    tasks: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        await handler(reader, writer)
        writer.close()

    async with await asyncio.start_unix_server(handle, path / "socket"):
        yield str(path / "socket")
        await asyncio.gather(*tasks)


def relayed(tmp_path: Path, handler: Handler, request: dict[str, Any], wire: Wire) -> None:
    """Answer one request by a server that `handler` is."""

    async def run() -> None:
        async with listening(tmp_path, handler) as path:
            await Relay(path, "r1")(request, wire.receive, wire.send)

    asyncio.run(run())


def test_a_request_and_its_answer_keep_their_bytes(tmp_path: Path) -> None:
    seen = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(6))
        writer.write(OK)

    wire = Wire(b"abc", b"def")
    relayed(tmp_path, handler, scope(), wire)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    assert line == b"POST /v1/%C3%BC?a=%20&b HTTP/1.1"
    assert sorted(headers) == [
        b"connection: close", b"content-length: 6", b"host: x", b"x-odd: \xff\xfe", b"x-request-id: mine", b"x-two: 1",
        b"x-two: 2",
    ]  # fmt: skip
    assert body == b"abcdef"
    assert wire.sent[0]["status"] == 200
    assert wire.headers == [
        (b"content-length", b"2"), (b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"x-pyllm-replica", b"r1")
    ]  # fmt: skip
    assert (wire.body, wire.sent[-1]["more_body"]) == (b"ok", False)


def test_pieces_pass_as_they_arrive(tmp_path: Path) -> None:
    wire = Wire()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(5):
            writer.write(b"1\r\n%d\r\n" % number)
            await wire.wait_for(number + 1)
        writer.write(b"0\r\n\r\n")

    relayed(tmp_path, handler, scope(), wire)
    assert wire.body == b"01234"
    assert all(name != b"transfer-encoding" for name, _ in wire.headers)


def test_fast_pieces_of_a_stream_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.server.replicas.relay.JOIN_SECONDS", 0.5)
    wire = Wire()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncontent-length: 10\r\n\r\n0"
        )
        await wire.wait_for(1)  # the first one passes at once
        for number in range(1, 10):
            writer.write(b"%d" % number)
            await asyncio.sleep(0.001)

    relayed(tmp_path, handler, scope(), wire)
    assert wire.body == b"0123456789"
    assert len(wire.sent) < 8


def test_an_application_below_a_path_asks_without_it(tmp_path: Path) -> None:
    seen = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n"))
        writer.write(OK.removesuffix(b"ok" * seen[-1].startswith(b"HEAD")))

    relayed(tmp_path, handler, scope("GET", b"/llm/v1/models", root_path="/llm"), Wire())
    wire = Wire()
    relayed(tmp_path, handler, scope("HEAD", b"/v1/models", query_string=b""), wire)
    assert seen == [b"GET /v1/models?a=%20&b HTTP/1.1\r\n", b"HEAD /v1/models HTTP/1.1\r\n"]
    assert wire.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("answer", "status", "retry"),
    [
        (None, 503, True),
        (b"", 503, False),
        (b"HTTP/1.1 200", 503, False),
        (b"nonsense", 503, False),
        (b'HTTP/1.1 503 x\r\ncontent-length: 32\r\n\r\n{"error":{"code":"engine_dead"}}', 503, True),
        (b'HTTP/1.1 503 x\r\ncontent-length: 32\r\n\r\n{"error":{"code":"memory_full"}}', 503, False),
        (b"HTTP/1.1 503 x\r\ncontent-length: 2\r\n\r\n{}", 503, False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", None, False),
    ],
)
def test_a_server_that_has_ended_is_named(
    tmp_path: Path, answer: bytes | None, status: int | None, retry: bool
) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer or b"")
        await writer.drain()

    wire = Wire()
    if status is None:
        with pytest.raises(ConnectionError):
            relayed(tmp_path, handler, scope(), wire)
        assert wire.sent[-1]["more_body"]
        return
    if answer is None:
        asyncio.run(Relay(str(tmp_path / "none"), "r1")(scope(), wire.receive, wire.send))
    else:
        relayed(tmp_path, handler, scope(), wire)
    assert wire.sent[0]["status"] == status
    assert ((b"x-pyllm-retry", b"1") in wire.headers) == retry


def test_a_cancelled_request_closes_its_connection(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        assert await reader.read() == b""
        closed.set()

    async def run() -> None:
        wire = Wire()
        async with listening(tmp_path, handler) as path:
            task = asyncio.create_task(Relay(path, "r1")(scope(), wire.receive, wire.send))
            await wire.wait_for(1)
            task.cancel()
            await asyncio.wait([task])
            await closed.wait()

    asyncio.run(run())


def test_state_is_fetched_whole(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    async def run() -> tuple[int, bytes]:
        async with listening(tmp_path, handler) as path:
            return await fetch(path, "/health")

    assert asyncio.run(run()) == (200, b"ok")
