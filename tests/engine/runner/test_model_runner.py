"""What the engine tells of the network's inside, against a whole forward pass that is looked into."""

from __future__ import annotations

import pytest
import torch

from pyllm import LLM, DeepForCausalLM, SamplingParams
from pyllm.model import AttentionMetadata
from pyllm.model.network import LayerState

PROMPT = "What does the network do?"


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    # Chunks of 7 tokens, so that the prompt is computed in several steps.
    return LLM(
        str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=64, max_num_batched_tokens=7,
        max_num_seqs=4,
    )  # fmt: skip


def seen_in_one_pass(folder, ids: list[int]) -> list[LayerState]:
    """Each layer's state over all the tokens, computed without the engine."""
    model = DeepForCausalLM.from_pretrained(folder)
    seen: list[LayerState] = []

    def watch(state: LayerState) -> None:
        seen.append(LayerState(*(part.clone() if isinstance(part, torch.Tensor) else part for part in state)))

    with torch.inference_mode():
        metadata = AttentionMetadata.without_cache([len(ids)])
        model(torch.tensor(ids), torch.arange(len(ids)), metadata, observer=watch)
    return seen


def test_dynamics_belong_to_the_pass_that_made_the_token(llm, tiny_checkpoint):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True, return_dynamics=True)
    answer = llm.generate([PROMPT], params)[0]
    ids = answer.prompt_token_ids + answer.token_ids
    seen = seen_in_one_pass(tiny_checkpoint, ids[:-1])
    own = torch.tensor(ids[:-1]) % 4  # as the checkpoint's tables say
    first = len(answer.prompt_token_ids) - 1
    assert len(answer.dynamics) == 40
    for n, entry in enumerate(answer.dynamics, first):
        assert entry.input_token_id == ids[n]
        assert entry.experts == [int(state.experts[n]) for state in seen]
        assert entry.rerouted == [int(state.experts[n]) != int(own[n]) for state in seen]
        assert entry.mu_norm == pytest.approx([float(state.mu[n].norm()) for state in seen], rel=1e-4)
        assert entry.velocity_norm == pytest.approx([float(state.velocity[n].norm()) for state in seen], rel=1e-4)
    rerouted = [flag for entry in answer.dynamics for flag in entry.rerouted]
    assert any(rerouted)
    assert not all(rerouted)


def test_dynamics_are_reported_on_demand_and_change_no_tokens(llm):
    plain = [SamplingParams(max_tokens=12, temperature=1.0, seed=n, ignore_eos=True) for n in range(3)]
    asking = SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True, return_dynamics=True)
    without = llm.generate([PROMPT, "b", "c"], plain)
    with_one = llm.generate([PROMPT, "b", "c"], [plain[0], asking, plain[2]])
    assert [a.token_ids for a in without] == [a.token_ids for a in with_one]
    assert [len(a.dynamics) for a in with_one] == [0, 12, 0]


def test_every_computed_token_is_counted_once_per_layer(llm, tiny_checkpoint):
    before = llm.core.stats()
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=8, ignore_eos=True)
    answer = llm.generate(["A prompt of its own"], params)[0]
    after = llm.core.stats()
    ids = (answer.prompt_token_ids + answer.token_ids)[:-1]
    seen = seen_in_one_pass(tiny_checkpoint, ids)
    counted = (torch.tensor(after.expert_tokens) - torch.tensor(before.expert_tokens)).tolist()
    assert counted == [state.experts.bincount(minlength=4).tolist() for state in seen]
    rerouted = (torch.tensor(after.expert_reroutes) - torch.tensor(before.expert_reroutes)).tolist()
    assert rerouted == [int((state.experts != torch.tensor(ids) % 4).sum()) for state in seen]
    assert sum(rerouted) > 0


def test_warming_up_is_not_counted(tiny_checkpoint):
    fresh = LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=16)
    assert sum(map(sum, fresh.core.stats().expert_tokens)) == 0
