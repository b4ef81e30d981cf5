"""A connection as `ConnectionMonitor` needs it: its wait, its client's speed, and how it gives way."""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import termios
from typing import Literal, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .budget import Hold, memory_full
from .connection_monitor import ConnectionMonitor, ProgressTimer, Wait
from .errors import ApiError
from .middleware import CONTEXT, RequestContext

MIN_BEHIND_SECONDS = 1.0  # before this, a client's reading speed is not known
MAX_UNREAD = 65536  # how many tokens a client may lag behind its stream; tokens with log-probabilities count more
UNREAD_BYTES = 200  # of memory for each unread token


class Wire(Protocol):
    """The state of a connection's responses."""

    written: int  # bytes
    ended: bool  # an error response has ended the connection, and the rest of the request is dropped


class SupervisedProtocol(HttpToolsProtocol):
    """A connection as its monitor sees it; `HttpProtocol` sets its attributes."""

    _wire: Wire
    _monitor: ConnectionMonitor
    _timer: ProgressTimer
    _phase: Literal["idle", "head", "body"]
    """What is being received: nothing, or the head or the body of a request. `cycle` is that request until it is
    received and answered."""
    _received: int  # bytes
    _num_requests: int
    _hold: Hold | None = None  # memory for received data
    _unsent: Hold | None = None
    _behind = (0.0, 0)  # since when the client has been behind, and how much it had read then

    def pause_writing(self) -> None:
        """Stop writing until the client has read more."""
        super().pause_writing()
        self._monitor.behind[self] = None
        self._behind = self.loop.time(), self._taken()

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        if self._monitor.behind.pop(self, 0) is None and self._unsent is not None:
            self._unsent.record(0)

    def _refuse(self, error: ApiError) -> None:
        """Send an error response and close the connection; if a response has begun, just close."""
        raise NotImplementedError

    def _disconnect(self) -> None:
        """Stop the request being answered from writing, and release the connection's memory."""
        raise NotImplementedError

    @property
    def _is_ending(self) -> bool:
        raise NotImplementedError

    def _taken(self) -> int:
        """Return how many bytes of responses the client's system has received."""
        queued = array.array("i", [0])
        with contextlib.suppress(OSError):  # a system without this call counts buffered bytes as received
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self._wire.written - self.transport.get_write_buffer_size() - queued[0]

    def _awaited(self) -> Wait | None:
        """Return the `Wait` for the client, or None if the connection is not waiting for it."""
        if self.flow.write_paused or (self._is_ending and self.transport.get_write_buffer_size()):
            return Wait("write", None, self._taken())
        if self._is_ending:
            return None
        if self._phase == "body":
            # While reading is paused, the delay is ours. After an early response, the rest of the body does not count
            # as progress.
            progress = 0 if self.cycle.response_complete else self._received
            return None if self.flow.read_paused else Wait("body", self._num_requests, progress)
        if self.cycle is None and (self._phase == "head" or self.timeout_keep_alive_task is None):
            return Wait("header", (self._phase, self._num_requests))
        return None

    def check(self, now: float) -> str | None:
        """Close the connection if its client has left, is too slow or too far behind; return the reason."""
        if self.flow.read_paused and self._is_hung_up():
            self.transport.abort()
            return "the client hung up"
        wait = self._awaited()
        timeout = self._timer.expired(wait, self._monitor.limits, now)
        if wait is not None and wait.phase == "write":
            unread = self._unread()
            if unread > MAX_UNREAD:
                self.transport.abort()
                return f"the client was more than {MAX_UNREAD} tokens behind its stream"
            if timeout is not None:
                self.transport.abort()
                return f"the client read nothing of its response for {timeout:g} s"
            self._unsent = self._unsent or Hold(self._monitor.budget, "answers")
            self._unsent.record(self.transport.get_write_buffer_size() + UNREAD_BYTES * unread)
        if wait is None or timeout is None:
            return None
        if self._phase == "idle" or (self.cycle is not None and self.cycle.response_complete):
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

    def pace(self) -> float | None:
        """Return the bytes a second that the client has read since it fell behind; None if that is too recent."""
        since, taken = self._behind
        seconds = self.loop.time() - since
        return (self._taken() - taken) / seconds if seconds >= MIN_BEHIND_SECONDS else None

    def give_way(self) -> None:
        """Close the connection, with an error response if no response has begun, and release its memory."""
        if (context := self._context()) is not None:
            context.release()
        if self.flow.write_paused:
            self._disconnect()
            self.transport.abort()
        else:
            self._refuse(memory_full())

    def _is_hung_up(self) -> bool:
        """Whether the client has disconnected, which nothing else shows while reading is paused."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def _context(self) -> RequestContext | None:
        return self.cycle.scope.get(CONTEXT) if self.cycle is not None else None  # type: ignore[return-value]

    def _unread(self) -> int:
        """How many tokens a streaming client lags behind."""
        context = self._context()
        return context.generation.unread if context is not None and context.generation is not None else 0
