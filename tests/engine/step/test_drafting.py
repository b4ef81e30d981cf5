"""Guessed tokens: which are guessed, and that guesses never change an answer."""

from __future__ import annotations

import random

import pytest

from pyllm import LLM, SamplingParams
from pyllm.engine.config import SpeculativeConfig
from pyllm.engine.errors import EngineStartError
from pyllm.engine.step.drafting import Drafter


def test_what_followed_the_last_tokens_before_is_the_guess():
    drafter = Drafter(SpeculativeConfig(prompt_lookup_min=2, prompt_lookup_max=3, num_speculative_tokens=3))
    tokens = [1, 2, 3, 4, 5, 9, 1, 2]
    assert drafter.propose(tokens, 10) == [3, 4, 5]
    assert drafter.propose(tokens, 2) == [3, 4]
    assert drafter.propose([*tokens, 7], 10) == []


def test_the_longer_and_then_the_later_occurrence_counts():
    drafter = Drafter(SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=2, num_speculative_tokens=1))
    assert drafter.propose([5, 1, 7, 6, 1, 8, 5, 1], 1) == [7]
    assert Drafter(SpeculativeConfig(prompt_lookup_min=1)).propose([1, 7, 1, 8, 1], 1) == [8]


def test_a_loop_is_guessed_to_continue():
    drafter = Drafter(SpeculativeConfig(prompt_lookup_min=2, prompt_lookup_max=2, num_speculative_tokens=4))
    assert drafter.propose([3, 3, 3], 4) == [3, 3, 3, 3]
    assert drafter.propose([3, 3, 3, 8, 9, 8, 9], 3) == [8, 9, 8]


def test_wrong_guesses_make_it_pause_for_longer_and_longer():
    drafter = Drafter(SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=1))
    tokens, pauses = [1, 2, 1], []
    for _ in range(4):
        assert drafter.propose(tokens, 4)
        assert drafter.verify([7, 8], [9, 8]) == 0
        pause = 0
        while not drafter.propose(tokens, 4):
            pause += 1
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8]
    assert drafter.verify([7, 8], [7, 9]) == 1
    assert drafter.propose(tokens, 4)


@pytest.mark.parametrize("settings", [{"method": "eagle"}, {"num_speculative_tokens": 0}, {"prompt_lookup_min": 9}])
def test_settings_that_cannot_be_used_are_refused(tiny_checkpoint, settings):
    with pytest.raises(EngineStartError):
        LLM(str(tiny_checkpoint), quiet=True, speculative_config=settings)


def mixes(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests whose answers repeat themselves (a repetition penalty below 1 sees to that) and others that do not."""
    made = []
    for seed in range(count):
        piece = [rng.randrange(4, 260) for _ in range(rng.randint(2, 9))]
        prompt = (piece * 6)[: rng.randint(4, 40)]
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 7, 40, 60]),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            seed=seed,
            ignore_eos=rng.random() < 0.7,
            logprobs=rng.choice([None, 3]),
            prompt_logprobs=rng.choice([None, None, 1]),
            repetition_penalty=rng.choice([1.0, 0.4, 0.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            stop=rng.choice([(), ("a",), ("zz", "e")]),
            stop_token_ids=rng.choice([(), (17, 40, 90)]),
            min_tokens=rng.choice([0, 0, 1]),
            return_dynamics=rng.random() < 0.1,
        )
        made.append((prompt, params))
    return made


def test_guesses_change_no_answer(tiny_checkpoint):
    """Tokens, texts, reasons and logprobs with and without guesses, in small pools and small budgets too."""
    rng = random.Random(5)
    sizes = [{"num_kv_blocks": 64}, {"num_kv_blocks": 40, "max_num_batched_tokens": 12, "max_num_seqs": 6}]
    accepted = 0
    for size in sizes:
        plain = LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, block_size=8, **size)
        config = {"num_speculative_tokens": rng.choice([1, 3, 6]), "prompt_lookup_min": 1, "disable_by_batch_size": 8}
        guessing = LLM(
            str(tiny_checkpoint),
            dtype="float32",
            device="cpu",
            quiet=True,
            block_size=8,
            speculative_config=config,
            **size,
        )
        for _ in range(8):
            requests = mixes(rng, rng.randint(1, 8))
            prompts, params = [r[0] for r in requests], [r[1] for r in requests]
            expected, found = plain.generate(prompts, params), guessing.generate(prompts, params)
            for one, other in zip(expected, found, strict=True):
                assert one.token_ids == other.token_ids
                assert (one.text, one.finish_reason, one.stop_reason) == (
                    other.text,
                    other.finish_reason,
                    other.stop_reason,
                )
                assert len(one.dynamics) == len(other.dynamics)
                for name in ("logprobs", "prompt_logprobs"):
                    pairs = zip(getattr(one, name), getattr(other, name), strict=True)
                    assert all(
                        a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs
                    )
        stats = guessing.core.stats()
        assert stats.num_draft_tokens >= stats.num_drafts > 0
        accepted += sum(stats.num_accepted_tokens)
    assert accepted > 100


def test_a_text_that_repeats_itself_takes_fewer_steps(tiny_checkpoint):
    config = {"num_speculative_tokens": 5, "prompt_lookup_min": 2}
    llm = LLM(
        str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=64, speculative_config=config
    )
    steps, real = [], llm.core.step
    llm.core.step = lambda: steps.append(real()) or steps[-1]
    params = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    answer = llm.generate([list(range(10, 20)) * 3], params)[0]
    assert len(answer.token_ids) == 120
    stats = llm.core.stats()
    assert len(steps) == 120 - sum(stats.num_accepted_tokens)
