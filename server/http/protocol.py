"""From a connection's bytes to requests: uvicorn's protocol with limits for slow clients, headers and connections."""

from __future__ import annotations

import asyncio
import select
import sys
from functools import partial
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .connection_limits import ConnectionMonitor, ProgressTimer, Wait
from .errors import ApiError, encode_json, unavailable
from .middleware import CONTEXT, RequestContext

MAX_HEADER_BYTES = 64 * 2**10
PIECE_BYTES = 16 * 2**10  # header size is checked once a piece, so headers can exceed the limit by up to one piece
MAX_UNREAD = 65536  # how many tokens a client may lag behind its stream; tokens with log-probabilities count more


class _Transport:
    """Discards writes made after a disconnect that the response has not noticed; uvloop's transport would raise."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._real = transport

    def write(self, data: bytes) -> None:
        if not self._real.is_closing():
            self._real.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def _answer_without_chunks(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run `app` for an HTTP/1.0 client: a response of unknown length ends when the connection closes."""
    is_delimited = True

    async def send_unchunked(message: Message) -> None:
        nonlocal is_delimited
        while cycle.flow.write_paused and not cycle.disconnected:  # now, so that the length is still right below
            await cycle.flow.drain()
        if message["type"] == "http.response.start":
            is_delimited = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if is_delimited else False
        elif not is_delimited:  # uvicorn subtracts the piece, and compares the rest at the end
            cycle.expected_content_length = sys.maxsize if message.get("more_body") else len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_unchunked)


class HttpProtocol(HttpToolsProtocol):
    """One connection. `cycle` is the request that was received last, `pipeline` those that wait to be answered.

    As in uvicorn, the pipeline is filled on the left, and its next request is the rightmost. The base class is private
    to uvicorn, so pyproject.toml pins the minor version that the tests ran against.
    """

    def __init__(self, *arguments: Any, monitor: ConnectionMonitor, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.connections: set[Any]
        self._monitor = monitor
        self._header_bytes = 0  # of incomplete headers
        self._refusal: ApiError | None = None  # to send after the responses to the requests before it
        self._answering: RequestResponseCycle | None = None
        self._received = 0  # bytes
        self._resumed = 0  # how many times the write buffer has drained
        self._timer = ProgressTimer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, in place of an idle one if necessary, or refuse it."""
        super().connection_made(cast(asyncio.Transport, _Transport(transport)))
        now = self.loop.time()
        if len(self.connections) > self._monitor.limits.connections and not self._monitor.evict_idle(now):
            self._refuse(unavailable("The server has too many connections.", "too_many_connections"))
        else:
            self._monitor.idle[self] = now

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, and measure incomplete headers."""
        if self._refusal is not None:
            return
        self._monitor.idle.pop(self, None)
        self._received += len(data)
        for start in range(0, len(data), PIECE_BYTES):
            piece, scope = data[start : start + PIECE_BYTES], self.scope
            self._parse(piece)
            if self.transport.is_closing() or self._refusal is not None:
                return
            before = self._header_bytes if self.scope is scope else 0  # another request has begun in this piece
            self._header_bytes = before + len(piece) if self._in_header else 0
            if self._header_bytes > MAX_HEADER_BYTES:
                message = f"The request headers are larger than {MAX_HEADER_BYTES} bytes."
                self._refuse(ApiError(431, message, code="headers_too_large"))
                return

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as end_of_header:
                    data = data[end_of_header.args[0] :]
                    self._ignore_upgrade()
        except (HttpParserError, HttpParserUpgrade):
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _ignore_upgrade(self) -> None:
        """Parse the request again without its `Upgrade` header, so that it is answered in HTTP/1.1.

        Java's HTTP client sends this header with every request. The parser would treat the body as the offered
        protocol, so a new parser gets the other headers, and then the body. CONNECT raises `HttpParserUpgrade` again,
        and is refused with a 400.
        """
        lines = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        method, version = self.scope["method"].encode(), self.scope["http_version"].encode()
        head = b"\r\n".join([b"%s %s HTTP/%s" % (method, self.url, version), *lines, b"\r\n"])
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does, to answer first
        self.parser.feed_data(head)

    def _should_upgrade(self) -> bool:
        """Keep uvicorn from answering a request with an `Upgrade` header before `_ignore_upgrade` restarts it."""
        return True

    def on_headers_complete(self) -> None:
        """Answer a request, or queue it behind those before it."""
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = partial(_answer_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Continue with the next request, or send the refusal that waits for the last response."""
        was_last = not self.pipeline
        if not was_last:
            self._answering = self.pipeline[-1][0]
        super().on_response_complete()
        if was_last:
            if self._refusal is not None:
                self._refuse(self._refusal)
            elif not self._in_header and not self.transport.is_closing():
                self._monitor.idle[self] = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._monitor.idle.pop(self, None)
        super().connection_lost(exc)
        self._disconnect()

    def _disconnect(self) -> None:
        """Stop requests that are being answered, or are waiting to be, from writing."""
        for cycle in (self._answering, self.cycle, *(queued for queued, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def resume_writing(self) -> None:
        self._resumed += 1
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP in the same shape as every other error."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error response and close the connection; if a response is already partly sent, just close.

        If complete requests are still to be answered, they are answered first, and nothing more is read.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            if cycle.more_body:  # the refused request itself, which is the last in the queue
                self.pipeline.popleft()
            self._refusal = error
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = encode_json(error.body)
            head = STATUS_LINE[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
            head += b"".join(f"{name}: {value}\r\n".encode() for name, value in error.headers.items())
            self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        self._disconnect()
        self.transport.close()

    @property
    def _in_header(self) -> bool:
        """Whether headers have begun that are not complete."""
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    @property
    def _is_answered(self) -> bool:
        """Whether the request that was received last is answered, and no other has begun."""
        return self.cycle is not None and self.cycle.response_complete and not self._in_header

    def _awaited(self) -> Wait | None:
        """Return what the connection is waiting for the client to do, or None if it is not waiting for the client."""
        unsent = self.transport.get_write_buffer_size()
        if self.flow.write_paused or (self.transport.is_closing() and unsent):
            return Wait("write", self._resumed, -unsent)
        if self.transport.is_closing() or self.pipeline or self._refusal is not None:
            return None
        if self.cycle is None or self._in_header:
            return Wait("header", self.scope)
        if self.cycle.more_body:
            # While reading is paused, the delay is ours. After an early response, the rest of the body does not count
            # as progress.
            progress = 0 if self._is_answered else self._received
            return None if self.flow.read_paused else Wait("body", self.cycle, progress)
        if self.cycle.response_complete and self.timeout_keep_alive_task is None:
            return Wait("header", self.cycle)  # the client has sent bytes that do not begin a request
        return None

    def check(self, now: float) -> str | None:
        """Close the connection if its client is gone, too slow or too far behind; return the reason."""
        if self.flow.read_paused and self._is_hung_up():
            self.transport.abort()
            return "the client hung up"
        wait = self._awaited()
        timeout = self._timer.expired(wait, self._monitor.limits, now)
        if wait is not None and wait.phase == "write":
            if self._unread() > MAX_UNREAD:
                self.transport.abort()
                return f"the client was more than {MAX_UNREAD} tokens behind its stream"
            if timeout is not None:
                self.transport.abort()
                return f"the client read nothing of its response for {timeout:g} s"
        if wait is None or timeout is None:
            return None
        if self.scope is None or self._is_answered:
            self.transport.close()
            return f"no request within {timeout:g} s"
        reason = f"the request's {wait.phase} did not arrive within {timeout:g} s"
        self._refuse(ApiError(408, f"{reason[0].upper()}{reason[1:]}.", code="request_timeout"))
        return reason

    def close_idle(self) -> bool:
        """Abort the connection, as a clean TLS close would wait for the client; False if something is left to send."""
        if self.transport.get_write_buffer_size():
            return False
        self.transport.abort()
        return True

    def _is_hung_up(self) -> bool:
        """Whether the client has disconnected, which nothing else shows while reading is paused."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def _unread(self) -> int:
        """How many tokens a streaming client lags behind."""
        context = self._answering.scope.get(CONTEXT) if self._answering is not None else None
        generation = context.generation if isinstance(context, RequestContext) else None
        return generation.unread if generation is not None else 0
