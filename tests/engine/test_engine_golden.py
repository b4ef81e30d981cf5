"""The paged, batched engine gives the published greedy tokens, however the work is cut up."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig, SpeculativeConfig
from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.step.core import EngineCore

TOKENS = 48


def run(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy ids of all prompts, submitted at once."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, seed=0)
    for i, prompt in enumerate(prompts):
        core.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step().outputs:
            outputs[int(output.request_id)] += output.token_ids
    return outputs


def test_golden_greedy_ids_speculated_and_from_the_prefix_cache(golden):
    expected = load_file(golden / "golden.safetensors")
    prompt, answer = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    guesses = SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=2, num_speculative_tokens=3)
    core = build_engine(
        EngineConfig(model=str(golden), dtype="float32", quiet=True, block_size=8, speculative_config=guesses)
    )
    assert [run(core, [prompt]) for _ in range(2)] == [[answer]] * 2
    assert core.stats().num_drafts > 0
    assert core.stats().prefix_cache_hits >= len(prompt) - 8
    core.check_idle()


@pytest.mark.parametrize("manner", ["alone", "eight copies", "chunks of 5", "preempted", "plain torch, preempted"])
def test_golden_greedy_ids_through_the_paged_engine(golden, manner, monkeypatch):
    if manner.startswith("plain torch"):
        monkeypatch.setenv("PYLLM_NATIVE", "0")
    expected = load_file(golden / "golden.safetensors")
    prompt, answer = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    length = len(prompt) + TOKENS
    settings = {
        "alone": {},
        "eight copies": {},
        "chunks of 5": {"max_num_batched_tokens": 5},
        # Room for two whole requests and a half, for eight that all want to run.
        "preempted": {"block_size": 8, "num_kv_blocks": -(-length // 8) * 5 // 2, "max_model_len": length},
    }[manner.rpartition(", ")[2]]
    config = EngineConfig(model=str(golden), dtype="float32", quiet=True, **settings)
    core = build_engine(config)
    copies = 1 if manner == "alone" else 8
    assert run(core, [prompt] * copies) == [answer] * copies
    assert (core.scheduler.num_preemptions > 0) == manner.endswith("preempted")
    core.check_idle()
