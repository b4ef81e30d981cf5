"""Every KV block is free or has one owner, whatever requests do."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from pyllm.engine.block_pool import BlockPool, KVCacheManager
from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.request import Request


def make_request(tokens: int) -> Request:
    message = EngineRequest(request_id="r", prompt_token_ids=[1] * tokens, params=SamplingParams(max_tokens=1000))
    return Request(message, eos_token_ids=())


class Blocks(RuleBasedStateMachine):
    """Requests of any length come, compute any number of tokens at a time, are preempted and leave."""

    requests = Bundle("requests")

    @initialize(num_blocks=st.integers(1, 24), block_size=st.integers(1, 9))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.cache = KVCacheManager(num_blocks, block_size)
        self.live: list[Request] = []

    @rule(target=requests, tokens=st.integers(1, 60))
    def arrive(self, tokens: int) -> Request:
        self.live.append(make_request(tokens))
        return self.live[-1]

    @rule(request=requests, share=st.floats(0.01, 1))
    def compute_a_chunk(self, request: Request, share: float) -> None:
        rest = request.num_tokens - request.num_computed_tokens
        if not rest:
            request.append(1)
            rest = 1
        count = max(1, int(rest * share))
        had, free = list(request.block_ids), self.cache.pool.num_free
        after = request.num_computed_tokens + count
        needed = -(-after // self.cache.block_size)
        if self.cache.allocate(request, count):
            assert request.block_ids[: len(had)] == had, "what is computed stays where it is"
            assert len(request.block_ids) == needed
            request.num_computed_tokens = after
        else:
            assert needed - len(had) > free, "a request was refused although there was room"
            assert request.block_ids == had
            assert self.cache.pool.num_free == free

    @rule(request=requests)
    def preempt(self, request: Request) -> None:
        self.cache.free(request)
        assert request.num_computed_tokens == 0
        assert request.block_ids == []

    @rule(request=consumes(requests))
    def leave(self, request: Request) -> None:
        """By its end or by an abort: to the blocks it is one."""
        self.cache.free(request)
        self.live.remove(request)

    @rule(request=requests)
    def free_twice(self, request: Request) -> None:
        blocks = list(request.block_ids)
        self.cache.free(request)
        free = self.cache.pool.num_free
        for block in blocks:
            with pytest.raises(ValueError, match="freed twice"):
                self.cache.pool.free([block])
        assert self.cache.pool.num_free == free

    @invariant()
    def each_block_is_free_or_has_one_owner(self) -> None:
        if not hasattr(self, "cache"):
            return
        pool = self.cache.pool
        owned = [block for request in self.live for block in request.block_ids]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(pool.num_blocks))
        assert len(owned) + pool.num_free == pool.num_blocks
        assert pool.usage == pytest.approx(len(owned) / pool.num_blocks)

    @invariant()
    def each_request_has_the_blocks_of_its_computed_tokens(self) -> None:
        for request in getattr(self, "live", []):
            assert len(request.block_ids) == -(-request.num_computed_tokens // self.cache.block_size)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for request in self.live:
                self.cache.free(request)
            pool = self.cache.pool
            assert sorted(pool.allocate(pool.num_blocks) or []) == list(range(pool.num_blocks))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


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
