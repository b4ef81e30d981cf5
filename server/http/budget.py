"""A bound on the memory that large request bodies take together."""

from __future__ import annotations

import asyncio
import math
import time

from ...engine.errors import EngineBusyError

MAX_BODY_BYTES = 8 * 2**20
BUDGET_BYTES = 4 * MAX_BODY_BYTES
WAIT_SECONDS = 5.0


class BodyBudget:
    """Bytes that large bodies may take, each held from reading the body until its request is submitted to the engine.

    A request for which too few are free waits behind those that came before it. A body that is still uploading
    `upload_seconds` after its reservation is overdue if others have had to wait since.
    """

    def __init__(self, total: int = BUDGET_BYTES, upload_seconds: float = 30.0) -> None:
        self.upload_seconds = upload_seconds
        self.exceeded_at = -math.inf
        self._total = self._free = total
        self._next = asyncio.Lock()  # held by the request that is first in line
        self._freed = asyncio.Event()

    async def reserve(self, size: int) -> Reservation:
        """Reserve `size` bytes; raise `EngineBusyError` if they do not become free within `WAIT_SECONDS`."""
        size = min(size, self._total)
        if self._next.locked() or self._free < size:
            self.exceeded_at = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._next:
                while self._free < size:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= size
        except TimeoutError:
            message = "Too many large requests are being read: retry later."
            raise EngineBusyError(message, retry_after=5) from None
        return Reservation(self, size)

    def free(self, size: int) -> None:
        """Return `size` bytes."""
        self._free += size
        self._freed.set()


class Reservation:
    """Bytes of a `BodyBudget` that one request holds."""

    def __init__(self, budget: BodyBudget, size: int) -> None:
        self._budget = budget
        self._size = size
        self._since = time.monotonic()

    @property
    def is_overdue(self) -> bool:
        """Whether the body must make way for others."""
        return self._budget.exceeded_at > self._since < time.monotonic() - self._budget.upload_seconds

    def release(self) -> None:
        """Return the bytes; safe to call more than once."""
        self._budget.free(self._size)
        self._size = 0
