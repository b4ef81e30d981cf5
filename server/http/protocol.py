"""One HTTP connection with its limits: uvicorn knows none for slow clients, large headers or many connections.

Nothing is timed per request. A look around once in a while finds the connections on which something takes too long.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import select
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .context import RequestContext
from .errors import ApiError, encode_json, unavailable

if TYPE_CHECKING:
    from ..flags import ServerConfig

logger = logging.getLogger("pyllm.server")

MAX_HEADER_BYTES = 64 * 2**10
PIECE_BYTES = 16 * 2**10
"""Headers are measured in pieces of this size, so by as much they may be larger."""
LEAST_PROGRESS = 4096
"""Bytes that a body, or an answer that is held up, must come on by within its time."""
MAX_UNREAD = 65536
"""Tokens that a stream's client may be behind; those with log-probabilities count more."""
UNSENT_BYTES = 128 * 2**10
"""What the system takes of an answer before the client does, so that we see who does not read."""
LEAST_REST = 0.5
"""Seconds that a connection must have rested to make room: the request of a new one may still be on its way."""
MOST_UNSENT = 16
"""Resting connections that are looked at for one that has nothing left to send."""
SPARE_FILES = 128
"""Open files that are no connections."""


@dataclass(slots=True)
class ConnectionLimits:
    """What the connections of a server may do, and the look around that keeps them to it; times are in seconds.

    Attributes:
        header: from the opening of a connection, or a request's first byte, to the end of its headers.
        body: in which a request's body must come on.
        write: in which a client must take something of an answer that waits for it.
        connections: how many may be open.
        resting: those between two requests, or before the first, and since when; who has rested longest is the first.
    """

    header: float
    body: float
    write: float
    connections: int
    resting: dict[HttpProtocol, float] = field(default_factory=dict)
    _closed: Counter[str] = field(default_factory=Counter)
    _timer: asyncio.TimerHandle | None = None

    def watch(self, connections: set[Any]) -> None:
        """Go on looking around until there is no connection left."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.interval, self._look, connections)

    @property
    def interval(self) -> float:
        """Between two looks: by as much a limit may be late."""
        return min(1.0, self.header / 4, self.body / 4, self.write / 4)

    def make_room(self) -> bool:
        """Close a connection that rests, so that a new one can have its place; False where there is none."""
        now = asyncio.get_running_loop().time()
        for connection, since in list(islice(self.resting.items(), MOST_UNSENT)):
            if now - since < LEAST_REST:
                break
            del self.resting[connection]
            if not connection.transport.get_write_buffer_size():
                connection.transport.abort()  # HTTPS would wait for the client to agree
                self._closed["it rested, and another needed its place"] += 1
                return True
            self.resting[connection] = now  # what waits to be sent still needs it
        return False

    def _look(self, connections: set[HttpProtocol]) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        self._closed.update(reason for connection in list(connections) if (reason := connection.check(now, self)))
        for reason, count in self._closed.items():
            logger.info("Closed %d connection(s): %s", count, reason)
        self._closed.clear()
        if connections:
            self.watch(connections)


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    """The limits of the flags; of open files, which each connection is, this process may have as many as it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            logger.warning("The system allows %d open files: at most %d connections.", soft, max(soft - SPARE_FILES, 1))
    most = config.max_connections if soft == resource.RLIM_INFINITY else max(min(needed, soft) - SPARE_FILES, 1)
    return ConnectionLimits(config.header_timeout, config.body_timeout, config.write_timeout, most)


class _Transport:
    """A connection that takes what is written to it after its end, and drops it.

    Between a connection's end and the moment at which its answers hear of it, they may write once more; uvloop's own
    transport raises an error then.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._real = transport

    def write(self, data: bytes) -> None:
        """Write, if anybody is there."""
        if not self._real.is_closing():
            self._real.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class HttpProtocol(HttpToolsProtocol):
    """A connection of uvicorn's that ends when its client is too slow or sends too large a header."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._header_bytes = 0  # of one that is not complete yet
        self._refusal: ApiError | None = None  # of what followed requests that are still to be answered
        self._answered: Any = None  # the request whose turn it is; `cycle` is the one that came last
        self._received = 0
        self._resumed = 0
        self._phase: tuple[str, object] = ("", None)
        self._since = 0.0
        self._begun_at = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if need be in the place of one that rests, or refuse it where all are at work."""
        super().connection_made(cast(asyncio.Transport, _Transport(transport)))
        self._limits.watch(self.connections)
        if len(self.connections) > self._limits.connections and not self._limits.make_room():
            self._refuse(unavailable("The server has too many connections.", "too_many_connections"))
        else:
            self._limits.resting[self] = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Read on, in pieces where a header might be too large."""
        if self._refusal is not None:
            return
        self._limits.resting.pop(self, None)
        self._received += len(data)
        if len(data) <= PIECE_BYTES and not self._header_bytes:
            self._parse(data)
            if self.cycle is None or self.cycle.scope is not self.scope:
                self._header_bytes = len(data)
            return
        for start in range(0, len(data), PIECE_BYTES):
            piece, before = data[start : start + PIECE_BYTES], self.scope
            self._parse(piece)
            if self.transport.is_closing() or self._refusal is not None:
                return
            if not self._in_header:
                self._header_bytes = 0
            elif self.scope is before:
                self._header_bytes += len(piece)
            else:  # of another request than the one that the piece began with
                self._header_bytes = len(piece)
            if self._header_bytes > MAX_HEADER_BYTES:
                message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes."
                self._refuse(ApiError(431, message, code="headers_too_large"))
                return

    def _parse(self, data: bytes) -> None:
        """Read requests."""
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
        """Begin a request that asks for another protocol anew, without the question: it is answered in HTTP/1.1.

        Java's client asks with every request. The parser takes what follows the header for that protocol, so another
        one is given the header without the question, and reads the body. CONNECT asks by itself, so it ends in
        `HttpParserUpgrade` once more.
        """
        lines = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        method, version = self.scope["method"].encode(), self.scope["http_version"].encode()
        head = b"\r\n".join([b"%s %s HTTP/%s" % (method, self.url, version), *lines, b"\r\n"])
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does, to answer first
        self.parser.feed_data(head)

    def _should_upgrade(self) -> bool:
        """Whether a request is left alone that asks for another protocol, which it is until it has begun anew."""
        return True

    def on_headers_complete(self) -> None:
        """Begin to answer a request, or let it wait for those before it."""
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle

    def on_response_complete(self) -> None:
        """Go on with the next request, or with the refusal of what followed the last one."""
        was_last = not self.pipeline
        if not was_last:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()
        if was_last:
            if self._refusal is not None:
                self._refuse(self._refusal)
            elif not self._in_header and not self.transport.is_closing():
                self._limits.resting[self] = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of it, also one that others follow already."""
        self._limits.resting.pop(self, None)
        super().connection_lost(exc)
        self._disconnect()

    def _disconnect(self) -> None:
        """Whoever answers on this connection, or waits to, must not write to it any more."""
        for cycle in [self._answered, self.cycle, *(waiting for waiting, _ in self.pipeline)]:
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def resume_writing(self) -> None:
        """Note that the client has taken what waited for it."""
        self._resumed += 1
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the same shape as every other error."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request and close; in the middle of an answer only close.

        Where requests that came whole before are still to be answered, they are first, and nothing more is read.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            if cycle.more_body:  # what is refused is itself in the queue, as its last
                self.pipeline.popleft()
            self._refusal = error
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = encode_json(error.body)
            head = STATUS_LINE[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
            for name, value in error.headers.items():
                head += f"{name}: {value}\r\n".encode()
            self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        self._disconnect()
        self.transport.close()

    @property
    def _in_header(self) -> bool:
        """Whether a header has begun that is not complete."""
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    def _what_is_awaited(self) -> tuple[str, object]:
        """What the client must do next, and an object that is another one as soon as it has done so."""
        if self.flow.write_paused or (self.transport.is_closing() and self.transport.get_write_buffer_size()):
            return "write", self._resumed
        if self.transport.is_closing():  # which takes HTTPS a moment
            return "", None
        if self.pipeline or self._refusal is not None:
            return "", None
        if self.cycle is None or self._in_header:
            return "header", self.scope
        if self.cycle.more_body:  # or an answer came first: then it is not known whether the rest has come
            # While we do not read (too much waits to be parsed), the client is not to blame.
            return ("", None) if self.flow.read_paused else ("body", self.cycle)
        if self.cycle.response_complete and self.timeout_keep_alive_task is None:
            return "header", self.cycle  # it has sent something that is no request
        return "", None

    def check(self, now: float, limits: ConnectionLimits) -> str | None:
        """Close the connection, and say why, if the client has been too slow until `now`, in the loop's time."""
        if self.flow.read_paused and self._is_hung_up:
            self.transport.abort()
            return "the client hung up"
        phase, mark = self._what_is_awaited()
        progress = -self.transport.get_write_buffer_size() if phase == "write" else self._received
        if (phase, mark) != self._phase:
            self._phase, self._since, self._begun_at = (phase, mark), now, progress
        if phase == "write" and self._unread > MAX_UNREAD:
            self.transport.abort()
            return f"the client was more than {MAX_UNREAD} tokens behind its stream"
        limit = {"header": limits.header, "body": limits.body, "write": limits.write}.get(phase)
        if limit is None or now - self._since < limit:
            return None
        answered = self.cycle is not None and self.cycle.response_complete and not self._in_header
        if progress - self._begun_at >= LEAST_PROGRESS and (phase == "write" or (phase == "body" and not answered)):
            self._since, self._begun_at = now, progress
            return None
        if phase == "write":
            self.transport.abort()
            return f"the client took nothing of its answer for {limit:g} s"
        if self.scope is None or answered:
            self.transport.close()
            return f"no request within {limit:g} s"
        reason = f"the request's {phase} did not arrive within {limit:g} s"
        self._refuse(ApiError(408, f"{reason[0].upper()}{reason[1:]}.", code="request_timeout"))
        return reason

    @property
    def _is_hung_up(self) -> bool:
        """Whether the client has gone, which reading would tell, but not while requests wait for those before them."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    @property
    def _unread(self) -> int:
        """How far the client of a stream is behind, in tokens."""
        if self._answered is None or (context := RequestContext.find(self._answered.scope)) is None:
            return 0
        return context.generation.unread if context.generation is not None else 0
