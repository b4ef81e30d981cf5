"""Prefixes that were computed once are not computed again, and only the time shows it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_runner import VOCAB, expected, finish, make_core, message, runner_of, tokens_of

from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import EngineRequest, SamplingParams, TokenOutput
from pyllm.engine.step.core import EngineCore
from pyllm.engine.step.request import Request

RANDOM = random.Random(3)
PROMPT = [RANDOM.randrange(1, VOCAB) for _ in range(30)]


def ask(core: EngineCore, prompt: list[int], count: int = 6, **params: object) -> tuple[list[int], TokenOutput, int]:
    """The answer to one request on its own, its first output, and how many tokens it made the engine compute."""
    before = runner_of(core).num_computed
    core.add_request(message("r", prompt, max_tokens=count, ignore_eos=True, **params))
    outputs = finish(core)["r"]
    return tokens_of(outputs), outputs[0], runner_of(core).num_computed - before


def probe(prompt: list[int]) -> Request:
    """A request that only looks what there is."""
    return Request(message("probe", prompt))


def test_prefix_hit_starts_after_the_last_full_block():
    core = make_core()
    first, cold, computed = ask(core, PROMPT)
    assert (cold.num_cached_tokens, computed) == (0, 30 + 5)
    second, warm, computed = ask(core, PROMPT)
    assert (warm.num_cached_tokens, computed) == (28, 2 + 5)
    assert first == second
    stats = core.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (60, 28)


def test_the_last_prompt_token_is_always_computed():
    core = make_core()
    ask(core, PROMPT[:28], 1)
    answer, output, computed = ask(core, PROMPT[:28], 1)
    assert (output.num_cached_tokens, computed) == (24, 4), "its last block is full and known, but not taken"
    assert answer == expected(PROMPT[:28], SamplingParams(max_tokens=1, ignore_eos=True))[0]


def test_next_turn_hits_the_generated_answer():
    core = make_core()
    answer, _, _ = ask(core, PROMPT[:10], 15)
    _, output, computed = ask(core, PROMPT[:10] + answer + [7, 8, 9], 1)
    assert output.num_cached_tokens == 24, "all full blocks of the 24 tokens that were computed"
    assert computed == 4


def test_prompts_that_part_ways_share_what_is_before():
    core = make_core()
    ask(core, PROMPT)
    _, output, _ = ask(core, PROMPT[:13] + [v % (VOCAB - 1) + 1 for v in PROMPT[13:]])
    assert output.num_cached_tokens == 12


def test_one_salt_cannot_find_what_another_has_computed():
    core = make_core()
    found = [ask(core, PROMPT, cache_salt=salt)[1].num_cached_tokens for salt in (None, "a", "b", "a", None, "b")]
    assert found == [0, 0, 0, 28, 28, 28]


def test_switched_off_it_finds_nothing_and_counts_nothing():
    core = make_core(enable_prefix_caching=False)
    assert [ask(core, PROMPT)[1].num_cached_tokens for _ in range(2)] == [0, 0]
    assert core.stats().prefix_cache_queries == 0


def test_running_sequences_share_only_computed_blocks():
    core = make_core(max_num_batched_tokens=10)
    core.add_request(message("first", PROMPT, max_tokens=20, ignore_eos=True))
    core.add_request(message("second", PROMPT, max_tokens=20, ignore_eos=True))
    cached = []
    while len(core.scheduler.running) < 2:  # the budget is the first one's until its prompt ends
        core.step()
        cached.append(len(core.scheduler.kv_cache.find_prefix(probe(PROMPT))))
    assert cached == [2, 5, 7, 7], "full blocks of the 10, 20 and 30 tokens computed after each step"
    first, second = core.scheduler.running
    assert second.num_cached_tokens == 28
    assert second.block_ids[:7] == first.block_ids[:7]
    assert not set(second.block_ids[7:]) & set(first.block_ids)
    outputs = finish(core)
    assert len(tokens_of(outputs["second"])) == 19, "one came with the step in which it began"


def test_requests_of_the_same_prompt_in_one_step_each_compute_it():
    core = make_core(max_num_batched_tokens=64)
    for name in "ab":
        core.add_request(message(name, PROMPT, max_tokens=9, ignore_eos=True))
    step = core.step()
    assert step.stats.step_tokens == 60
    a, b = core.scheduler.running
    assert not set(a.block_ids) & set(b.block_ids)
    outputs = finish(core)
    assert tokens_of(outputs["a"]) == tokens_of(outputs["b"])


@pytest.mark.parametrize(("caching", "again"), [(True, 4), (False, 36)])
def test_a_preempted_request_finds_its_own_blocks_again(caching, again):
    core = make_core(num_blocks=18, max_num_batched_tokens=64, enable_prefix_caching=caching)
    for name in "ab":
        core.add_request(message(name, PROMPT[ord(name) % 2 :] + [1] * (ord(name) % 2), max_tokens=9, ignore_eos=True))
    outputs = finish(core)
    assert core.scheduler.num_preemptions == 1, "both need their tenth block when there are eighteen"
    assert core.runner.num_computed == 2 * (30 + 8) + again, "all but the block that the other one took"
    assert {output.num_cached_tokens for output in outputs["b"]} == {0}, "no other request's work was spared"
    assert core.stats().prefix_cache_hits == 0


def test_what_was_not_used_for_longest_is_forgotten_first():
    core = make_core(num_blocks=16)
    others = [[5] * 17, [6] * 17, [7] * 17]
    for prompt in [*others, others[0]]:
        ask(core, prompt, 1)
    ask(core, [8] * 20, 1)  # takes what is blank, and the one that has been free for longest
    found = [len(core.scheduler.kv_cache.find_prefix(request)) for request in map(probe, others)]
    assert found[0] == found[2] == 4
    assert found[1] < 4


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 8)), min_size=2, max_size=12),
    block_size=st.integers(1, 9),
    num_blocks=st.integers(1, 20),
)
def test_prefix_hits_do_not_change_answers(turns, block_size, num_blocks):
    """Each request continues a piece of what has been said before."""
    sizes = {"block_size": block_size, "num_blocks": num_blocks + -(-64 // block_size)}
    core = make_core(**sizes)
    said = list(PROMPT)
    for cut, new, count in turns:
        prompt = (said[:cut] + [(cut + i) % VOCAB for i in range(new)])[-50:]
        answer, output, _ = ask(core, prompt, count)
        assert answer == expected(prompt, SamplingParams(max_tokens=count, ignore_eos=True))[0]
        assert output.num_cached_tokens % block_size == 0
        assert output.num_cached_tokens < len(prompt)
        said = prompt + answer


def model_core(folder: Path, **settings: object) -> EngineCore:
    defaults = {"dtype": "float32", "device": "cpu", "quiet": True, "num_kv_blocks": 400}
    return build_engine(EngineConfig(model=str(folder), **(defaults | settings)))


@pytest.fixture(scope="module")
def uncached(tiny_checkpoint) -> EngineCore:
    """An engine that finds nothing and has room for everything."""
    return model_core(tiny_checkpoint, enable_prefix_caching=False, num_kv_blocks=2000)


def test_second_turn_reuses_the_first_with_equal_answers(tiny_checkpoint, uncached):
    core = model_core(tiny_checkpoint)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    def turn(engine: EngineCore, prompt: list[int]) -> tuple[list[int], int]:
        engine.add_request(EngineRequest(request_id="turn", prompt_token_ids=prompt, params=params))
        outputs = finish(engine)["turn"]
        return tokens_of(outputs), outputs[0].num_cached_tokens

    prompt = list(range(10, 40))
    answer, _ = turn(core, prompt)
    second = prompt + answer + [50, 51, 52]
    assert turn(core, second) == (turn(uncached, second)[0], 64), "four blocks of sixteen, half of them generated"
