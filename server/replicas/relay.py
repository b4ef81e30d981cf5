"""Passes an HTTP request to a server on a Unix socket, and its answer back, byte for byte and as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httptools
import msgspec
from starlette.types import Message, Receive, Scope, Send

from ..http.budget import MAX_BODY_BYTES
from ..http.errors import unavailable
from .affinity import PREFIX

READ_BYTES = 2**16
REPLICA_HEADER, RETRY_HEADER = b"x-pyllm-replica", b"x-pyllm-retry"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
JOIN_SECONDS = 0.02  # a piece costs Ray 1 ms of processor time, however short it is; slower streams do not notice
HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    b"content-length",
}  # fmt: skip
"""Headers of a connection, not of a request; the length is written again."""
WRITTEN_BY_FRONT = {b"connection", b"keep-alive", b"transfer-encoding", b"date"}
GONE = {"engine_dead", "engine_restarting", "shutting_down", "loading"}
"""The codes of refusals after which another replica may be asked."""
_ERROR = msgspec.json.Decoder(dict[str, Any])


class Head:
    """The status and headers of an answer, and what has arrived of its body."""

    def __init__(self, method: str) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.has_head = self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._without_body = method == "HEAD"

    def feed(self, data: bytes) -> None:
        """Read more of the answer; raise `ConnectionError` if it is none."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionError(f"The server's answer cannot be read: {error}.") from None

    @property
    def status(self) -> int:
        """The answer's status, once `has_head`."""
        return int(self._parser.get_status_code())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Know that all headers have arrived."""
        self.has_head = True
        self.is_complete = self._without_body

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        self.body.append(data)

    def on_message_complete(self) -> None:
        """Know that all has arrived."""
        self.is_complete = True

    def take_body(self) -> bytes:
        """Return what has arrived of the body since the last call."""
        data = b"".join(self.body)
        self.body.clear()
        return data


class Relay:
    """An ASGI application that asks the server at `path`; `replica` is its name in the answers' headers."""

    def __init__(self, path: str, replica: str) -> None:
        self._path, self._replica = path, replica.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; cancelling it closes the connection, so that the server stops working for it."""
        body = await read_body(receive)
        if body is None:
            return
        request_id = dict(scope["headers"]).get(b"x-request-id")
        writer: asyncio.StreamWriter | None = None
        head = Head(scope["method"])
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=READ_BYTES)
            writer.write(request_head(scope, len(body)) + body)
            await self._pass_on(reader, head, send, request_id)
        except OSError:
            if head.has_head:
                raise
            await self._refuse(send, retry=writer is None)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, head: Head, send: Send, request_id: bytes | None) -> None:
        started = is_stream = False
        while not head.is_complete:
            data = await reader.read(READ_BYTES)
            if not data:
                raise ConnectionError("The server closed the connection.")
            head.feed(data)
            if not head.has_head or (head.status == 503 and not head.is_complete):
                continue
            chunk = head.take_body()
            if not started:
                await send(self._start(head, chunk, request_id))
                started, is_stream = True, (b"content-type", EVENT_STREAM) in head.headers
            if chunk or head.is_complete:
                await send({"type": "http.response.body", "body": chunk, "more_body": not head.is_complete})
                if is_stream and not head.is_complete:
                    await asyncio.sleep(JOIN_SECONDS)  # what arrives meanwhile is one piece

    def _start(self, head: Head, body: bytes, request_id: bytes | None) -> Message:
        """Return the message with the answer's headers, without those that Serve's proxy writes itself."""
        headers = [
            (name, value) for name, value in head.headers
            if name not in WRITTEN_BY_FRONT and (name, value) != (b"x-request-id", request_id)
        ]  # fmt: skip
        headers.append((REPLICA_HEADER, self._replica))
        if head.status == 503 and _code(body) in GONE:
            headers.append((RETRY_HEADER, b"1"))
        return {"type": "http.response.start", "status": head.status, "headers": headers}

    async def _refuse(self, send: Send, *, retry: bool) -> None:
        """Answer for a server that has ended; a request that it had not seen may go to another replica."""
        error = unavailable("The replica that was to answer this request has ended.", "replica_dead")
        headers = [(b"content-type", b"application/json"), (REPLICA_HEADER, self._replica)]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(RETRY_HEADER, b"1")] * retry
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": msgspec.json.encode(error.body)})


def _code(body: bytes) -> str:
    try:
        error = _ERROR.decode(body)["error"]
        return str(error["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


def request_head(scope: Scope, length: int) -> bytes:
    """Write the request line and the headers of a request whose body has this length."""
    target: bytes = scope.get("raw_path") or scope["path"].encode()
    if (root := scope.get("root_path", "").encode()) and target.startswith(root):
        target = target[len(root) :] or b"/"
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    lines = [scope["method"].encode() + b" " + target + b" HTTP/1.1", b"connection: close"]
    lines += [
        name + b": " + value for name, value in headers
        if name not in HOP_BY_HOP and not value.startswith(PREFIX.encode())
    ]  # fmt: skip
    if length or scope["method"] in ("POST", "PUT", "PATCH"):
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def read_body(receive: Receive) -> bytes | None:
    """Read a body, but no more than the server would refuse; None if the client has gone."""
    data, more = b"", True
    while more and len(data) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        data += message.get("body", b"")
        more = message.get("more_body", False)
    return data


async def fetch(path: str, target: str) -> tuple[int, bytes]:
    """GET from the server on the Unix socket at `path`; raise `OSError` if it does not answer."""
    head = Head("GET")
    reader, writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nhost: replica\r\nconnection: close\r\n\r\n".encode())
        while not head.is_complete:
            if not (data := await reader.read(READ_BYTES)):
                raise ConnectionError("The server closed the connection.")
            head.feed(data)
    finally:
        writer.transport.abort()
    return head.status, head.take_body()
