"""The scheduler alone: which request is admitted, which waits and which is preempted."""

from __future__ import annotations

from support.scheduler_bench import Bench, make_request

from pyllm.engine.step.request import RequestStatus


def test_a_request_that_does_not_fit_holds_back_those_behind_it():
    bench = Bench.make(blocks=10, block_size=4, budget=100)
    bench.add("running", 20, 15)
    bench.step()
    bench.add("large", 30, 5)
    bench.add("small", 2, 2)
    bench.step()
    assert [request.request_id for request in bench.scheduler.running] == ["running"]
    assert [request.request_id for request in bench.scheduler.waiting] == ["large", "small"]


def test_youngest_request_is_preempted_when_blocks_run_out():
    bench = Bench.make(blocks=6, block_size=4)
    old, young = bench.add("old", 8, 14), bench.add("young", 8, 14)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert young.status is RequestStatus.PREEMPTED
    assert old.status is RequestStatus.RUNNING
    assert young.num_output_tokens > 0, "what it has said stays said"
    bench.run(100)
    assert [request.request_id for request in bench.finished] == ["old", "young"]


def test_newcomer_waits_for_a_spare_block_per_running_sequence():
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


def test_decode_is_scheduled_even_when_a_prompt_fills_the_step():
    bench = Bench.make(blocks=40, block_size=4, seqs=4, budget=8, policy="priority")
    young = bench.add("young", 4, 20)
    bench.step()
    bench.add("urgent", 60, 1, priority=-1)
    for tokens in range(2, 9):
        bench.step()
        assert young.num_output_tokens == tokens
        assert bench.steps[-1][-1][2] == 7, "the urgent one has all the rest"


def test_priority_orders_by_number_then_arrival():
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


def test_urgent_request_preempts_the_least_urgent_youngest():
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


def test_a_request_of_equal_priority_preempts_no_other():
    bench = Bench.make(seqs=1, policy="priority")
    bench.add("first", 4, 5, priority=1)
    bench.step()
    bench.add("second", 4, 5, priority=1)
    bench.run(20)
    assert bench.scheduler.num_preemptions == 0


def test_small_requests_do_not_starve_a_large_one():
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


def test_cached_prefix_lowers_the_blocks_for_admission():
    bench = Bench.make(blocks=8, block_size=4, budget=64)
    bench.add("first", 17, 8, kind=1)
    bench.step()
    second = bench.add("second", 21, 2, kind=1)
    bench.step()
    assert second.num_cached_tokens == 16, "its four full blocks are held by the first too"
    assert bench.steps[-1] == [("first", 17, 1), ("second", 16, 5)]


def test_no_preemption_for_a_request_that_would_still_not_fit():
    scheduler = Bench.make(blocks=20, budget=200, policy="priority").scheduler
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


def test_background_requests_run_only_where_others_leave_room():
    for policy in ("fcfs", "priority"):
        bench = Bench.make(blocks=40, block_size=4, seqs=2, policy=policy)
        early = [bench.add(f"early {n}", 4, 9, priority=-5, background=True) for n in range(2)]
        bench.step()
        assert {request.status for request in early} == {RequestStatus.RUNNING}
        bench.add("late line", 4, 2, background=True)
        bench.add("client", 4, 2, priority=5)
        bench.step()
        assert [request.request_id for request in bench.scheduler.running] == ["client", "early 0"]
        bench.run(100)
        assert [request.request_id for request in bench.finished] == ["client", "early 0", "early 1", "late line"]


def test_a_background_request_gives_its_blocks_to_others():
    bench = Bench.make(blocks=8, block_size=4)
    line = bench.add("line", 8, 20, background=True)
    bench.step()
    bench.add("client", 8, 14)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert line.status is RequestStatus.PREEMPTED
    bench.run(100)
    assert [request.request_id for request in bench.finished] == ["client", "line"]


def test_few_background_requests_share_steps_with_others():
    bench = Bench.make(blocks=100, block_size=4, seqs=64, budget=200)
    lines = [bench.add(f"line {n}", 4, 30, background=True) for n in range(10)]
    bench.step()
    assert len(bench.steps[-1]) == 10
    client = bench.add("client", 4, 5)
    while client not in bench.finished:
        bench.step()
        assert {name for name, *_ in bench.steps[-1]} == {"client", "line 0"}
        bench.add("late", 4, 1, background=True)
    assert {line.status for line in lines} == {RequestStatus.RUNNING}, "they keep their blocks"
    bench.step()
    assert len(bench.steps[-1]) > 10
    bench.run(100)
