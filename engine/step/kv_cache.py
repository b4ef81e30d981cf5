"""The paged KV cache's bookkeeping: which requests hold which blocks, and which computed blocks can be found again.

Prefix caching in four sentences. A block that is full of computed tokens gets a hash of its tokens and of the previous
block's hash, so that one hash identifies all tokens up to the block's end. Any sequence that begins with the same
tokens (and has the same salt) finds the block by that hash and shares it, instead of computing it. A cached block that
no sequence holds is free, but keeps its hash and its content until the space is needed. Allocation uses free blocks
without a hash first, then evicts the cached block that has been free for longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

from .request import Request

if TYPE_CHECKING:
    from .kv_events import KVEventLog

HASH_BYTES = 16  # 128 bits of a cryptographic hash: two different prefixes never share one in practice
ID_BYTES = array("i").itemsize


class BlockPool:
    """The KV blocks of one engine, numbered from 0. A block is free, or held by one sequence or more."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks  # how many sequences hold each block
        self._blank = list(range(num_blocks))[::-1]  # free, without a hash; the next one is last
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free and cached, the longest free first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.on_evicted: Callable[[bytes], None] | None = None  # called with the hash of an evicted block

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, cached ones included."""
        return len(self._blank) + len(self._evictable)

    def allocate(self, count: int) -> list[int] | None:
        """Give `count` blocks to one holder, evicting cached ones as needed; None if fewer are free."""
        if count > self.num_free:
            return None
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a holder to a cached block."""
        if not self._holders[block]:
            del self._evictable[block]
        self._holders[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Release blocks, given in the order in which to evict them; raise `ValueError` if one is not held."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._hash_of[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None

    def find(self, block_hash: bytes) -> int | None:
        """Return the cached block with that hash."""
        return self._block_of.get(block_hash)

    def is_held(self, block: int) -> bool:
        """Whether any sequence holds the block."""
        return self._holders[block] > 0

    @property
    def cached(self) -> frozenset[bytes]:
        """The hashes of all cached blocks."""
        return frozenset(self._block_of)

    def cache_block(self, block: int, block_hash: bytes) -> bool:
        """Register a held block under its hash; return False if a block with the same content is registered."""
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        return True

    def check_idle(self) -> None:
        """Raise `RuntimeError` unless each block is free exactly once, and the two hash tables agree."""
        held = self.num_blocks - self._holders.count(0)
        if held or self.num_free != self.num_blocks:
            raise RuntimeError(f"the idle engine holds {max(held, self.num_blocks - self.num_free)} KV blocks")
        cached = [block for block, block_hash in enumerate(self._hash_of) if block_hash is not None]
        if (
            len(self._evictable.keys() | self._blank) != self.num_blocks
            or self._evictable.keys() != set(cached)
            or self._block_of != {self._hash_of[block]: block for block in cached}
        ):
            raise RuntimeError("the hashes of the cached KV blocks do not match the blocks")

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
            if self.on_evicted is not None:
                self.on_evicted(block_hash)
        return block


class KVCacheManager:
    """Allocates the blocks that requests need for their tokens, and frees them."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size  # tokens per block
        self.enable_prefix_caching = enable_prefix_caching
        self._events: KVEventLog | None = None

    def record(self, events: KVEventLog) -> None:
        """Note in `events` from now on which blocks are cached and evicted."""
        self._events, self.pool.on_evicted = events, events.on_removed

    def find_prefix(self, request: Request) -> list[int]:
        """Return the cached blocks of the longest known prefix of a waiting request, without holding them.

        They never include its last token, which must be computed to sample the next one. A request that reads its
        prompt's hidden states finds nothing, because blocks do not contain them.
        """
        blocks: list[int] = []
        if self.enable_prefix_caching and not request.reads_prompt:
            for block_hash in self._hashes(request, (request.num_tokens - 1) // self.block_size):
                block = self.pool.find(block_hash)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def num_needed(self, request: Request, prefix: list[int]) -> int:
        """Count the free blocks needed to admit `request`, whose cached blocks are `prefix`."""
        return -(-request.num_tokens // self.block_size) - sum(map(self.pool.is_held, prefix))

    def admit(self, request: Request, prefix: list[int]) -> bool:
        """Give a request its cached blocks and new ones for the rest; False if too few are free."""
        if self.num_needed(request, prefix) > self.pool.num_free:
            return False
        for block in prefix:
            self.pool.share(block)
        request.block_ids.extend(prefix)
        request.num_registered_blocks = len(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size
        return self.allocate(request)

    def allocate(self, request: Request, num_more: int = 0) -> bool:
        """Allocate blocks for all tokens of `request` and `num_more`; return False, unchanged, if too few are free."""
        num_tokens = len(request.token_ids) + num_more
        if num_tokens > len(request.block_ids) * self.block_size:
            blocks = self.pool.allocate(-(-num_tokens // self.block_size) - len(request.block_ids))
            if blocks is None:
                return False
            request.block_ids.extend(blocks)
        return True

    def advance(self, request: Request, num_tokens: int) -> None:
        """Count the next `num_tokens` of `request` as computed, and cache the blocks that they fill."""
        request.num_computed_tokens += num_tokens
        self.cache_blocks(request, request.num_computed_tokens)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Register the full blocks of the first `num_tokens` tokens, which must be computed and known."""
        full = num_tokens // self.block_size
        if full > request.num_registered_blocks and self.enable_prefix_caching:
            hashes = self._hashes(request, full)
            for index in range(request.num_registered_blocks, full):
                is_new = self.pool.cache_block(request.block_ids[index], hashes[index])
                if is_new and self._events is not None:
                    self._events.on_stored(request, index)
            request.num_registered_blocks = full

    def free(self, request: Request) -> None:
        """Free all blocks of `request`; none of its tokens counts as computed afterwards."""
        # The last block first: a sequence's head is evicted last, since the others cannot be found without it.
        self.pool.free(request.block_ids[::-1])
        request.block_ids.clear()
        request.num_computed_tokens = 0

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Return the hashes of the request's first `count` blocks; each is computed once."""
        hashes = request.block_hashes
        if len(hashes) < count:
            start, size = len(hashes) * self.block_size, self.block_size * ID_BYTES
            packed = array("i", request.token_ids[start : count * self.block_size]).tobytes()
            salt = (request.cache_salt or "").encode()
            last = hashes[-1] if hashes else blake2b(salt, digest_size=HASH_BYTES).digest()
            for at in range(0, len(packed), size):
                last = blake2b(last + packed[at : at + size], digest_size=HASH_BYTES).digest()
                hashes.append(last)
        return hashes[:count]
