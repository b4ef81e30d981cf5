"""The scheduler alone: budgets, chunks and blocks, with tokens that are never computed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduler_bench import Bench

from pyllm.engine.step.request import RequestStatus

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
def test_every_request_ends_in_bounds_and_frees_its_blocks(
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


def test_long_prompt_is_chunked_while_others_decode():
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


def test_no_more_sequences_run_than_allowed():
    bench = Bench.make(seqs=2)
    for i in range(5):
        bench.add(str(i), 2, 3)
    bench.step()
    assert len(bench.scheduler.running) == 2
    bench.run(20)


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
    bench = Bench.make(blocks=400, budget=8 + multiple + spare, chunk_multiple=multiple)
    requests = {str(i): bench.add(str(i), prompt, 3) for i, prompt in enumerate(prompts)}
    for _ in range(400):
        if not bench.scheduler.has_work:
            break
        lengths = {name: request.num_tokens for name, request in requests.items()}
        bench.step()
        for name, start, count in bench.steps[-1]:
            assert start + count == lengths[name] or (start + count) % multiple == 0
    assert len(bench.finished) == len(prompts)


def test_tiny_token_budget_still_computes_long_prompts():
    bench = Bench.make(budget=5, chunk_multiple=256)
    bench.add("long", 23, 1)
    while bench.scheduler.has_work:
        bench.step()
    assert [count for step in bench.steps for _, _, count in step] == [5, 5, 5, 5, 3]


def test_prefill_share_of_a_decode_step_is_limited():
    bench = Bench.make(budget=64, prefill=6, blocks=100)
    bench.add("early", 20, 10)
    bench.step()
    assert bench.steps[-1] == [("early", 0, 20)], "no request decodes: the whole budget is for prompts"
    bench.add("one", 9, 2)
    bench.add("other", 30, 2)
    for _ in range(3):
        bench.step()
    assert bench.steps[1:] == [
        [("early", 20, 1), ("one", 0, 6)],
        [("early", 21, 1), ("one", 6, 3), ("other", 0, 3)],
        [("early", 22, 1), ("one", 9, 1), ("other", 3, 6)],
    ]


def test_a_limited_prompt_still_gets_whole_blocks_of_queries():
    bench = Bench.make(seqs=4, budget=64, prefill=5, chunk_multiple=16)
    bench.add("early", 2, 10)
    bench.step()
    bench.add("long", 40, 1)
    bench.run(20)
    assert [(first, count) for step in bench.steps for name, first, count in step if name == "long"] == [
        (0, 16), (16, 16), (32, 8)
    ]  # fmt: skip
