"""A bound on the memory that large request bodies take together."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

from ...engine.errors import EngineBusyError

MAX_BODY_BYTES = 8 * 2**20
BUDGET_BYTES = 4 * MAX_BODY_BYTES
WAIT_SECONDS = 5.0


class BodyBudget:
    """Bytes that large bodies may hold from when they are read until their requests are submitted to the engine.

    Requests that exceed it wait in order. While they do, a body that is still uploading after `upload_seconds` is
    overdue.
    """

    def __init__(self, total: int = BUDGET_BYTES, upload_seconds: float = 30.0) -> None:
        self.upload_seconds = upload_seconds
        self.exceeded_at = -math.inf
        self._total = self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def reserve(self, size: int) -> Reservation:
        """Reserve `size` bytes; raise `EngineBusyError` if they are not free within `WAIT_SECONDS`."""
        size = min(size, self._total)
        if not self._waiting and size <= self._free:
            self._free -= size
            return Reservation(self, size)
        self.exceeded_at = time.monotonic()
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            await asyncio.wait_for(asyncio.shield(granted), WAIT_SECONDS)
        except BaseException as error:
            if granted.done():
                self.free(size)
            else:
                granted.cancel()
                self.free(0)  # the next one may fit
            if isinstance(error, TimeoutError):
                message = "Too many large requests are being read: retry later."
                raise EngineBusyError(message, retry_after=5) from None
            raise
        return Reservation(self, size)

    def free(self, size: int) -> None:
        """Return `size` bytes, and grant waiting requests what fits."""
        self._free += size
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._free):
            size, granted = self._waiting.popleft()
            if not granted.cancelled():
                self._free -= size
                granted.set_result(None)


class Reservation:
    """Bytes of a `BodyBudget` that one request holds."""

    def __init__(self, budget: BodyBudget, size: int) -> None:
        self._budget = budget
        self._size = size
        self._since = time.monotonic()

    @property
    def is_overdue(self) -> bool:
        """Whether it is older than the budget's `upload_seconds` and other requests have had to wait since."""
        return self._budget.exceeded_at > self._since < time.monotonic() - self._budget.upload_seconds

    def release(self) -> None:
        """Return the bytes; may be called again."""
        self._budget.free(self._size)
        self._size = 0
