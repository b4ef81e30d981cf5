"""Every KV block is free or held by the requests that read it, and what its hash finds is what was computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.step.kv_cache import BlockPool, KVCacheManager
from pyllm.engine.step.request import Request

Prefix = tuple[str | None, tuple[int, ...]]  # a salt, and all tokens up to the end of a block
RUNS, MOVES = 2000, 50
CHOICES = 9  # bytes that decide a move
PARAMS = SamplingParams(max_tokens=1000)
OPTIONAL = ["admit", "abort", "compute", "generate", "preempt", "leave"]


def make_request(tokens: list[int], salt: str | None = None) -> Request:
    message = EngineRequest(request_id="r", prompt_token_ids=tokens, params=PARAMS, cache_salt=salt)
    return Request(message)


class Reference:
    """What the block pool must do, in the plainest way: whole prefixes for hashes, lists for everything else."""

    def __init__(self, num_blocks: int) -> None:
        self.holders: dict[int, int] = {}  # of the blocks that are held
        self.content: dict[Prefix, int] = {}  # the block in which each prefix that can be found ends
        self.free_cached: list[int] = []  # by the time they were let go
        self.blank = num_blocks

    @property
    def num_free(self) -> int:
        return self.blank + len(self.free_cached)

    def take(self, found: list[int], fresh: list[int]) -> None:
        """`found` are shared, `fresh` are new to their holder."""
        for block in found:
            if block in self.free_cached:
                self.free_cached.remove(block)
            self.holders[block] = self.holders.get(block, 0) + 1
        for block in fresh:
            assert block not in self.holders, "a block that is held was given to another request"
            self.holders[block] = 1
        evictions = max(0, len(fresh) - self.blank)
        evicted, self.free_cached = self.free_cached[:evictions], self.free_cached[evictions:]
        assert set(evicted) <= set(fresh), "the one that was free for longest goes first"
        self.content = {prefix: block for prefix, block in self.content.items() if block not in evicted}
        self.blank -= len(fresh) - evictions

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                if block in self.content.values():
                    self.free_cached.append(block)
                else:
                    self.blank += 1


class Blocks:
    """Requests come, find prefixes, compute any number of tokens at a time, grow, are preempted and leave."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.cache = KVCacheManager(num_blocks, block_size)
        self.size = block_size
        self.reference = Reference(num_blocks)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.hashes: dict[Prefix, bytes] = {}  # all that were ever given

    def arrive(self, kind: int, length: int, salted: str | None) -> None:
        """Few kinds of prompts, so that many begin alike; admitted at once where there is room."""
        self.waiting.append(make_request(([1] * 6 + [kind] * length)[:length], salted))
        self.admit(len(self.waiting) - 1)

    def admit(self, which: int) -> None:
        request = self.waiting[which % len(self.waiting)]
        expected = []
        for end in range(self.size, request.num_tokens, self.size):
            block = self.reference.content.get((request.cache_salt, tuple(request.token_ids[:end])))
            if block is None:
                break
            expected.append(block)
        prefix = self.cache.find_prefix(request)
        assert prefix == expected, "the longest computed prefix, short of the last token"
        wanted = -(-request.num_tokens // self.size)
        needed = wanted - sum(block in self.reference.holders for block in prefix)
        assert self.cache.num_needed(request, prefix) == needed
        if self.cache.admit(request, prefix):
            assert request.block_ids[: len(prefix)] == prefix
            assert len(request.block_ids) == wanted
            assert request.num_computed_tokens == len(prefix) * self.size
            self.reference.take(prefix, request.block_ids[len(prefix) :])
            self.waiting.remove(request)
            self.running.append(request)
        else:
            assert needed > self.reference.num_free, "a request was refused although there was room"
            assert request.block_ids == []

    def compute(self, which: int, count: int) -> None:
        """A chunk of a prompt, or all of it."""
        request = self.running[which % len(self.running)]
        self.advance(request, min(count, request.num_tokens - request.num_computed_tokens))

    def advance(self, request: Request, count: int) -> None:
        before = request.num_computed_tokens
        blocks = list(request.block_ids)
        self.cache.advance(request, count)
        assert request.block_ids == blocks, "what is computed stays where it is"
        for index in range(before // self.size, request.num_computed_tokens // self.size):
            prefix = (request.cache_salt, tuple(request.token_ids[: (index + 1) * self.size]))
            self.reference.content.setdefault(prefix, blocks[index])
            self.hashes[prefix] = request.block_hashes[index]

    def generate(self, which: int, tokens: list[int]) -> None:
        """Compute what is left and take sampled tokens, which may need a block more."""
        request = self.running[which % len(self.running)]
        for token in tokens:
            self.advance(request, request.num_tokens - request.num_computed_tokens)
            had = list(request.block_ids)
            request.append(token)
            needed = -(-request.num_tokens // self.size) - len(had)
            if not self.cache.allocate(request):
                assert needed > self.reference.num_free, "a token was refused its block although there was one"
                assert request.block_ids == had
                self.preempt(which)
                return
            assert request.block_ids[: len(had)] == had
            assert len(request.block_ids) == len(had) + needed
            self.reference.take([], request.block_ids[len(had) :])

    def preempt(self, which: int) -> None:
        request = self.running.pop(which % len(self.running))
        self.let_go(request)
        self.waiting.append(request)

    def leave(self, which: int) -> None:
        """By its end or by an abort: to the blocks it is one."""
        self.let_go(self.running.pop(which % len(self.running)))

    def abort_one_that_waits(self, which: int) -> None:
        self.let_go(self.waiting.pop(which % len(self.waiting)))

    def let_go(self, request: Request) -> None:
        blocks = list(request.block_ids)
        self.cache.free(request)
        self.reference.release(blocks)
        assert request.block_ids == []
        assert request.num_computed_tokens == 0
        for block in blocks:
            if block not in self.reference.holders:
                with pytest.raises(ValueError, match="freed twice"):
                    self.cache.pool.free([block])

    def check(self) -> None:
        """Each block is free or held; a prefix is found where it was computed, and no more once evicted."""
        pool = self.cache.pool
        assert [block for block in range(pool.num_blocks) if pool.is_held(block)] == sorted(self.reference.holders)
        assert pool.num_free == self.reference.num_free == pool.num_blocks - len(self.reference.holders)
        owned = [block for request in self.running for block in request.block_ids]
        assert sorted(owned) == sorted(b for b, count in self.reference.holders.items() for _ in range(count))
        for prefix, block_hash in self.hashes.items():
            assert self.cache.pool.find(block_hash) == self.reference.content.get(prefix)

    def end(self) -> None:
        for request in self.running:
            self.cache.free(request)
        pool = self.cache.pool
        pool.check_idle()
        assert sorted(pool.allocate(pool.num_blocks) or []) == list(range(pool.num_blocks))
        assert not any(pool.find(block_hash) for block_hash in self.hashes.values()), (
            "all were given away, none can be found"
        )

    def moves(self, which: int, a: int, b: int, *tokens: int) -> dict[str, Callable[[], None]]:
        """All that can happen now, in the ways that the choices say."""
        moves: dict[str, Callable[[], None]] = {
            "arrive": lambda: self.arrive(1 + a % 3, 1 + b % 24, "salt" if which % 4 == 3 else None)
        }
        if self.waiting:
            moves |= {"admit": lambda: self.admit(which), "abort": lambda: self.abort_one_that_waits(which)}
        if self.running:
            moves |= {
                "compute": lambda: self.compute(which, 1 + a % 24),
                "generate": lambda: self.generate(which, [1 + token % 2 for token in tokens][: 1 + a % 5]),
                "preempt": lambda: self.preempt(which),
                "leave": lambda: self.leave(which),
            }
        return moves


@settings(max_examples=RUNS, deadline=None)
@given(
    shape=st.tuples(st.integers(4, 16), st.integers(1, 4)),
    left_out=st.sets(st.sampled_from(OPTIONAL)),
    data=st.binary(min_size=MOVES * CHOICES, max_size=MOVES * CHOICES),
)
def test_blocks_are_where_a_plain_pool_has_them(shape: tuple[int, int], left_out: set[str], data: bytes) -> None:
    """Some runs leave out kinds of moves, so that others pile up.

    All moves are one draw of bytes: a draw for each choice, as of a state machine, takes six times as long.
    """
    blocks = Blocks(*shape)
    for at in range(0, len(data), CHOICES):
        move, *choices = data[at : at + CHOICES]
        moves = [(name, action) for name, action in blocks.moves(*choices).items() if name not in left_out]
        name, action = moves[move % len(moves)]
        note(f"{name} {choices}")
        action()
        blocks.check()
    blocks.end()


def test_more_blocks_than_are_free_gives_none_and_takes_none():
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert sorted(blocks or []) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_a_list_with_one_block_twice_is_refused():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    with pytest.raises(ValueError, match="freed twice"):
        pool.free([blocks[0], blocks[0]])


def test_blocks_come_back_in_any_order_and_are_given_out_again():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.free([blocks[1]])
    pool.free([blocks[2], blocks[0]])
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]


def computed(cache: KVCacheManager, tokens: list[int], salt: str | None = None) -> Request:
    """A request whose tokens are all computed."""
    request = make_request(tokens, salt)
    prefix = cache.find_prefix(request)
    assert cache.admit(request, prefix)
    cache.advance(request, request.num_tokens - request.num_computed_tokens)
    return request


def test_blank_blocks_go_first_and_tails_before_heads():
    cache = KVCacheManager(6, 2)
    old = computed(cache, [1, 2, 3, 4, 5, 6])
    young = computed(cache, [7, 8])
    cache.free(old)
    cache.free(young)
    probe = make_request([1, 2, 3, 4, 5, 6, 9])
    found = []
    taken = []
    for _ in range(6):
        taken += cache.pool.allocate(1) or []
        found.append((len(cache.find_prefix(probe)), len(cache.find_prefix(make_request([7, 8, 9])))))
    assert found == [(3, 1), (3, 1), (2, 1), (1, 1), (0, 1), (0, 0)]
    assert sorted(taken) == list(range(6))


def test_a_block_is_kept_longer_when_it_was_used_again():
    cache = KVCacheManager(4, 2)
    for tokens in ([1, 2], [3, 4], [5, 6], [1, 2, 3]):
        cache.free(computed(cache, tokens))
    cache.pool.allocate(2)  # a blank block, then the longest free
    assert [len(cache.find_prefix(make_request([*head, 9]))) for head in ([1, 2], [3, 4], [5, 6])] == [1, 0, 1]


def test_without_prefix_caching_nothing_is_found():
    cache = KVCacheManager(8, 2, enable_prefix_caching=False)
    request = computed(cache, [1, 2, 3, 4])
    assert cache.find_prefix(make_request([1, 2, 3, 4])) == []
    cache.free(request)
    assert cache.find_prefix(make_request([1, 2, 3, 4])) == []
    assert request.block_hashes == []


def test_block_hash_depends_on_the_blocks_before():
    cache = KVCacheManager(8, 2)
    computed(cache, [1, 2, 3, 4])
    assert len(cache.find_prefix(make_request([1, 2, 3, 4, 5]))) == 2
    assert cache.find_prefix(make_request([5, 6, 3, 4, 5])) == []
    assert cache.find_prefix(make_request([3, 4, 5])) == []


def test_an_idle_pool_whose_hashes_are_wrong_is_noticed():
    cache = KVCacheManager(4, 2)
    cache.free(computed(cache, [1, 2, 3, 4]))
    cache.pool.check_idle()
    probe = make_request([1, 2, 3, 4, 5])
    cache.find_prefix(probe)
    cache.pool._block_of[probe.block_hashes[0]] = 3
    with pytest.raises(RuntimeError, match="hashes"):
        cache.pool.check_idle()
