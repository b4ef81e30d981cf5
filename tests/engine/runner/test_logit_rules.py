"""Requests that change, forbid or command single tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pyllm import LLM, SamplingParams
from pyllm.engine.errors import RequestError

PROMPTS = ["one", "another", "a third of them", "four"]


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | fields))


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=64)


def tokens(llm: LLM, own: SamplingParams, prompt: str | list[int] = "one") -> list[int]:
    return llm.generate([prompt], own)[0].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_commands_and_of_minus_100_bans(llm, temperature):
    assert tokens(llm, params(temperature=temperature, logit_bias={77: 100.0})) == [77] * 12
    free = set(tokens(llm, params(temperature=temperature, seed=1)))
    without = tokens(llm, params(temperature=temperature, seed=1, logit_bias=dict.fromkeys(free, -100.0)))
    assert not free & set(without)


def test_a_small_bias_shifts_the_odds_by_its_exponential(llm):
    def first_tokens(bias: float) -> list[int]:
        each = [params(temperature=1.0, max_tokens=1, seed=i, logit_bias={50: 3.0 + bias, 60: 3.0}) for i in range(600)]
        return [completion.token_ids[0] for completion in llm.generate(["one"] * 600, each)]

    row = torch.tensor([[score for _, score in sorted(all_logprobs(llm, "one").items())]])
    for bias in (0.0, 2.0):
        changed = row.clone()
        changed[0, 50] += 3.0 + bias
        changed[0, 60] += 3.0
        probability = changed.softmax(-1)[0, 50].item()
        share = first_tokens(bias).count(50) / 600
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 600) ** 0.5


def all_logprobs(llm: LLM, prompt: str) -> dict[int, float]:
    """Of every token of the vocabulary as the next one, found by commanding each in its turn."""
    vocab = llm.core.info.vocab_size
    each = [params(max_tokens=1, logprobs=0, logit_bias={token: 100.0}) for token in range(vocab)]
    found = [completion.logprobs[0] for completion in llm.generate([prompt] * vocab, each)]
    return {entry.token_id: entry.logprob for entry in found}


def test_logprobs_and_ranks_are_those_of_before_all_rules(llm):
    scores = all_logprobs(llm, "one")
    assert len(scores) == llm.core.info.vocab_size
    assert sum(torch.tensor(list(scores.values())).exp()) == pytest.approx(1.0, abs=1e-4)
    best = max(scores, key=scores.__getitem__)
    worst = min(scores, key=scores.__getitem__)
    rules = [
        {"logit_bias": {worst: 100.0}}, {"allowed_token_ids": (worst,)}, {"bad_words": ((best,),)}, {"min_tokens": 3},
    ]  # fmt: skip
    for rule in rules:
        found = llm.generate(["one"], params(max_tokens=4, logprobs=3, **rule))[0].logprobs[0]
        assert found.top[0] == (best, pytest.approx(scores[best], abs=1e-5))
        assert found.logprob == pytest.approx(scores[found.token_id], abs=1e-5)
        assert found.rank == 1 + sum(score > scores[found.token_id] for score in scores.values())
        if found.token_id == worst:
            assert found.rank == len(scores)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_only_allowed_tokens_are_generated(llm, temperature):
    allowed = (5, 17, 200, 17)
    found = tokens(llm, params(temperature=temperature, max_tokens=40, allowed_token_ids=allowed, logit_bias={9: 100}))
    assert set(found) <= set(allowed)
    everything = tuple(range(llm.core.info.vocab_size))
    own = params(temperature=temperature, seed=4)
    assert tokens(llm, own) == tokens(llm, params(temperature=temperature, seed=4, allowed_token_ids=everything))


def test_a_bad_word_of_one_token_never_comes(llm):
    free = tokens(llm, params(max_tokens=6))
    found = tokens(llm, params(max_tokens=40, bad_words=tuple((token,) for token in set(free))))
    assert not set(free) & set(found)


def test_bad_word_bans_its_last_token_only_after_the_rest(llm):
    free = tokens(llm, params())
    word = tuple(free[4:7])
    found = tokens(llm, params(bad_words=(word, (word[0], 270, 271))))
    assert found[:6] == free[:6]
    assert found[6] != free[6]
    sampled = tokens(llm, params(temperature=1.0, max_tokens=100, allowed_token_ids=(7, 8, 9), bad_words=((7, 8, 9),)))
    places = zip(sampled, sampled[1:], sampled[2:], strict=False)
    assert (7, 8, 9) not in places
    assert {(7, 8), (8, 9)} <= set(pairwise(sampled))


def test_a_bad_word_does_not_begin_in_the_prompt(llm):
    prompt = llm.tokenizer.encode("one")
    first = tokens(llm, params(max_tokens=1), prompt)[0]
    assert tokens(llm, params(max_tokens=1, bad_words=((prompt[-1], first),)), prompt) == [first]
    assert tokens(llm, params(max_tokens=1, bad_words=((first,),)), prompt) != [first]


def test_bans_yield_when_no_token_is_left(llm):
    for temperature in (0.0, 1.0):
        only = params(temperature=temperature, allowed_token_ids=(7, 8), bad_words=((7,), (8,), (7, 7), (8, 8)))
        assert set(tokens(llm, only)) <= {7, 8}
        everything = tuple((token,) for token in range(llm.core.info.vocab_size))
        assert len(tokens(llm, params(temperature=temperature, bad_words=everything))) == 12
        stop = params(temperature=temperature, allowed_token_ids=(7,), stop_token_ids=(7,), min_tokens=4)
        assert tokens(llm, stop) == [7] * 4
    lone = params(temperature=1.0, allowed_token_ids=(7, 8), bad_words=((7,),))
    assert tokens(llm, lone) == [8] * 12


@pytest.mark.parametrize(
    "rule",
    [
        {"logit_bias": {40: 2.5, 41: -100.0}},
        {"allowed_token_ids": tuple(range(10, 60))},
        {"bad_words": ((40,), (41, 42), (43, 44, 45))},
        {"bad_words": ((11,), (12,)), "allowed_token_ids": (11, 12), "min_tokens": 2, "logit_bias": {11: 1.0}},
    ],
    ids=lambda rule: "+".join(rule),
)
def test_a_request_with_rules_changes_nothing_for_its_neighbours(llm, rule):
    plain = [params(temperature=t, seed=7 + i, max_tokens=20) for i, t in enumerate((0.0, 1.0, 0.7, 1.5))]
    ruled = [params(temperature=1.2, seed=i, max_tokens=11, **rule) for i in range(4)]
    mixed = [own for pair in zip(plain, ruled, strict=True) for own in pair]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    together = [completion.token_ids for completion in llm.generate(prompts, mixed)]
    assert together == [tokens(llm, own, prompt) for prompt, own in zip(prompts, mixed, strict=True)]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", {272: 1.0}), ("logit_bias", {-1: 1.0}), ("allowed_token_ids", (3, 272)),
        ("bad_words", ((4,), (5, 272))), ("bad_words", ((-1, 4),)), ("stop_token_ids", (272,)),
    ],
)  # fmt: skip
def test_token_id_out_of_range_is_refused_by_field_name(llm, param, value):
    with pytest.raises(RequestError, match="outside 0 to 271") as error:
        llm.generate(["one"], params(**{param: value}))
    assert error.value.param == param
    assert not llm.core.has_work
