"""Limits on HTTP connections: how many, and how slow their clients may be. Knows neither sockets nor HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Literal, NamedTuple, Protocol

from ...engine.host import return_free_memory
from ..flags import ServerConfig
from .budget import Hold, MemoryBudget
from .errors import ApiError

logger = logging.getLogger("pyllm.server")

MIN_PROGRESS = 4096  # a slow client that sends or takes at least this many bytes within the timeout gets a new timeout
MIN_IDLE_SECONDS = 0.5
"""A connection idle for less than this is not evicted: if it is new, its first request may be on its way."""
MAX_EVICTION_TRIES = 16
CONNECTION_BYTES = 24 * 2**10  # the memory of an open connection with a small request
TRIM_BYTES = 16 * 2**20
"""Once this much memory has been released, which the allocators mostly keep, it is returned to the system."""
IDLE_TRIM_BYTES = 2**20
"""The threshold while almost nothing has been released since the last sweep: returning memory then disturbs no
requests."""
IDLE_BYTES = 64 * 2**10  # almost nothing
RETURN_SHARE = 0.05
"""Of the time, at most this is spent on returning memory: the collection of garbage before it holds up all threads."""
SPARE_FILES = 128  # open files of this process that are not connections


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The timeouts of one connection in seconds, and how many may be open."""

    header: float  # from the opening of the connection, or a request's first byte, to the end of its headers
    body: float  # to make progress with the request's body
    write: float  # to make progress with reading the response
    connections: int

    @classmethod
    def from_config(cls, config: ServerConfig) -> ConnectionLimits:
        """Read the flags, and raise this process's limit of open files to fit, as far as permitted."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed, most = config.max_connections + SPARE_FILES, config.max_connections
        if soft != resource.RLIM_INFINITY and soft < needed:
            soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if soft < needed:
                most = max(soft - SPARE_FILES, 1)
                logger.warning(
                    "The system allows only %d open files, so at most %d connections are accepted.", soft, most
                )
        return cls(config.header_timeout, config.body_timeout, config.write_timeout, most)

    @property
    def sweep_interval(self) -> float:
        """Seconds between two sweeps; timeouts can fire this much late."""
        return min(1.0, self.header / 4, self.body / 4, self.write / 4)


class Wait(NamedTuple):
    """A connection's wait for its client."""

    phase: Literal["header", "body", "write"]
    mark: object  # a different object for the next wait
    progress: int = 0  # bytes so far, where the client may take longer as long as it makes progress


@dataclass(slots=True)
class ProgressTimer:
    """Times one connection's wait for its client."""

    _wait: Wait | None = None
    _since: float = 0.0

    def expired(self, wait: Wait | None, limits: ConnectionLimits, now: float) -> float | None:
        """Return the timeout that `wait` has exceeded without progress, or None."""
        if wait is None:
            self._wait = None
            return None
        if self._wait is None or wait[:2] != self._wait[:2]:
            self._wait, self._since = wait, now
        timeout: float = getattr(limits, wait.phase)
        if now - self._since < timeout:
            return None
        if wait.progress - self._wait.progress >= MIN_PROGRESS:
            self._wait, self._since = wait, now
            return None
        return timeout


class Connection(Protocol):
    """The interface of a connection that the monitor uses."""

    def check(self, now: float) -> str | None: ...  # closes it if its client is too slow, and returns the reason

    def close_idle(self) -> bool: ...  # closes it unless something is left to send

    def pace(self) -> float | None: ...  # bytes a second that its client reads, None if not known

    def give_way(self) -> None: ...  # closes it and releases its memory


class ConnectionMonitor:
    """Applies the limits to all connections of a server, in one periodic sweep instead of a timer per request."""

    def __init__(self, limits: ConnectionLimits, budget: MemoryBudget) -> None:
        self.limits = limits
        self.budget = budget
        budget.give_way = self.give_way
        self._hold = Hold(budget, "connections")  # for `CONNECTION_BYTES` of every open connection
        self.idle: dict[Connection, float] = {}
        """Connections between two requests or before the first, and since when; the longest idle comes first."""
        self.incomplete: dict[Connection, None] = {}
        """Connections whose request has not arrived far enough to check its key; newest last."""
        self.behind: dict[Connection, None] = {}
        """Connections whose client has not read everything sent so far."""
        self.closed: Counter[str] = Counter()
        self._released = 0  # the budget's count at the last sweep
        self._next_return = 0.0  # when memory may be returned again

    def watch(self, connections: Collection[Connection]) -> None:
        """Sweep from now on, as long as the event loop runs."""
        loop = asyncio.get_running_loop()
        loop.call_later(self.limits.sweep_interval, self.watch, connections)
        self.sweep(connections, loop.time())
        if self.has_memory_to_return(time.monotonic()):
            loop.run_in_executor(None, self.return_memory)

    def has_memory_to_return(self, now: float) -> bool:
        """Whether so much was released that it is worth returning now; call it once per sweep."""
        released, before = self.budget.released, self._released
        enough = IDLE_TRIM_BYTES if released - before < IDLE_BYTES else TRIM_BYTES
        is_time = released >= enough and now >= self._next_return
        if is_time:
            self.budget.released = 0
        self._released = self.budget.released
        return is_time

    def return_memory(self, release: Callable[[], None] | None = None) -> None:
        """Return freed memory to the system, then pause in proportion to the time that it took; for any thread."""
        begun, self._next_return = time.monotonic(), math.inf
        try:
            (release or _release_memory)()
        finally:
            ended = time.monotonic()
            self._next_return = ended + (ended - begun) / RETURN_SHARE

    def sweep(self, connections: Collection[Connection], now: float) -> None:
        """Close the connections whose clients are too slow, and log how many were closed since the last sweep."""
        self.closed.update(reason for connection in list(connections) if (reason := connection.check(now)))
        self._hold.record(CONNECTION_BYTES * len(connections))
        with contextlib.suppress(ApiError):
            self.budget.free_up(0)
        for reason, count in self.closed.items():
            logger.info("Closed %d connection(s): %s", count, reason)
        self.closed.clear()

    def release(self, remaining: int) -> None:
        """Release what closed connections took; `sweep` charges those that were opened since."""
        self._hold.record(min(self._hold.size, CONNECTION_BYTES * remaining))

    def give_way(self) -> bool:
        """Close a connection to free memory: the newest with an incomplete request, else the one that reads slowest."""
        if self.incomplete:
            connection, reason = next(reversed(self.incomplete)), "memory is used up, and its request was incomplete"
        else:
            paces = ((pace, each) for each in self.behind if (pace := each.pace()) is not None)
            pair = min(paces, key=itemgetter(0), default=None)
            if pair is None:
                return False
            connection, reason = pair[1], "memory is used up, and its client was the slowest reader"
        for gone in (self.incomplete, self.behind):
            gone.pop(connection, None)
        connection.give_way()
        self.closed[reason] += 1
        return True

    def evict_idle(self, now: float) -> bool:
        """Close the connection that has been idle longest, to admit a new one; return whether there was one."""
        for connection, since in list(islice(self.idle.items(), MAX_EVICTION_TRIES)):
            if now - since < MIN_IDLE_SECONDS:
                break
            del self.idle[connection]
            if connection.close_idle():
                self.closed["idle, and a new connection needed the slot"] += 1
                return True
            self.idle[connection] = now
        return False


def _release_memory() -> None:
    gc.collect()  # objects that refer to each other may be few, and still keep much
    return_free_memory(0)
