"""The scheduler alone: budgets, order, fairness and blocks, with tokens that nobody computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.engine.block_pool import KVCacheManager
from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.request import Request, RequestStatus
from pyllm.engine.scheduler import Scheduler, SchedulerOutput


def make_request(name: str, prompt: int, output: int) -> Request:
    params = SamplingParams(max_tokens=output)
    return Request(EngineRequest(request_id=name, prompt_token_ids=[1] * prompt, params=params), eos_token_ids=())


@dataclass
class Bench:
    """Drives a scheduler as the engine does, and checks every step."""

    scheduler: Scheduler
    arrived: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    steps: list[list[tuple[str, int, int]]] = field(default_factory=list)
    """Each step as (request, first token, number of tokens)."""

    @classmethod
    def make(cls, *, blocks: int = 64, block_size: int = 4, seqs: int = 8, budget: int = 32) -> Bench:
        cache = KVCacheManager(blocks, block_size)
        return cls(Scheduler(cache, max_num_seqs=seqs, max_num_batched_tokens=budget))

    def add(self, name: str, prompt: int, output: int) -> Request:
        request = make_request(name, prompt, output)
        self.arrived.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        scheduler = self.scheduler
        before = list(scheduler.running)
        preemptions = scheduler.num_preemptions
        planned = scheduler.schedule()
        self.check(planned, before, scheduler.num_preemptions - preemptions)
        self.steps.append(
            [(s.request.request_id, s.request.num_computed_tokens, s.num_tokens) for s in planned.sequences]
        )
        for sequence in planned.sequences:
            request = sequence.request
            request.num_computed_tokens += sequence.num_tokens
            assert sequence.samples == (request.num_computed_tokens == request.num_tokens)
            if sequence.samples:
                request.append(7)
                if request.finish_reason is not None:
                    scheduler.finish(request)
                    self.finished.append(request)
        return planned

    def check(self, planned: SchedulerOutput, before: list[Request], preempted: int) -> None:
        scheduler = self.scheduler
        age = {id(request): i for i, request in enumerate(self.arrived)}
        counts = [sequence.num_tokens for sequence in planned.sequences]
        assert all(count > 0 for count in counts)
        assert sum(counts) == planned.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len({id(s.request) for s in planned.sequences}) == len(counts), "a request is in a step once"
        assert [count > 1 for count in counts] == sorted(count > 1 for count in counts), "single tokens come first"
        running = [age[id(request)] for request in scheduler.running]
        assert running == sorted(running), "the oldest run first"
        waiting = [age[id(request)] for request in scheduler.waiting]
        assert waiting == sorted(waiting), "first come, first served"
        assert not running or not waiting or running[-1] < waiting[0], "nobody overtakes"
        assert len(before) - len([r for r in before if r in scheduler.running]) == preempted
        if before and preempted:
            assert before[0] in scheduler.running, "the oldest is never preempted"
            assert before[: len(before) - preempted] == scheduler.running, "the youngest are preempted, nobody admitted"
        if scheduler.has_work:
            assert counts, "a step moves on"
            oldest = min(running)
            assert oldest in {age[id(s.request)] for s in planned.sequences}, "the oldest moves on in every step"
        self.admitted += [r.request_id for r in scheduler.running if r not in before]
        owned = [block for request in scheduler.running for block in request.block_ids]
        pool = scheduler.kv_cache.pool
        assert len(owned) == len(set(owned)) == pool.num_blocks - pool.num_free
        assert all(not request.block_ids and not request.num_computed_tokens for request in scheduler.waiting)
        for sequence in planned.sequences:
            after = sequence.request.num_computed_tokens + sequence.num_tokens
            assert len(sequence.request.block_ids) == -(-after // scheduler.kv_cache.block_size)

    def run(self, limit: int) -> None:
        """Step until idle; fail if that takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still at work after {limit} steps"
        pool = self.scheduler.kv_cache.pool
        assert pool.num_free == pool.num_blocks


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 25))  # prompt, output


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    seqs=st.integers(1, 9),
    budget=st.integers(1, 50),
    block_size=st.integers(1, 9),
    spare=st.integers(0, 30),
)
def test_every_request_ends_within_bounds_and_gives_its_blocks_back(sizes, gaps, seqs, budget, block_size, spare):
    largest = max(prompt + output for prompt, output in sizes)
    bench = Bench.make(blocks=-(-largest // block_size) + spare, block_size=block_size, seqs=seqs, budget=budget)
    # The oldest moves on in every step, so even one after the other they are done by then.
    bound = sum(-(-(prompt + output) // budget) + output for prompt, output in sizes)
    for i, (prompt, output) in enumerate(sizes):
        bench.add(str(i), prompt, output)
        for _ in range(gaps[i]):
            bench.step()
    bench.run(bound + len(sizes))
    assert sorted(request.request_id for request in bench.finished) == sorted(str(i) for i in range(len(sizes)))
    for request, (prompt, output) in zip(bench.arrived, sizes, strict=True):
        assert request.num_output_tokens == output
        assert request.status is RequestStatus.FINISHED
        computed = [(first, count) for step in bench.steps for name, first, count in step if name == request.request_id]
        position = 0
        for first, count in computed:
            assert first in (position, 0), "chunks follow one another; after a preemption they begin anew"
            position = first + count
        assert position == prompt + output - 1, "the last token is never computed"
    first_times = list(dict.fromkeys(bench.admitted))
    assert first_times == [str(i) for i in range(len(sizes))], "admitted in the order of arrival"


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=2, max_size=8),
    events=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=8),
    budget=st.integers(1, 40),
    blocks=st.integers(17, 40),
)
def test_an_abort_at_any_time_gives_the_blocks_back(sizes, events, budget, blocks):
    bench = Bench.make(blocks=blocks, block_size=4, seqs=5, budget=budget)
    for i, (prompt, output) in enumerate(sizes):
        bench.add(str(i), prompt, output)
    for index, steps in events:
        for _ in range(steps):
            bench.step()
        request = bench.arrived[index % len(sizes)]
        if request.status is not RequestStatus.FINISHED:
            bench.scheduler.finish(request)
            assert request.block_ids == []
            assert request not in bench.scheduler.running
            assert request not in bench.scheduler.waiting
    bench.run(1000)


def test_one_step_carries_prefill_and_decode_tokens_together():
    bench = Bench.make(budget=16)
    bench.add("first", 4, 10)
    bench.step()
    bench.add("second", 30, 2)
    bench.step()
    assert bench.steps[-1] == [("first", 4, 1), ("second", 0, 15)]


def test_a_long_prompt_is_computed_in_contiguous_chunks_while_others_decode():
    bench = Bench.make(budget=8)
    bench.add("old", 3, 20)
    bench.step()
    bench.add("long", 30, 1)
    for _ in range(5):
        bench.step()
    chunks = [(first, count) for step in bench.steps for name, first, count in step if name == "long"]
    assert chunks == [(0, 7), (7, 7), (14, 7), (21, 7), (28, 2)]
    assert bench.arrived[0].num_output_tokens == 6, "the old one got a token in every step"


def test_a_late_request_starts_while_earlier_ones_still_run():
    bench = Bench.make()
    for i in range(3):
        bench.add(f"early-{i}", 5, 30)
    for _ in range(4):
        bench.step()
    late = bench.add("late", 5, 3)
    bench.step()
    assert late.num_output_tokens == 1
    assert all(request.status is RequestStatus.RUNNING for request in bench.arrived[:3])


def test_a_request_that_does_not_fit_holds_back_those_behind_it():
    bench = Bench.make(blocks=10, block_size=4, budget=100)
    bench.add("running", 20, 15)
    bench.step()
    bench.add("large", 30, 5)
    bench.add("small", 2, 2)
    bench.step()
    assert [request.request_id for request in bench.scheduler.running] == ["running"]
    assert [request.request_id for request in bench.scheduler.waiting] == ["large", "small"]


def test_no_more_sequences_run_than_allowed():
    bench = Bench.make(seqs=2)
    for i in range(5):
        bench.add(str(i), 2, 3)
    bench.step()
    assert len(bench.scheduler.running) == 2
    bench.run(20)


def test_when_blocks_run_out_the_youngest_gives_up_its_own_and_is_done_later():
    bench = Bench.make(blocks=6, block_size=4)
    old, young = bench.add("old", 8, 14), bench.add("young", 8, 14)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert young.status is RequestStatus.PREEMPTED
    assert old.status is RequestStatus.RUNNING
    assert young.num_output_tokens > 0, "what it has said stays said"
    bench.run(100)
    assert [request.request_id for request in bench.finished] == ["old", "young"]


@pytest.mark.parametrize("state", ["waiting", "in its prompt", "decoding", "preempted"])
def test_an_abort_in_each_state(state):
    bench = Bench.make(blocks=6, block_size=4, budget=8)
    if state == "waiting":
        bench.add("other", 4, 4)
        request = bench.add("aborted", 20, 2)
        assert request.status is RequestStatus.WAITING
    elif state == "in its prompt":
        request = bench.add("aborted", 20, 2)
        bench.step()
        assert 0 < request.num_computed_tokens < request.num_prompt_tokens
    elif state == "decoding":
        request = bench.add("aborted", 4, 5)
        bench.step()
        bench.step()
        assert request.num_output_tokens == 2
    else:
        bench.add("other", 8, 14)
        request = bench.add("aborted", 8, 14)
        while request.status is not RequestStatus.PREEMPTED:
            bench.step()
    bench.scheduler.finish(request)
    assert request.block_ids == []
    bench.run(100)
    assert request not in bench.finished


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    multiple=st.sampled_from([1, 4, 8, 16]),
    spare=st.integers(0, 20),
)
def test_chunks_that_do_not_end_a_prompt_end_at_a_multiple(prompts, multiple, spare):
    """So that the same blocks of queries are computed however busy the engine is."""
    scheduler = Scheduler(
        KVCacheManager(400, 4), max_num_seqs=8, max_num_batched_tokens=8 + multiple + spare, chunk_multiple=multiple
    )
    bench = Bench(scheduler)
    requests = {str(i): bench.add(str(i), prompt, 3) for i, prompt in enumerate(prompts)}
    for _ in range(400):
        if not scheduler.has_work:
            break
        lengths = {name: request.num_tokens for name, request in requests.items()}
        bench.step()
        for name, start, count in bench.steps[-1]:
            assert start + count == lengths[name] or (start + count) % multiple == 0
    assert len(bench.finished) == len(prompts)


def test_a_budget_too_small_for_whole_chunks_still_computes_long_prompts():
    scheduler = Scheduler(KVCacheManager(64, 4), max_num_seqs=8, max_num_batched_tokens=5, chunk_multiple=256)
    bench = Bench(scheduler)
    bench.add("long", 23, 1)
    while scheduler.has_work:
        bench.step()
    assert [count for step in bench.steps for _, _, count in step] == [5, 5, 5, 5, 3]


def test_a_newcomer_waits_until_its_prompt_fits_beside_a_block_more_for_each_running_sequence():
    """Admitted earlier it would be preempted at once, and its tokens computed twice."""
    bench = Bench.make(blocks=10, block_size=4, seqs=8, budget=64)
    bench.add("first", 16, 12)
    bench.step()
    bench.add("second", 20, 2)  # five blocks: they are free, but the first needs its next one too
    bench.step()
    assert [request.request_id for request in bench.scheduler.running] == ["first"]
    while bench.scheduler.has_work:
        bench.step()
    assert bench.scheduler.num_preemptions == 0
