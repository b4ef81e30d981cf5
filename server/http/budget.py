"""The memory that this process holds for clients: its limit, its uses, and what gives way."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Literal, get_args

from ...engine.errors import EngineBusyError
from ...engine.host import total_host_bytes
from .errors import ApiError, unavailable

MAX_BODY_BYTES = 8 * 2**20
BODY_FACTOR = 4  # bytes of memory for each byte of a body being read and parsed
BODIES_BYTES = 4 * MAX_BODY_BYTES * BODY_FACTOR
MAX_DEFAULT_BYTES = 2 * 2**30
WAIT_SECONDS = 5.0
Kind = Literal["connections", "bodies", "requests", "tokenizing", "answers", "responses"]
"""What memory is held for: open connections and unfinished headers, bodies being read and parsed, requests being
answered, texts being tokenised, answers not yet sent, stored responses."""


def memory_full() -> ApiError:
    """Make the 503 for a request whose memory does not fit."""
    return unavailable("The server's memory for requests is used up: retry later.", "memory_full")


def default_limit() -> int:
    """Return a quarter of the memory that this process may use, at most 2 GiB."""
    return min(total_host_bytes() // 4, MAX_DEFAULT_BYTES)


class MemoryBudget:
    """Counts the bytes held for clients, by kind, by owner (an API key) and in total. Not thread-safe.

    Memory whose size depends on what clients send is charged before it is allocated, and released when it is freed.
    Memory that lives no longer than a request is charged to the request's context, which releases it at the latest
    when the request ends:

        with context.hold("tokenizing", 10 * len(text)):  # raises `ApiError` 503 or `EngineBusyError` if too much
            ids = await off_loop(encode, text)

    Memory that outlives requests has a hold of its own, which changes its size:

        kept = budget.hold("responses", 0, owner)
        kept.resize(kept.size + len(data))  # raises, and changes nothing, if it does not fit
        kept.release()

    When the total is used up, `give_way` frees memory of other clients, as long as it can.
    """

    def __init__(
        self, limit: int, *, owner_limit: int | None = None, bodies: int = BODIES_BYTES, upload_seconds: float = 30.0
    ) -> None:
        """`owner_limit` bounds the bytes of one key, and `bodies` those of large bodies being read at a time."""
        self.limit = limit
        self.upload_seconds = upload_seconds
        self.exceeded_at = -math.inf
        self.used = self.num_refused = 0
        self.released = 0
        """Bytes released since the C library last returned free memory to the system."""
        self.by_kind: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        self.by_owner: Counter[str] = Counter()  # only owners that hold something
        self.give_way: Callable[[], bool] = lambda: False
        """Closes one connection, whose holds are released at once; False if none can be closed."""
        self._owner_limit = limit if owner_limit is None else owner_limit
        self._bodies = min(bodies, self._owner_limit // 2)
        self._next = asyncio.Lock()  # held by the request that is first in line
        self._freed = asyncio.Event()

    def hold(self, kind: Kind, size: int, owner: str = "") -> Hold:
        """Charge `size` bytes; raise `ApiError` 503 or `EngineBusyError` if they do not fit."""
        hold = Hold(self, kind, owner)
        hold.resize(size)
        return hold

    async def reserve(self, size: int, owner: str = "") -> Hold:
        """Charge a large body of `size` bytes.

        Requests wait behind those that came before them, up to `WAIT_SECONDS`; then raises `EngineBusyError`.
        """
        size = min(size * BODY_FACTOR, self._bodies)
        if self._next.locked() or self._free_for_bodies < size:
            self.exceeded_at = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._next:
                while self._free_for_bodies < size:
                    self._freed.clear()
                    await self._freed.wait()
                return self.hold("bodies", size, owner)
        except TimeoutError:
            message = "Too many large requests are being read: retry later."
            raise EngineBusyError(message, retry_after=5) from None

    @property
    def _free_for_bodies(self) -> int:
        return self._bodies - self.by_kind["bodies"]

    @property
    def is_exceeded(self) -> bool:
        """Whether memory recorded without a check has exceeded the limit."""
        return self.used > self.limit

    def free_up(self, size: int, owner: str = "") -> None:
        """Let others give way until `size` bytes fit; raise if they cannot."""
        if owner and self.by_owner[owner] + size > self._owner_limit < self.limit:
            self.num_refused += 1
            message = f"The requests of this API key hold too much memory: at most {self._owner_limit} bytes at a time."
            raise EngineBusyError(message, retry_after=5)
        while self.used + size > self.limit:
            self.num_refused += 1
            if not self.give_way():
                raise memory_full()

    def count(self, kind: Kind, owner: str, change: int) -> None:
        """Count `change` more bytes."""
        self.used += change
        self.by_kind[kind] += change
        if owner:
            self.by_owner[owner] += change
            if not self.by_owner[owner]:
                del self.by_owner[owner]
        if change < 0:
            self.released -= change
            self._freed.set()


class Hold:
    """Bytes that one thing holds; as a context manager, it releases them at the end."""

    __slots__ = ("_budget", "_released", "_since", "kind", "owner", "size")

    def __init__(self, budget: MemoryBudget, kind: Kind, owner: str = "") -> None:
        self._budget = budget
        self._released = False
        self._since = time.monotonic()
        self.kind: Kind = kind
        self.owner = owner
        self.size = 0

    def resize(self, size: int) -> None:
        """Change the number of bytes; raise, and change nothing, if that many do not fit."""
        if size > self.size and not self._released:
            self._budget.free_up(size - self.size, self.owner)
        self.record(size)

    def record(self, size: int) -> None:
        """Change the number of bytes without a check, for memory that is already allocated."""
        if not self._released and size != self.size:
            change, self.size = size - self.size, size
            self._budget.count(self.kind, self.owner, change)

    def release(self) -> None:
        """Return the bytes, now and for good; safe to call more than once."""
        self.record(0)
        self._released = True

    @property
    def is_overdue(self) -> bool:
        """Whether a body must make way for others: it has been uploading for too long while others had to
        wait."""
        return self._budget.exceeded_at > self._since < time.monotonic() - self._budget.upload_seconds

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()
