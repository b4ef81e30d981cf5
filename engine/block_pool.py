"""The paged KV cache's bookkeeping: which blocks are free, and which belong to which request."""

from __future__ import annotations

from collections import deque

from .request import Request


class BlockPool:
    """The KV blocks of one engine, numbered from 0. A block is either free or has exactly one owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._used = [False] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are owned, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all (None) when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._used[block] = True
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back; raise `ValueError` for one that is free already."""
        for block in blocks:
            if not self._used[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._used[block] = False
            self._free.append(block)


class KVCacheManager:
    """Gives requests the blocks that their tokens need, and takes them back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size

    def allocate(self, request: Request, num_new_tokens: int) -> bool:
        """Make room for the next `num_new_tokens` of `request`; False, and nothing changed, when there is none."""
        needed = -(-(request.num_computed_tokens + num_new_tokens) // self.block_size) - len(request.block_ids)
        if needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is None:
                return False
            request.block_ids.extend(blocks)
        return True

    def free(self, request: Request) -> None:
        """Take back all blocks of `request`; it has nothing computed any more."""
        # The last block first, so that the pool hands out a sequence's head last.
        self.pool.free(request.block_ids[::-1])
        request.block_ids.clear()
        request.num_computed_tokens = 0
