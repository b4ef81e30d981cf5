"""The engine without weights: requests in, tokens out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crowds import ABORTS, check_crowd, crowds, sizes
from support.paged_runner import EOS, VOCAB, expected, finish, make_core, message, runner_of, tokens_of

from pyllm.engine.errors import RequestError
from pyllm.engine.messages import SamplingParams


@settings(max_examples=250, deadline=None)
@given(
    crowd=crowds(min_tokens=st.integers(0, 10)),
    size=sizes(max_num_prefill_tokens=st.none() | st.integers(1, 20)),
    aborts=ABORTS,
)
def test_outputs_are_those_of_one_request_at_a_time(crowd, size, aborts):
    check_crowd(make_core(**size), crowd, aborts)


def test_prefill_and_decode_share_a_step_in_arrival_order():
    core = make_core(max_num_batched_tokens=8)
    core.add_request(message("early", [1, 2, 3], max_tokens=30, ignore_eos=True))
    core.step()
    core.add_request(message("late", list(range(1, 20)), max_tokens=2, ignore_eos=True))
    outputs: dict[str, list[int]] = {"early": [], "late": []}
    while not outputs["late"]:
        step = core.step()
        assert step.stats.step_tokens <= 8
        for output in step.outputs:
            outputs[output.request_id] += output.token_ids
    assert len(outputs["early"]) == 3, "it got a token in each of the late one's three chunks"
    assert runner_of(core).mixed_prefill_and_decode
    finish(core)


def test_a_stop_id_ends_the_request_and_is_its_last_token():
    prompt = [1, 2, 3]
    free, _ = expected(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    stop = free[4]
    core = make_core()
    core.add_request(message("r", prompt, max_tokens=20, ignore_eos=True, stop_token_ids=(stop,)))
    outputs = finish(core)["r"]
    assert tokens_of(outputs) == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == stop
    assert all(output.stop_token_id is None and output.finish_reason is None for output in outputs[:-1])


def test_max_tokens_is_exact_and_wins_no_stop_id():
    core = make_core()
    core.add_request(message("r", [5], max_tokens=7, ignore_eos=True))
    outputs = finish(core)["r"]
    assert len(tokens_of(outputs)) == 7
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].stop_token_id is None


def test_an_end_of_sequence_id_counts_unless_ignored():
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompt = next([first, 9] for first in range(1, VOCAB) if EOS in expected([first, 9], params)[0])
    free, _ = expected(prompt, params)
    core = make_core()
    core.add_request(message("stops", prompt, max_tokens=20))
    core.add_request(message("ignores", prompt, max_tokens=20, ignore_eos=True))
    outputs = finish(core)
    assert tokens_of(outputs["stops"]) == free[: free.index(EOS) + 1]
    assert outputs["stops"][-1].stop_token_id == EOS
    assert tokens_of(outputs["ignores"]) == free


def test_prompt_may_fill_the_context_up_to_max_tokens():
    core = make_core(max_model_len=16, num_blocks=4)
    core.add_request(message("r", [1] * 10, max_tokens=6, ignore_eos=True))
    assert len(tokens_of(finish(core)["r"])) == 6


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [
        ([], {}, "empty_prompt"),
        ([VOCAB], {}, None),
        ([-1], {}, None),
        ([1], {"stop_token_ids": (VOCAB,)}, None),
        ([1], {"stop_token_ids": (-1,)}, None),
        ([1] * 64, {"max_tokens": 1}, "context_length_exceeded"),
        ([1] * 60, {"max_tokens": 5}, "context_length_exceeded"),
        ([1] * 65, {"max_tokens": None}, "context_length_exceeded"),
    ],
)
def test_impossible_request_is_refused_and_leaves_no_state(prompt, params, code):
    core = make_core()
    with pytest.raises(RequestError) as refusal:
        core.add_request(message("r", prompt, **params))
    assert refusal.value.code == code
    assert not core.has_work
    core.check_idle()


def test_request_over_the_pool_is_refused_at_the_exact_limit():
    core = make_core(num_blocks=5, block_size=4)
    with pytest.raises(RequestError, match="KV cache holds 20 tokens, but the prompt has 15 tokens and up to 7 more"):
        core.add_request(message("r", [1] * 15, max_tokens=7))
    core.check_idle()
    core.add_request(message("r", [1] * 15, max_tokens=6, ignore_eos=True))  # the last token is never computed
    assert len(tokens_of(finish(core)["r"])) == 6


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1])
def test_a_priority_beyond_32_bits_is_refused(priority):
    core = make_core()
    with pytest.raises(RequestError) as refusal:
        core.add_request(message("r", [1], priority=priority))
    assert refusal.value.param == "priority"


def test_duplicate_request_id_is_refused_while_running():
    core = make_core()
    core.add_request(message("r", [1], max_tokens=3, ignore_eos=True))
    with pytest.raises(RequestError, match="already running"):
        core.add_request(message("r", [2], max_tokens=3))
    assert tokens_of(finish(core)["r"]) == expected([1], SamplingParams(max_tokens=3, ignore_eos=True))[0]
    core.add_request(message("r", [2], max_tokens=3))
    finish(core)


def test_an_abort_of_unknown_and_finished_requests_is_harmless():
    core = make_core()
    core.abort(["never seen"])
    core.add_request(message("r", [1], max_tokens=1))
    finish(core)
    core.abort(["r", "r"])
    core.check_idle()


def test_an_abort_of_all_leaves_an_idle_engine():
    core = make_core(max_num_seqs=2, max_num_batched_tokens=8)
    for i in range(5):
        core.add_request(message(str(i), [1] * 20, max_tokens=10))
    core.step()
    core.abort([str(i) for i in range(5)])
    assert not core.has_work
    core.check_idle()
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


def test_a_leaked_block_is_noticed_when_the_engine_is_idle():
    core = make_core()
    assert core.scheduler.kv_cache.pool.allocate(1)
    with pytest.raises(RuntimeError, match="1 KV blocks"):
        core.check_idle()
    core.add_request(message("r", [1], max_tokens=1))
    with pytest.raises(RuntimeError, match="1 KV blocks"):
        core.step()


def test_stats_say_what_runs_and_what_the_step_did():
    core = make_core(max_num_seqs=2, num_blocks=20, max_num_batched_tokens=30)
    for i in range(3):
        core.add_request(message(str(i), [1 + i] * 10, max_tokens=10, ignore_eos=True))
    stats = core.step().stats
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert stats.step_tokens == 20
    assert stats.kv_cache_usage == pytest.approx(6 / 20)
    assert stats.step_seconds > 0
    assert core.step().stats.step_tokens == 2


def test_logprobs_come_with_their_tokens_through_preemption():
    core = make_core(num_blocks=16, max_model_len=64)
    for i in range(4):
        core.add_request(message(str(i), [1 + i] * 20, max_tokens=20, ignore_eos=True, logprobs=0))
    outputs = finish(core)
    assert core.scheduler.num_preemptions > 0
    for own in outputs.values():
        assert [found.token_id for output in own for found in output.logprobs] == tokens_of(own)


def test_a_step_without_work_does_nothing():
    step = make_core().step()
    assert step.outputs == []
    assert step.stats.step_tokens == 0
