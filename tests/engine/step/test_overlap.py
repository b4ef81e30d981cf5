"""The engine with a step in flight while the next one is planned: the same answers as one step at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crowds import ABORTS, check_crowd, crowds, sizes
from support.paged_runner import EOS, VOCAB, expected, finish, make_core, message, runner_of, tokens_of

from pyllm import LLM
from pyllm.engine.messages import SamplingParams, TokenOutput
from pyllm.engine.step.core import EngineCore


def overlapped(**sizes: object) -> EngineCore:
    return make_core(overlap_scheduling=True, **sizes)


@settings(max_examples=250, deadline=None)
@given(
    crowd=crowds(
        stop_after=st.none() | st.none() | st.integers(1, 6),
        logprobs=st.sampled_from([None, None, None, 0]),  # the host reads more than the token
    ),
    size=sizes(),
    aborts=ABORTS,
    failures=st.lists(st.booleans(), max_size=12),
)
def test_outputs_are_those_of_one_request_at_a_time(crowd, size, aborts, failures):
    core = overlapped(**size)
    # Never so many failures in a row that a step of one sequence is given up.
    runner_of(core).failures = [failed and n % 3 == 0 for n, failed in enumerate(failures)]
    check_crowd(core, crowd, aborts)


def free_running(prompt: list[int], count: int = 20) -> list[int]:
    return expected(prompt, SamplingParams(max_tokens=count, ignore_eos=True))[0]


def test_a_step_begins_before_the_one_before_it_is_read():
    core = overlapped()
    core.add_request(message("r", [1, 2, 3], max_tokens=5, ignore_eos=True))
    came = []
    while core.has_work:
        came.append((runner_of(core).num_launched, [t for o in core.step().outputs for t in o.token_ids]))
    assert [len(tokens) for _, tokens in came] == [0, 1, 1, 1, 1, 1]
    assert [token for _, tokens in came for token in tokens] == free_running([1, 2, 3], 5)


def test_no_step_is_wasted_on_a_sequence_whose_length_is_known():
    core = overlapped()
    core.add_request(message("a", [1, 2, 3], max_tokens=4, ignore_eos=True))
    core.add_request(message("b", [4], max_tokens=2, ignore_eos=True))
    finish(core)
    assert runner_of(core).num_computed == (3 + 3) + (1 + 1)
    assert runner_of(core).num_launched == 4


def test_stop_id_wastes_one_token_and_reports_none_past_it():
    prompt = [1, 2, 3]
    free = free_running(prompt)
    core = overlapped()
    core.add_request(message("r", prompt, max_tokens=20, ignore_eos=True, stop_token_ids=(free[4],)))
    outputs = finish(core)["r"]
    kept = free.index(free[4]) + 1
    assert tokens_of(outputs) == free[:kept]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == free[4]
    assert runner_of(core).num_computed == len(prompt) + kept  # the last of them is discarded


def test_an_idle_engine_waits_for_nothing_after_an_abort():
    core = overlapped()
    core.add_request(message("r", [1, 2, 3], max_tokens=20, ignore_eos=True))
    core.step()
    core.step()
    core.abort(["r"])
    assert not core.has_work
    core.check_idle()
    core.add_request(message("next", [1, 2, 3], max_tokens=6, ignore_eos=True))
    assert tokens_of(finish(core)["next"]) == free_running([1, 2, 3], 6)


def test_blocks_of_an_ended_sequence_are_reused_in_flight():
    """The step in flight still writes to the blocks that the next sequence gets."""
    core = overlapped(num_blocks=4, block_size=4, max_model_len=16, enable_prefix_caching=False)
    prompts = {str(n): [n + 1] * 5 for n in range(6)}
    for name, prompt in prompts.items():
        stop = free_running(prompt)[2]
        core.add_request(message(name, prompt, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,)))
    outputs = finish(core)
    for name, prompt in prompts.items():
        free = free_running(prompt)
        assert tokens_of(outputs[name]) == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("field", [{"logprobs": 1}, {"presence_penalty": 0.5}, {"min_tokens": 2}])
def test_steps_that_need_the_host_are_not_overlapped(field):
    core = overlapped()
    core.add_request(message("plain", [1, 2, 3], max_tokens=20, ignore_eos=True))
    core.step()
    core.step()
    core.add_request(message("needs", [4, 5], max_tokens=3, ignore_eos=True, **field))
    outputs: dict[str, list[TokenOutput]] = {}
    steps = 0
    while not outputs.get("needs") or outputs["needs"][-1].finish_reason is None:
        launched = runner_of(core).num_launched
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        assert runner_of(core).num_launched == launched
        steps += 1
    assert steps == 3
    assert len(tokens_of(outputs["plain"])) == 1 + 3, "the one in flight and three more"
    core.step()
    assert runner_of(core).num_launched == launched + 1, "and then the steps overlap again"
    finish(core)


def test_a_prompt_in_chunks_overlaps_with_its_own_first_tokens():
    core = overlapped(max_num_batched_tokens=8)
    prompt = list(range(1, 30))
    core.add_request(message("r", prompt, max_tokens=5, ignore_eos=True))
    assert [len(core.step().outputs) for _ in range(5)] == [0, 0, 0, 0, 1]
    finish(core)


def test_a_preempted_request_continues_with_its_in_flight_token():
    core = overlapped(num_blocks=8, block_size=2, max_model_len=16)
    prompts = {str(n): [n + 1, n + 2] for n in range(4)}
    for name, prompt in prompts.items():
        core.add_request(message(name, prompt, max_tokens=10, ignore_eos=True))
    outputs = finish(core)
    assert core.scheduler.num_preemptions > 0
    assert all(tokens_of(outputs[name]) == free_running(prompt, 10) for name, prompt in prompts.items())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_without_memory_is_made_smaller_and_tried_again(overlap):
    core = make_core(overlap_scheduling=overlap, max_num_batched_tokens=64)
    prompts = {str(n): [n + 1] * 10 for n in range(4)}
    for name, prompt in prompts.items():
        core.add_request(message(name, prompt, max_tokens=6, ignore_eos=True))
    runner_of(core).failures = [False, True, True, True]
    most, step, sizes = core.scheduler.max_num_seqs, core.step, []
    core.step = lambda: (step(), sizes.append(core.scheduler.max_num_seqs))[0]
    outputs = finish(core)
    assert all(tokens_of(outputs[name]) == free_running(prompt, 6) for name, prompt in prompts.items())
    assert min(sizes) < 4
    assert core.scheduler.max_num_seqs == most, "without work there is nothing left that needs so much"


@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_for_one_request_says_what_to_set(overlap):
    core = make_core(overlap_scheduling=overlap)
    core.add_request(message("r", [1] * 20, max_tokens=6, ignore_eos=True))
    runner_of(core).failures = [True] * 4
    last = finish(core)["r"][-1]
    assert last.finish_reason == "error"
    assert "lower --gpu-memory-utilization" in (last.error or "")
    core.add_request(message("after", [2, 3], max_tokens=6, ignore_eos=True))
    assert tokens_of(finish(core)["after"]) == free_running([2, 3], 6)


def test_eos_with_the_next_step_in_flight_ends_the_answer():
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompt = next([first, 9] for first in range(1, VOCAB) if EOS in expected([first, 9], params)[0])
    core = overlapped()
    core.add_request(message("r", prompt, max_tokens=20))
    outputs = finish(core)["r"]
    assert (tokens_of(outputs), outputs[-1].finish_reason) == expected(prompt, SamplingParams(max_tokens=20))


def test_overlap_does_not_change_answers(tiny_checkpoint):
    prompts = ["The same beginning, and then this", "The same beginning, and then that", "c", "d" * 90, "e", "f"]
    params = [
        SamplingParams(max_tokens=30, temperature=0.0),
        SamplingParams(max_tokens=25, temperature=1.0, seed=1, stop=("a", "9")),
        SamplingParams(max_tokens=25, temperature=0.8, top_p=0.9, seed=2, stop_token_ids=(70, 71, 72, 73, 74)),
        SamplingParams(max_tokens=20, temperature=1.0, top_k=5, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=1.0, seed=4, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=30, temperature=1.0, min_p=0.05, seed=5, frequency_penalty=0.5),
    ]

    def answers(overlap: bool) -> list[tuple[str, list[int], str | None, str | int | None]]:
        llm = LLM(
            str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=40, max_model_len=128,
            max_num_seqs=4, max_num_batched_tokens=32, block_size=8, overlap_scheduling=overlap,
        )  # fmt: skip
        found = llm.generate(prompts, params) + llm.generate(prompts, params)  # then from the prefix cache
        return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in found]

    assert answers(overlap=True) == answers(overlap=False)
