"""The paged KV cache's bookkeeping: who holds which block, and which computed blocks can be found again.

Prefix caching in four sentences. A block that is full of computed tokens gets a name: a hash of its tokens and of the
name of the block before it, so that one name stands for all tokens up to the block's end. Any sequence that begins
with the same tokens (and has the same salt) finds the block by that name and holds it too, instead of computing it.
When nobody holds a named block any more it is free, but keeps its name and its content until the space is needed.
Space is taken from blocks without a name first, then from the named one that has been free for longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from .request import Request

NAME_BYTES = 16
"""A name of 128 bits of a cryptographic hash: two different prefixes never share one in practice."""
ID_BYTES = array("i").itemsize


class BlockPool:
    """The KV blocks of one engine, numbered from 0. A block is free, or held by one sequence or more."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks  # how many sequences hold each block
        self._blank = list(range(num_blocks))[::-1]  # free and without a name, the next one last
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free and named, the longest free first
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, named ones included."""
        return len(self._blank) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks for one holder, or none at all (None) when fewer are free; names are lost as needed."""
        if count > self.num_free:
            return None
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Hold a block that was found by its name, beside those who hold it already."""
        if not self._holders[block]:
            del self._evictable[block]
        self._holders[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Let go of blocks, the one to be evicted first in front; raise `ValueError` for one that nobody holds."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._name_of[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None

    def find(self, name: bytes) -> int | None:
        """The block of that name."""
        return self._block_of.get(name)

    def is_held(self, block: int) -> bool:
        """Whether any sequence holds the block."""
        return self._holders[block] > 0

    def publish(self, block: int, name: bytes) -> None:
        """Let a held block be found by `name`, unless another one of the same content is already."""
        if name not in self._block_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def check_idle(self) -> None:
        """Raise `RuntimeError` unless every block is free, once, and every name leads to a block of that name."""
        held = self.num_blocks - self._holders.count(0)
        if held or self.num_free != self.num_blocks:
            raise RuntimeError(f"the idle engine holds {max(held, self.num_blocks - self.num_free)} KV blocks")
        named = [block for block, name in enumerate(self._name_of) if name is not None]
        if (
            len(self._evictable.keys() | self._blank) != self.num_blocks
            or self._evictable.keys() != set(named)
            or self._block_of != {self._name_of[block]: block for block in named}
        ):
            raise RuntimeError("the names of the cached KV blocks do not agree with the blocks")

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        name = self._name_of[block]
        if name is not None:
            del self._block_of[name]
            self._name_of[block] = None
        return block


class KVCacheManager:
    """Gives requests the blocks that their tokens need, and takes them back.

    Args:
        num_blocks: KV blocks of the engine.
        block_size: tokens per block.
        enable_prefix_caching: whether computed blocks can be found again.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def find_prefix(self, request: Request) -> list[int]:
        """The blocks that hold the longest known prefix of a waiting request, without taking them.

        They never hold its last token: that one is always computed, since its result is what is sampled from. A
        request that reads its prompt's hidden states finds nothing, since blocks hold none.
        """
        blocks: list[int] = []
        if self.enable_prefix_caching and not request.reads_prompt:
            for name in self._names(request, (request.num_tokens - 1) // self.block_size):
                block = self.pool.find(name)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def num_needed(self, request: Request, prefix: list[int]) -> int:
        """How many free blocks it takes to admit `request`, whose known prefix is in the blocks `prefix`."""
        return -(-request.num_tokens // self.block_size) - sum(map(self.pool.is_held, prefix))

    def admit(self, request: Request, prefix: list[int]) -> bool:
        """Give a request without blocks its known prefix and room for the rest; False if there is none."""
        if self.num_needed(request, prefix) > self.pool.num_free:
            return False
        for block in prefix:
            self.pool.share(block)
        request.block_ids.extend(prefix)
        request.num_published_blocks = len(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size
        return self.allocate(request)

    def allocate(self, request: Request, num_more: int = 0) -> bool:
        """Make room for all tokens that `request` has, and more; False, and nothing changed, when there is none."""
        num_tokens = request.num_tokens + num_more
        if num_tokens > len(request.block_ids) * self.block_size:
            needed = -(-num_tokens // self.block_size) - len(request.block_ids)
            blocks = self.pool.allocate(needed)
            if blocks is None:
                return False
            request.block_ids.extend(blocks)
        return True

    def advance(self, request: Request, num_tokens: int) -> None:
        """The next `num_tokens` of `request` are computed now: publish the blocks that this has filled."""
        request.num_computed_tokens += num_tokens
        self.publish(request, request.num_computed_tokens)

    def publish(self, request: Request, num_tokens: int) -> None:
        """Let the full blocks among the first `num_tokens` be found, which are computed and known."""
        full = num_tokens // self.block_size
        if full > request.num_published_blocks and self.enable_prefix_caching:
            names = self._names(request, full)
            for index in range(request.num_published_blocks, full):
                self.pool.publish(request.block_ids[index], names[index])
            request.num_published_blocks = full

    def free(self, request: Request) -> None:
        """Take back all blocks of `request`; it has nothing computed any more."""
        # The last block first, so that a sequence's head is evicted last: without it the rest could not be found.
        self.pool.free(request.block_ids[::-1])
        request.block_ids.clear()
        request.num_computed_tokens = 0

    def _names(self, request: Request, count: int) -> list[bytes]:
        """The names of the request's first `count` blocks; each is made once."""
        names = request.block_names
        if len(names) < count:
            start, size = len(names) * self.block_size, self.block_size * ID_BYTES
            packed = array("i", request.token_ids[start : count * self.block_size]).tobytes()
            name = names[-1] if names else blake2b((request.cache_salt or "").encode(), digest_size=NAME_BYTES).digest()
            for at in range(0, len(packed), size):
                name = blake2b(name + packed[at : at + size], digest_size=NAME_BYTES).digest()
                names.append(name)
        return names[:count]
