"""From a connection's bytes to requests: uvicorn's protocol with limits for slow clients, headers and connections."""

from __future__ import annotations

import asyncio
import re
import uuid
from functools import partial
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from .budget import MAX_BODY_BYTES, Hold
from .connection_monitor import ConnectionMonitor, ProgressTimer
from .errors import ApiError, encode_json, unavailable
from .http10 import answer_without_chunks
from .middleware import ANTHROPIC_ROUTES
from .slow_clients import SupervisedProtocol

MAX_HEADER_BYTES = 32 * 2**10  # of a request's head, or between two parts of a chunked body, trailers included
MAX_HEADERS = 100  # trailers included
MAX_LINE_BYTES = 8 * 2**10  # of the line with the method and the path
HEADER_OVERHEAD = 160  # bytes of memory that a header takes in addition to its text
PIECE_BYTES = 16 * 2**10  # the most read at a time, and so the most of a body that waits before a key is checked
MAX_DROPPED = MAX_BODY_BYTES  # of a body after its answer; below this, a client reads the answer and may stay connected
LINGER_SECONDS = 2.0  # of reading and dropping after an error response that ends the connection
PROTOCOLS = (b"HTTP/1.1", b"HTTP/1.0")
HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


class _Transport:
    """Counts written bytes, and discards writes after a disconnect, where uvloop's transport would raise."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._real = transport
        self.written = 0  # bytes
        self.receiving = False  # a body
        self.ended = False

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if not self.ended and not self._real.is_closing():
            self._real.write(data)

    def close(self) -> None:
        """Close; if the client may still be sending a body, after it had time to read the answer."""
        if self.receiving and not self.ended:
            self.end()
        else:
            self._real.close()

    def end(self) -> None:
        """Close after `LINGER_SECONDS`: closing while the client sends would discard the unread part of the answer."""
        self.ended = True
        if self._real.can_write_eof():
            self._real.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._real.close)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Reader(asyncio.BufferedProtocol):
    """Reads small pieces where uvloop would read 250 KB, which a client could fill with requests."""

    _buffer = memoryview(bytearray(PIECE_BYTES))  # of all connections: it is emptied before another is read

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        for name in ("connection_lost", "eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(protocol, name))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._protocol.data_received(bytes(self._buffer[:nbytes]))


class _Flow(FlowControl):
    """Does not resume reading while data waits to be parsed."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class HttpProtocol(SupervisedProtocol):
    """One connection, on which one request is answered at a time.

    Data after an unanswered request waits unparsed, so that a client cannot pile up requests. The base
    class is private to uvicorn, so pyproject.toml pins the minor version that the tests ran against.
    """

    def __init__(self, *arguments: Any, monitor: ConnectionMonitor, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.connections: set[Any]
        self.flow: _Flow
        self._wire: _Transport
        self._monitor = monitor
        self._phase = "idle"
        self.url = b""
        self._line = b""  # of the method and the path, until it is complete; then None
        self._line_complete = False
        self._unparsed = b""
        self._tail = b""  # of the parsed data, to find the end of a head that is split in two
        self._head_bytes = self._num_headers = 0  # of an incomplete head
        self._framing = 0  # bytes since the last byte of a chunked body
        self._body_left = 0  # of a body with a length
        self._dropped = 0  # bytes of a body since it was answered
        self._problem: ApiError | None = None  # with the request being parsed
        self._received = 0  # bytes
        self._num_requests = 0
        self._timer = ProgressTimer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, in place of an idle one if necessary, or refuse it."""
        transport.set_protocol(_Reader(self))
        self._wire = _Transport(transport)
        super().connection_made(cast(asyncio.Transport, self._wire))
        self.flow = _Flow(self.transport)
        now = self.loop.time()
        if len(self.connections) > self._monitor.limits.connections and not self._monitor.evict_idle(now):
            self._refuse(unavailable("The server has too many connections.", "too_many_connections"))
            self.transport.close()
        else:
            self._monitor.idle[self] = now

    def data_received(self, data: bytes) -> None:
        """Parse the data that arrived, up to the end of a request."""
        self._unset_keepalive_if_required()
        self._received += len(data)
        if not self._wire.ended:
            self._parse_requests(self._unparsed + data)
        elif (dropped := self._dropped + len(data)) > MAX_DROPPED:
            self.transport.close()
        else:
            self._dropped = dropped

    def _parse_requests(self, data: bytes) -> None:
        """Parse up to the end of a request, which is answered first; the rest waits."""
        start = 0
        while start < len(data) and not self._is_ending:
            if self._phase == "idle" and self.cycle is not None:
                break
            end = self._find_end(data, start)
            self._parse_piece(data[start:end])
            start = end
        self._tail = data[max(start - 3, 0) : start]
        self._unparsed = b"" if self._is_ending else data[start:]
        self.flow.held = bool(self._unparsed)
        uploading = self._phase == "body" and not self.cycle.response_complete
        if self._unparsed or (uploading and self.cycle.body):
            self.flow.pause_reading()  # until the application reads more
        self._charge()

    @property
    def _is_ending(self) -> bool:
        return self._wire.ended or self.transport.is_closing()

    def _find_end(self, data: bytes, start: int) -> int:
        """Return the end of the piece to parse next, which no request crosses."""
        if self._phase == "body" and self._body_left:
            return min(start + self._body_left, len(data))
        before = b"" if start else self._tail
        end = (before + data).find(b"\r\n\r\n", start)
        return len(data) if end < 0 else end + 4 - len(before)

    def _parse_piece(self, data: bytes) -> None:
        self._monitor.idle.pop(self, None)
        if self._phase == "body":
            self._framing += len(data)
            if self.cycle is not None and self.cycle.response_complete:
                self._dropped += len(data)
        else:
            self._head_bytes += len(data)
            self._problem = self._check_line(data)
        if self._problem is None and self._head_bytes <= MAX_HEADER_BYTES:
            self._parse(data)
        if max(self._head_bytes, self._framing) > MAX_HEADER_BYTES or self._num_headers > MAX_HEADERS:
            message = f"The headers and trailers are more than {MAX_HEADERS} or larger than {MAX_HEADER_BYTES} bytes."
            self._problem = ApiError(431, message, code="headers_too_large")
        if self._problem is not None:
            self._refuse(self._problem)
        elif self._dropped > MAX_DROPPED:
            self.transport.close()
            self._monitor.closed["the client kept sending a body after its answer"] += 1

    def _check_line(self, data: bytes) -> ApiError | None:
        """Add to the request's first line, and return its error, if any."""
        if self._line_complete:
            return None
        line, newline, _ = (self._line + data).lstrip(b"\r\n").partition(b"\n")
        self._line, self._line_complete = line, bool(newline)
        if len(line) > MAX_LINE_BYTES:
            return ApiError(414, f"The request line is longer than {MAX_LINE_BYTES} bytes.", code="uri_too_long")
        if newline and line.split(b" ")[-1].rstrip() not in PROTOCOLS:
            return _invalid("The request line must end with HTTP/1.1 or HTTP/1.0")
        return None

    def _parse(self, data: bytes) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as end_of_header:
                    if self._problem is not None or self._num_headers > MAX_HEADERS:
                        return
                    data = data[end_of_header.args[0] :]
                    self._ignore_upgrade()
        except (HttpParserError, HttpParserUpgrade):
            if self._problem is None:
                self.url = b""  # data that is not HTTP belongs to no route
                self.logger.warning("Invalid HTTP request received.")
                self._problem = _invalid("Invalid HTTP request received")

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

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._phase = "head"
        self._num_headers = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers, and headers beyond their number, are only counted."""
        self._num_headers += 1
        if self._phase == "head" and self._num_headers <= MAX_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Answer a request, unless its headers contradict HTTP."""
        self._problem = _check_headers(self.headers, self.parser.get_http_version())
        if self._problem is None and self._num_headers <= MAX_HEADERS:
            super().on_headers_complete()
        if self.cycle is not None:
            lengths = (value for name, value in self.headers if name == b"content-length")
            self._body_left = int(next(lengths, b"0"))
            self._phase = "body"
            self._wire.receiving = True
            if self._body_left > MAX_DROPPED:
                self.cycle.keep_alive = False
            self._head_bytes = self._framing = self._dropped = 0
            self._num_requests += 1

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = partial(answer_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        self._body_left -= len(body) if self._body_left else 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None:  # else it is refused, or the parser begins again without the `Upgrade` header
            super().on_message_complete()
            self._phase = "idle"
            self._wire.receiving = False
            self._line, self._line_complete = b"", False
            self._forget_answered()

    def on_response_complete(self) -> None:
        """Continue with the next request."""
        super().on_response_complete()
        self._forget_answered()
        if self._unparsed and not self._is_ending:
            self._unset_keepalive_if_required()
            self._parse_requests(self._unparsed)
            self.flow.resume_reading()

    def _forget_answered(self) -> None:
        """Release the request's headers once it is received and answered."""
        if self._phase == "idle" and self.cycle is not None and self.cycle.response_complete:
            self.cycle = self.scope = None  # type: ignore[assignment]  # as before the first request
            self.headers, self.url = [], b""
            if not self._is_ending:
                self._monitor.idle[self] = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._monitor.idle.pop(self, None)
        super().connection_lost(exc)
        self._monitor.release(len(self.connections))
        self._disconnect()

    def _disconnect(self) -> None:
        """Stop the request being answered from writing, and release the connection's memory."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        for hold in (self._hold, self._unsent):
            if hold is not None:
                hold.release()
        self._monitor.incomplete.pop(self, None)
        self._monitor.behind.pop(self, None)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP in the same shape as every other error."""
        self._refuse(_invalid(msg))

    def _refuse(self, error: ApiError) -> None:
        """Send an error response and close the connection; if a response has begun, just close."""
        if self.cycle is None or not self.cycle.response_started:
            is_anthropic = ANTHROPIC_ROUTES.encode() in self.url.partition(b"?")[0]
            body = encode_json(error.anthropic_body(uuid.uuid4().hex) if is_anthropic else error.body)
            head = STATUS_LINE[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
            head += b"".join(f"{name}: {value}\r\n".encode() for name, value in error.headers.items())
            self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        self._disconnect()
        self._unparsed = b""
        self._wire.end()
        self.flow.held = False
        self.flow.resume_reading()

    def _charge(self) -> None:
        """Count the memory of the part of a request that has arrived, until its application has it."""
        size = len(self._unparsed)
        if self._phase == "head":
            size += self._head_bytes + HEADER_OVERHEAD * self._num_headers
        if self._is_ending or not (size or self._hold):
            return
        if self._hold is None:
            self._hold = Hold(self._monitor.budget, "connections")
        if self._phase == "head":
            self._monitor.incomplete[self] = None
        else:
            self._monitor.incomplete.pop(self, None)
        try:
            self._hold.resize(size)
        except ApiError as error:
            self._refuse(error)


def _invalid(problem: str) -> ApiError:
    return ApiError(400, f"{problem.rstrip('.')}.", code="invalid_http")


def _check_headers(headers: list[tuple[bytes, bytes]], version: str) -> ApiError | None:
    """Return the error in headers that decide where a request goes and where its body ends (RFC 9112)."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        return _invalid(f"The request must have one Host header, but has {len(hosts)}")
    if hosts and not HOST.fullmatch(hosts[0]):
        return _invalid("The Host header is not a name or an address with a port")
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or version != "1.1"):
        return _invalid("The only transfer encoding is chunked, in HTTP/1.1")
    return None
