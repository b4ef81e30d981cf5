"""The scheduler alone: budgets, order, fairness and blocks, with tokens that nobody computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.engine.config import SchedulingPolicy
from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.step.kv_cache import KVCacheManager
from pyllm.engine.step.request import Request, RequestStatus
from pyllm.engine.step.scheduler import Scheduler, SchedulerOutput


def make_request(name: str, tokens: list[int], output: int, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=output)
    return Request(
        EngineRequest(request_id=name, prompt_token_ids=tokens, params=params, priority=priority), eos_token_ids=()
    )


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
    def make(
        cls,
        *,
        blocks: int = 64,
        block_size: int = 4,
        seqs: int = 8,
        budget: int = 32,
        prefill: int | None = None,
        policy: SchedulingPolicy = "fcfs",
    ) -> Bench:
        cache = KVCacheManager(blocks, block_size)
        return cls(
            Scheduler(
                cache,
                max_num_seqs=seqs,
                max_num_batched_tokens=budget,
                max_num_prefill_tokens=prefill,
                policy=policy,
            )
        )

    def add(self, name: str, prompt: int, output: int, *, priority: int = 0, kind: int | None = None) -> Request:
        """A request whose prompt is like those of its `kind`, and like no other without one."""
        tokens = [1000 + len(self.arrived) if kind is None else kind] * prompt
        request = make_request(name, tokens, output, priority)
        self.arrived.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        scheduler = self.scheduler
        before = list(scheduler.running)
        left = {id(request): request.num_tokens - request.num_computed_tokens for request in before}
        preemptions = scheduler.num_preemptions
        planned = scheduler.schedule()
        self.check_choice(planned, before, left)
        self.check_ranks(planned, before, scheduler.num_preemptions - preemptions)
        self.check_blocks()
        self.admitted += [r.request_id for r in scheduler.running if r not in before]
        self.steps.append(
            [(s.request.request_id, s.request.num_computed_tokens, s.num_tokens) for s in planned.sequences]
        )
        for sequence in planned.sequences:
            request = sequence.request
            scheduler.kv_cache.advance(request, sequence.num_tokens)
            assert sequence.samples == (request.num_computed_tokens == request.num_tokens)
            if sequence.samples:
                request.append(7)
                if request.finish_reason is not None:
                    scheduler.finish(request)
                    self.finished.append(request)
        return planned

    def check_choice(self, planned: SchedulerOutput, before: list[Request], left: dict[int, int]) -> None:
        """What is in the step, given what each of those who ran `before` had left to compute."""
        scheduler = self.scheduler
        counts = [sequence.num_tokens for sequence in planned.sequences]
        chosen = {id(sequence.request): sequence.num_tokens for sequence in planned.sequences}
        assert all(count > 0 for count in counts)
        assert sum(counts) == planned.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len(chosen) == len(counts), "a request is in a step once"
        assert [count > 1 for count in counts] == sorted(count > 1 for count in counts), "single tokens come first"
        decodes = [request for request in before if left[id(request)] == 1 and request in scheduler.running]
        assert all(id(request) in chosen for request in decodes), "nobody's decode waits"
        if decodes:
            limit = scheduler.max_num_prefill_tokens * max(8, len(decodes)) // 8
            assert sum(counts) - len(decodes) <= limit
        if scheduler.has_work:
            assert scheduler.running, "a step moves on"
            assert id(scheduler.running[0]) in chosen, "the first in rank moves on in every step"

    def check_ranks(self, planned: SchedulerOutput, before: list[Request], preempted: int) -> None:
        """Who runs, who waits, and who was set back."""
        scheduler = self.scheduler
        running = [request.rank for request in scheduler.running]
        waiting = [request.rank for request in scheduler.waiting]
        assert running == sorted(running)
        assert waiting == sorted(waiting)
        newcomers = [request for request in scheduler.running if request not in before]
        assert not newcomers or not waiting or max(r.rank for r in newcomers) < waiting[0], "nobody overtakes"
        gone = [request for request in before if request not in scheduler.running]
        set_back = before[len(before) - preempted :]
        assert [request for request in set_back if request in gone] == gone, "those of lowest rank are set back"
        best = min(request.rank for request in [*before, *scheduler.waiting, *scheduler.running]) if before else None
        if before and before[0].rank == best:
            assert before[0] in scheduler.running, "the first of all is never set back"
        if scheduler.policy == "fcfs":
            assert gone == set_back
            assert not preempted or not newcomers
            assert not running or not waiting or running[-1] < waiting[0]

    def check_blocks(self) -> None:
        scheduler = self.scheduler
        pool = scheduler.kv_cache.pool
        owned = {block for request in scheduler.running for block in request.block_ids}
        assert len(owned) == pool.num_blocks - pool.num_free
        for request in scheduler.running:
            assert len(request.block_ids) == -(-request.num_tokens // scheduler.kv_cache.block_size)
        assert all(not request.block_ids and not request.num_computed_tokens for request in scheduler.waiting)

    def run(self, limit: int) -> None:
        """Step until idle; fail if that takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still at work after {limit} steps"
        self.scheduler.kv_cache.pool.check_idle()


# Prompt, output, priority, and which prompts it begins like.
REQUESTS = st.tuples(st.integers(1, 40), st.integers(1, 25), st.integers(0, 2), st.sampled_from([None, None, 1, 2]))


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    seqs=st.integers(1, 9),
    budget=st.integers(1, 50),
    prefill=st.none() | st.integers(1, 20),
    block_size=st.integers(1, 9),
    spare=st.integers(0, 30),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_every_request_ends_within_bounds_and_gives_its_blocks_back(
    requests, gaps, seqs, budget, prefill, block_size, spare, policy
):
    largest = max(prompt + output for prompt, output, _, _ in requests)
    bench = Bench.make(
        blocks=-(-largest // block_size) + spare,
        block_size=block_size,
        seqs=seqs,
        budget=budget,
        prefill=prefill,
        policy=policy,
    )
    # The first in rank moves on in every step, so even one after the other they are done by then.
    chunk = max(1, min(prefill or budget, budget - seqs + 1))
    bound = sum(-(-(prompt + output) // chunk) + output for prompt, output, _, _ in requests)
    for i, (prompt, output, priority, kind) in enumerate(requests):
        bench.add(str(i), prompt, output, priority=priority, kind=kind)
        for _ in range(gaps[i]):
            bench.step()
    bench.run(bound + len(requests))
    assert sorted(request.request_id for request in bench.finished) == sorted(str(i) for i in range(len(requests)))
    for request, (prompt, output, _, _) in zip(bench.arrived, requests, strict=True):
        assert request.num_output_tokens == output
        assert request.status is RequestStatus.FINISHED
        computed = [(first, count) for step in bench.steps for name, first, count in step if name == request.request_id]
        position = computed[0][0]
        assert position == request.num_cached_tokens
        for first, count in computed:
            again = first % block_size == 0  # after a preemption, from what of it is left in the cache
            assert first == position or again, "chunks follow one another"
            position = first + count
        assert position == prompt + output - 1, "the last token is never computed"
    if policy == "fcfs":
        first_times = list(dict.fromkeys(bench.admitted))
        assert first_times == [str(i) for i in range(len(requests))], "admitted in the order of arrival"


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=2, max_size=8),
    events=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=8),
    budget=st.integers(1, 40),
    blocks=st.integers(17, 40),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_an_abort_at_any_time_gives_the_blocks_back(requests, events, budget, blocks, policy):
    bench = Bench.make(blocks=blocks, block_size=4, seqs=5, budget=budget, policy=policy)
    for i, (prompt, output, priority, kind) in enumerate(requests):
        bench.add(str(i), prompt, output, priority=priority, kind=kind)
    for index, steps in events:
        for _ in range(steps):
            bench.step()
        request = bench.arrived[index % len(requests)]
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


def test_prompts_get_a_limited_share_of_a_step_in_which_others_decode():
    bench = Bench.make(budget=64, prefill=6, blocks=100)
    bench.add("early", 20, 10)
    bench.step()
    assert bench.steps[-1] == [("early", 0, 20)], "nobody decodes: the whole budget is for prompts"
    bench.add("one", 9, 2)
    bench.add("other", 30, 2)
    for _ in range(3):
        bench.step()
    assert bench.steps[1:] == [
        [("early", 20, 1), ("one", 0, 6)],
        [("early", 21, 1), ("one", 6, 3), ("other", 0, 3)],
        [("early", 22, 1), ("one", 9, 1), ("other", 3, 6)],
    ]


def test_the_limit_of_prompts_beside_decodes_still_lets_whole_blocks_of_queries_through():
    scheduler = Scheduler(
        KVCacheManager(64, 4), max_num_seqs=4, max_num_batched_tokens=64, max_num_prefill_tokens=5, chunk_multiple=16
    )
    bench = Bench(scheduler)
    bench.add("early", 2, 10)
    bench.step()
    bench.add("long", 40, 1)
    bench.run(20)
    assert [(first, count) for step in bench.steps for name, first, count in step if name == "long"] == [
        (0, 16), (16, 16), (32, 8)
    ]  # fmt: skip


def test_a_decode_is_in_the_step_even_if_an_older_prompt_could_fill_it():
    bench = Bench.make(blocks=40, block_size=4, seqs=4, budget=8, policy="priority")
    young = bench.add("young", 4, 20)
    bench.step()
    bench.add("urgent", 60, 1, priority=-1)
    for tokens in range(2, 9):
        bench.step()
        assert young.num_output_tokens == tokens
        assert bench.steps[-1][-1][2] == 7, "the urgent one has all the rest"


def test_with_the_priority_policy_the_lowest_number_goes_first_and_ties_go_by_arrival():
    bench = Bench.make(seqs=1, policy="priority")
    for name, priority in (("a", 0), ("b", 5), ("c", 1), ("d", 5), ("e", -3), ("f", 1)):
        bench.add(name, 3, 2, priority=priority)
    bench.run(40)
    assert [request.request_id for request in bench.finished] == ["e", "a", "c", "f", "b", "d"]


def test_without_the_priority_policy_priorities_mean_nothing():
    bench = Bench.make(seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -7)):
        bench.add(name, 3, 2, priority=priority)
    bench.run(40)
    assert [request.request_id for request in bench.finished] == ["a", "b", "c"]


def test_an_urgent_request_takes_the_seat_of_the_least_urgent_youngest_one():
    bench = Bench.make(seqs=3, policy="priority")
    requests = {name: bench.add(name, 4, 8, priority=priority) for name, priority in (("a", 1), ("b", 2), ("c", 2))}
    bench.step()
    urgent = bench.add("urgent", 4, 2, priority=0)
    bench.step()
    assert urgent.num_output_tokens == 1
    assert requests["c"].status is RequestStatus.PREEMPTED
    assert [request.request_id for request in bench.scheduler.running] == ["urgent", "a", "b"]
    bench.run(100)
    assert bench.scheduler.num_preemptions == 1
    assert all(request.num_output_tokens == 8 for request in requests.values())


def test_an_urgent_request_gets_the_blocks_of_less_urgent_ones():
    bench = Bench.make(blocks=10, block_size=4, policy="priority")
    old = bench.add("old", 30, 6, priority=1)
    bench.step()
    urgent = bench.add("urgent", 16, 4, priority=0)
    bench.step()
    assert (urgent.status, old.status) == (RequestStatus.RUNNING, RequestStatus.PREEMPTED)
    bench.run(100)
    assert [request.request_id for request in bench.finished] == ["urgent", "old"]


def test_a_request_of_equal_priority_displaces_nobody():
    bench = Bench.make(seqs=1, policy="priority")
    bench.add("first", 4, 5, priority=1)
    bench.step()
    bench.add("second", 4, 5, priority=1)
    bench.run(20)
    assert bench.scheduler.num_preemptions == 0


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones_that_would_fit():
    bench = Bench.make(blocks=16, block_size=4, budget=64)
    for i in range(4):
        bench.add(f"early-{i}", 8, 8)
    bench.step()
    large = bench.add("large", 56, 4)
    for i in range(60):
        bench.add(f"small-{i}", 4, 6)
        bench.step()
    assert large.status is RequestStatus.FINISHED
    assert bench.admitted.index("large") == 4
    bench.run(1000)


def test_a_prompt_whose_head_is_in_the_cache_needs_only_the_rest_of_its_blocks():
    bench = Bench.make(blocks=8, block_size=4, budget=64)
    bench.add("first", 17, 8, kind=1)
    bench.step()
    second = bench.add("second", 21, 2, kind=1)
    bench.step()
    assert second.num_cached_tokens == 16, "its four full blocks are held by the first too"
    assert bench.steps[-1] == [("first", 17, 1), ("second", 16, 5)]


def test_nobody_is_displaced_for_a_request_that_would_not_fit_even_then():
    scheduler = Scheduler(KVCacheManager(20, 4), max_num_seqs=8, max_num_batched_tokens=200, policy="priority")
    first = make_request("first", list(range(1, 49)), 8, priority=0)  # 12 of the 20 blocks
    later = make_request("later", list(range(100, 108)), 8, priority=2)
    for request in (first, later):
        scheduler.add(request)
    scheduler.schedule()
    assert first.status is later.status is RequestStatus.RUNNING
    scheduler.add(make_request("between", list(range(200, 240)), 8, priority=1))  # 10 blocks: 8 are not the first's
    scheduler.schedule()
    assert later.status is RequestStatus.RUNNING
    assert scheduler.num_preemptions == 0
