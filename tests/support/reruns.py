"""Recorded steps without a GPU."""

from __future__ import annotations

from collections.abc import Callable


class Reruns:
    """Does recorded work again on the same buffers, in place of a graph; counts how often, and its memory."""

    def __init__(self, bytes_each: int = 0) -> None:
        self.count = 0
        self.captured = 0
        self._bytes_each = bytes_each

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.captured += 1

        def replay() -> None:
            self.count += 1
            work()

        return replay

    def used_bytes(self) -> int:
        return self.captured * self._bytes_each
