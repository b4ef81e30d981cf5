"""The scheduler alone: what clients get of the sequences, the blocks and the prompt tokens of each step."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_runner import expected, make_core, message
from support.scheduler_bench import Bench

from pyllm.engine.step.request import RequestStatus

# Prompt, output, priority, and which prompts it begins like.
REQUESTS = st.tuples(st.integers(1, 40), st.integers(1, 25), st.integers(0, 2), st.sampled_from([None, None, 1, 2]))
FEW = 3
"""Steps until the first token of a client that asks for little."""


def fill(bench: Bench, count: int, prompt: int, output: int, client: str = "greedy") -> None:
    for n in range(count):
        bench.add(f"{client}-{n}", prompt, output, client=client)
    bench.step()


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(REQUESTS, st.sampled_from(["a", "b", "c"])), min_size=1, max_size=14),
    gaps=st.lists(st.integers(0, 6), min_size=14, max_size=14),
    seqs=st.integers(1, 9),
    budget=st.integers(1, 50),
    prefill=st.none() | st.integers(1, 20),
    block_size=st.integers(1, 9),
    spare=st.integers(0, 30),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_every_client_is_served_to_the_end(requests, gaps, seqs, budget, prefill, block_size, spare, policy):
    largest = max(prompt + output for (prompt, output, _, _), _ in requests)
    bench = Bench.make(
        blocks=-(-largest // block_size) + spare, block_size=block_size, seqs=seqs, budget=budget, prefill=prefill,
        policy=policy,
    )  # fmt: skip
    chunk = max(1, min(prefill or budget, budget - seqs + 1))
    bound = sum(-(-(prompt + output) // chunk) + output for (prompt, output, _, _), _ in requests)
    for i, ((prompt, output, priority, kind), client) in enumerate(requests):
        bench.add(str(i), prompt, output, priority=priority, kind=kind, client=client)
        for _ in range(gaps[i]):
            bench.step()
    bench.run(2 * bound + len(requests))
    assert len(bench.finished) == len(requests)
    for request, ((_, output, _, _), _) in zip(bench.arrived, requests, strict=True):
        assert request.num_output_tokens == output


@settings(max_examples=100, deadline=None)
@given(
    greedy=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=12, max_size=40),
    steps=st.integers(1, 60),
    prompt=st.integers(1, 6),
    seqs=st.integers(2, 8),
    blocks=st.integers(40, 200),
    prefill=st.integers(8, 20),
)
def test_a_small_request_starts_in_few_steps(greedy, steps, prompt, seqs, blocks, prefill):
    """However long the other client's requests are, and whatever is short: sequences, blocks or prompt tokens."""
    bench = Bench.make(blocks=blocks, block_size=4, seqs=seqs, budget=seqs + 24, prefill=prefill)
    for n, (length, output) in enumerate(greedy):
        bench.add(str(n), length, output, client="greedy")
    for _ in range(steps):
        bench.step()
    held = [len(request.block_ids) for request in bench.scheduler.running]
    other = bench.add("other", prompt, 3, client="other")
    taken = 0
    while other.num_output_tokens < 1:
        bench.step()
        taken += 1
        if taken > FEW and sum(held[:1]) + prompt + seqs + 4 > blocks:
            return  # the greedy client's only request holds the pool, and is within its share
    assert taken <= FEW
    bench.run(5000)


def test_a_single_request_pauses_the_last_of_many():
    bench = Bench.make(blocks=400, block_size=4, seqs=8)
    fill(bench, 500, 3, 300)
    for _ in range(3):
        bench.step()
    assert len(bench.scheduler.running) == 8
    last, computed = bench.arrived[7], bench.arrived[7].num_computed_tokens
    single = bench.add("single", 5, 4, client="other")
    bench.step()
    assert single.num_output_tokens == 1
    assert (last.status, last.num_computed_tokens) == (RequestStatus.RUNNING, computed), "it keeps its blocks"
    assert "greedy-7" not in {name for name, *_ in bench.steps[-1]}
    assert (bench.scheduler.num_paused, bench.scheduler.num_preemptions) == (1, 0)
    for _ in range(3):
        bench.step()
    assert single.status is RequestStatus.FINISHED
    bench.step()
    assert ("greedy-7", computed, 1) in bench.steps[-1]


def test_two_clients_with_many_requests_get_half_each():
    bench = Bench.make(blocks=2000, block_size=4, seqs=8, budget=64)
    fill(bench, 100, 4, 40, "early")
    for _ in range(5):
        bench.step()
    fill(bench, 100, 4, 40, "late")
    for _ in range(8):
        bench.step()
    counts = Counter(name.partition("-")[0] for step in bench.steps[-40:] for name, *_ in step)
    for _ in range(200):
        bench.step()
        counts = Counter(name.partition("-")[0] for name, *_ in bench.steps[-1])
        assert abs(counts["early"] - counts["late"]) <= 2
    assert bench.scheduler.num_preemptions == 0


def test_with_more_clients_than_sequences_none_is_interrupted():
    bench = Bench.make(blocks=400, block_size=4, seqs=3)
    for n in range(9):
        bench.add(f"{n}", 3, 10, client=f"client-{n % 6}")
    bench.step()
    while bench.scheduler.has_work:
        bench.step()
        assert bench.scheduler.num_paused == 0
    assert bench.scheduler.num_preemptions == 0
    names = [bench.arrived[int(request.request_id)].client for request in bench.finished]
    assert sorted(names[:6]) == [f"client-{n}" for n in range(6)], "each one's first request comes before any second"


def test_a_short_prompt_does_not_wait_for_long_ones():
    bench = Bench.make(blocks=2000, block_size=4, seqs=8, budget=32, prefill=16)
    for n in range(50):
        bench.add(f"long-{n}", 400, 2, client="greedy")
    for _ in range(5):
        bench.step()
    for n in range(5):
        short = bench.add(f"short-{n}", 10, 2, client="other")
        bench.step()
        assert short.num_output_tokens == 1
        bench.step()


def test_long_prompts_of_two_clients_are_read_in_turns():
    bench = Bench.make(blocks=2000, block_size=4, seqs=8, budget=32)
    for client in ("a", "b"):
        for n in range(4):
            bench.add(f"{client}-{n}", 320, 1, client=client)
    for _ in range(20):
        bench.step()
    counts = Counter({"a": 0, "b": 0})
    for step in bench.steps:
        for name, _, count in step:
            counts[name[0]] += count
    assert abs(counts["a"] - counts["b"]) <= 32
    assert len(bench.finished) >= 2


def test_blocks_are_shared_by_what_requests_hold():
    """The large requests of one client give way to another's, down to an equal share, and to no more."""
    bench = Bench.make(blocks=60, block_size=4, seqs=8, budget=200)
    for n in range(6):
        bench.add(f"large-{n}", 60, 20, client="greedy")  # 15 blocks each, and 20 in the end
    bench.step()
    assert len(bench.scheduler.running) == 3
    small = bench.add("small", 40, 4, client="other")
    for _ in range(FEW):
        bench.step()
    assert small.num_output_tokens >= 1
    assert [request.request_id for request in bench.scheduler.running] == ["large-0", "large-1", "small"]
    equal = bench.add("too much", 60, 20, client="other")
    bench.step()
    assert equal.status is RequestStatus.WAITING
    preemptions = bench.scheduler.num_preemptions
    bench.run(400)
    assert bench.scheduler.num_preemptions - preemptions <= 4
    assert len(bench.finished) == 8


def test_a_client_saves_nothing_up_while_it_asks_for_nothing():
    bench = Bench.make(blocks=4000, block_size=4, seqs=4, budget=40)
    fill(bench, 60, 200, 1, "busy")
    for _ in range(100):
        bench.step()
    for n in range(20):
        bench.add(f"new-{n}", 200, 1, client="new")
    counts = Counter({"busy": 0, "new": 0})
    for _ in range(40):
        bench.step()
        for name, _, count in bench.steps[-1]:
            counts[name.partition("-")[0]] += count
    assert abs(counts["busy"] - counts["new"]) <= 80


def test_priority_goes_before_fairness():
    bench = Bench.make(blocks=400, block_size=4, seqs=2, policy="priority")
    for n in range(4):
        bench.add(f"urgent-{n}", 3, 3, priority=0, client="greedy")
    bench.add("patient", 3, 3, priority=1, client="other")
    bench.run(60)
    assert [request.request_id for request in bench.finished][-1] == "patient"


def test_one_client_alone_is_served_in_order_of_arrival():
    plain, named = (Bench.make(blocks=12, block_size=4, seqs=3, budget=16) for _ in range(2))
    for bench, client in ((plain, ""), (named, "one")):
        for n in range(20):
            bench.add(str(n), 1 + n * 7 % 23, 1 + n * 5 % 11, client=client)
        bench.run(1000)
    assert plain.steps == named.steps
    assert plain.scheduler.num_preemptions == named.scheduler.num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_answers_are_those_of_each_request_alone(overlap, data):
    core = make_core(
        num_blocks=data.draw(st.integers(14, 40)), block_size=4, max_num_seqs=data.draw(st.integers(1, 5)),
        max_num_batched_tokens=data.draw(st.integers(5, 30)), overlap_scheduling=overlap,
        enable_prefix_caching=data.draw(st.booleans()),
    )  # fmt: skip
    wanted, found = {}, {}
    for n in range(data.draw(st.integers(2, 12))):
        prompt = data.draw(st.lists(st.integers(1, 49), min_size=1, max_size=24))
        request = message(str(n), prompt, max_tokens=data.draw(st.integers(1, 20)))
        wanted[str(n)], _ = expected(prompt, request.params)
        found[str(n)] = []
        core.add_request(msgspec.structs.replace(request, client=data.draw(st.sampled_from("abc"))))
        for _ in range(data.draw(st.integers(0, 4))):
            for output in core.step().outputs:
                found[output.request_id] += output.token_ids
    for _ in range(3000):
        if not core.has_requests:
            break
        for output in core.step().outputs:
            found[output.request_id] += output.token_ids
    assert found == wanted
    core.check_idle()
