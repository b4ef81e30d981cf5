"""The paged, batched engine gives the published greedy tokens, however the work is cut up."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyllm import LLM
from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig, SpeculativeConfig
from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.step.core import EngineCore
from pyllm.model.config import DeepConfig
from pyllm.model.cpu.backend import available

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
    native = available(DeepConfig.from_folder(golden))
    answer = load_file(golden / "golden.safetensors")["greedy_ids"].tolist()
    ids, preemptions = answers(golden, manner.rpartition(", ")[2], native)
    assert ids == [answer] * (1 if manner == "alone" else 8)
    assert (preemptions > 0) == manner.endswith("preempted")


@functools.cache  # where there are no compiled kernels, plain torch has computed it already
def answers(golden: Path, manner: str, native: bool) -> tuple[list[list[int]], int]:
    """Greedy ids of all copies of the prompt, and how often a request was preempted."""
    prompt = load_file(golden / "golden.safetensors")["input_ids"].tolist()
    length = len(prompt) + TOKENS
    settings = {
        "alone": {},
        "eight copies": {},
        "chunks of 5": {"max_num_batched_tokens": 5},
        # Room for two whole requests and a half, for eight that all want to run.
        "preempted": {"block_size": 8, "num_kv_blocks": -(-length // 8) * 5 // 2, "max_model_len": length},
    }[manner]
    core = build_engine(EngineConfig(model=str(golden), dtype="float32", quiet=True, **settings))
    assert (core.info.kernels == "native") == native
    ids = run(core, [prompt] * (1 if manner == "alone" else 8))
    core.check_idle()
    return ids, core.scheduler.num_preemptions


def test_dynamics_list_all_experts_and_their_weights(golden):
    """The experts of each token as the reference chose them, and the weights of the equations, in every era."""
    expected = load_file(golden / "golden.safetensors")
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    ids, layers = expected["input_ids"].tolist(), config["num_hidden_layers"]
    routes = expected.get("expert_ids", torch.zeros(layers, len(ids), 0, dtype=torch.int64)).reshape(
        layers, len(ids), -1
    )
    llm = LLM(str(golden), dtype="float32", device="cpu", quiet=True)
    params = SamplingParams(max_tokens=1, temperature=0.0, return_dynamics=True)
    places, num_routes = [1, 7, len(ids)], routes.shape[-1]
    primary, others = config.get("top_k_primary_weight"), num_routes - 1
    if primary is None and others >= 0:
        primary = 0.95 if golden.name == "t_export_cyclic" else 1 / num_routes
    weights = [1.0] if not others else [primary, *[(1 - primary) / others] * others] if num_routes else []
    for place, answer in zip(places, llm.generate([ids[:place] for place in places], params), strict=True):
        (entry,) = answer.dynamics
        assert entry.routed_experts == (routes[:, place - 1].tolist() if num_routes else [])
        assert entry.experts == [first for first, *_ in entry.routed_experts]
        assert entry.expert_weights == [pytest.approx(weights)] * (layers if num_routes else 0)
        assert len(entry.mu_norm) == (0 if golden.name.startswith("t_") else layers)
