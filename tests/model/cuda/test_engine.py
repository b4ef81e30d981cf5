"""The whole engine on Triton kernels: recorded steps that overlap, as a GPU runs them, in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import TINY, TR_HASH, write_checkpoint
from support.reruns import Reruns

from pyllm import LLM, SamplingParams
from pyllm.engine.config import SpeculativeConfig
from pyllm.engine.messages import EngineRequest
from pyllm.engine.runner.model_runner import ModelRunner
from pyllm.engine.runner.step_graphs import token_counts
from pyllm.engine.step.core import EngineCore
from pyllm.model.cuda.backend import TritonBackend

LAYERS = 2
PROMPTS = ["Hi", "A prompt of two pages", "c"]
PARAMS = [
    SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=1.0, top_k=20, seed=2, ignore_eos=True),
]


def open_llm(folder, **settings: object) -> LLM:
    sizes = {"num_kv_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "max_model_len": 48}
    return LLM(str(folder), dtype="float32", device="cpu", quiet=True, **(sizes | settings))


def answers(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, so that one passes something on to the other: each takes seconds in the interpreter."""
    folder = tmp_path_factory.mktemp("two-layers")
    write_checkpoint(folder, seed=7, config=replace(TINY, num_hidden_layers=LAYERS))
    return folder


@pytest.fixture(scope="module")
def wanted(tiny_checkpoint) -> list[list[int]]:
    return answers(open_llm(tiny_checkpoint), PARAMS)


def on_triton(llm: LLM, *, token_counts: Sequence[int] = (), deterministic: bool = False) -> Reruns:
    """Let the library's engine compute with Triton kernels and recorded steps."""
    info, maker = llm.core.info, Reruns()
    model = llm.core.runner.model
    model.ops = TritonBackend(model, deterministic=deterministic)
    runner = ModelRunner(model, info.config)
    runner.capture(maker, [2, 4], token_counts)
    llm.core = EngineCore(info, runner, runner.observer, llm.core.grammars)
    return maker


def expect_counts(llm: LLM, tokens: list[list[int]], experts: int = 1) -> None:
    """Every token was computed once by each layer's experts, and padding was not counted."""
    computed = sum(len(llm.tokenizer.encode(p)) + len(own) - 1 for p, own in zip(PROMPTS, tokens, strict=True))
    assert [sum(layer) for layer in llm.core.stats().expert_tokens or []] == [computed * experts] * LAYERS


@pytest.mark.parametrize("token_counts", [(), (8, 16)], ids=["decodes", "all steps"])
@pytest.mark.parametrize(
    ("overlap", "deterministic", "kept"),
    [(False, False, "auto"), (True, False, "auto"), (True, True, "auto"), (True, False, "fp8"), (True, True, "fp8")],
)
def test_engine_tokens_are_equal_on_triton_and_graphs(
    tiny_checkpoint, wanted, monkeypatch, overlap, deterministic, kept, token_counts
):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=overlap, kv_cache_dtype=kept)
    if kept == "fp8":
        wanted = answers(llm, PARAMS)  # by plain torch
    maker = on_triton(llm, token_counts=token_counts, deterministic=deterministic)
    assert answers(llm, PARAMS) == wanted
    assert maker.count >= (4 if token_counts else 2)
    expect_counts(llm, wanted)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_tr_hash_line_replays_recorded_steps(deterministic, tmp_path, monkeypatch):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    config = replace(
        TINY, num_hidden_layers=LAYERS, mlp_type="tr_hash_engine", intermediate_size=128, shared_intermediate_size=72,
        num_experts_per_tok=2, use_shared_routed_gates=True, learn_hash_channel_modulation=True, **TR_HASH,
    )  # fmt: skip
    write_checkpoint(tmp_path, seed=7, config=config)
    wanted = answers(open_llm(tmp_path), PARAMS)
    llm = open_llm(tmp_path, overlap_scheduling=True)
    maker = on_triton(llm, token_counts=(8, 16), deterministic=deterministic)
    assert answers(llm, PARAMS) == wanted
    assert maker.count >= 4
    expect_counts(llm, wanted, experts=2)


FIELDS = [
    {"logprobs": 2}, {"presence_penalty": 1.0, "repetition_penalty": 1.3}, {"grammar": 'start: /[a-z]{3,9}/'},
    {"prompt_logprobs": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: next(iter(fields)))
def test_what_the_host_has_a_hand_in_is_the_same_in_mixed_graphs(tiny_checkpoint, monkeypatch, fields):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=True)
    params = [SamplingParams(max_tokens=4, temperature=1.0, seed=4, ignore_eos=True, **fields), *PARAMS[1:]]
    wanted = llm.generate(PROMPTS, params)
    maker = on_triton(llm, token_counts=(8, 16))
    got = llm.generate(PROMPTS, params)
    assert [own.token_ids for own in got] == [own.token_ids for own in wanted]
    for own, other in zip(got[0].logprobs, wanted[0].logprobs, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert maker.count > 0


GUESSING = SpeculativeConfig(prompt_lookup_min=1, disable_by_batch_size=4)


def test_mixed_graphs_keep_hits_drafts_and_preemption_exact(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    settings = {"overlap_scheduling": True, "num_kv_blocks": 8, "speculative_config": GUESSING}
    prompts = ["one two one two one two", "one two one two one three", "x", "one two one two one two"]
    params = [SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True) for _ in prompts]
    params[2] = SamplingParams(
        max_tokens=10, temperature=0.0, ignore_eos=True, allowed_token_ids=(70,)
    )  # which is soon guessed
    plain = open_llm(tiny_checkpoint, num_kv_blocks=64)
    wanted = [own.token_ids for own in plain.generate(prompts, params)]
    llm = open_llm(tiny_checkpoint, **settings)
    maker = on_triton(llm, token_counts=(4, 16))
    for _ in range(2):  # the second time from the cache
        assert [own.token_ids for own in llm.generate(prompts, params)] == wanted
    stats = llm.core.stats()
    assert llm.core.scheduler.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.num_draft_tokens > 0
    assert maker.count > 0


def test_padding_of_a_mixed_graph_touches_no_page(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint)
    maker = on_triton(llm, token_counts=(16,))
    cache = llm.core.runner.kv_cache
    cache.fill_(7.0)
    ids = llm.tokenizer.encode("Eleven of sixteen")[:11]
    llm.core.add_request(EngineRequest(request_id="r", prompt_token_ids=ids, params=PARAMS[0]))
    llm.core.step()
    assert maker.count == 1
    (request,) = llm.core.scheduler.running
    written = (cache != 7.0).any(dim=-1).any(dim=-1).all(dim=0).all(dim=0)  # [blocks, block_size]
    first, second = request.block_ids[:2]
    assert written[first].all()
    assert written[second].tolist() == [True] * 3 + [False] * 5
    assert int(written.sum()) == 11
    llm.core.abort(["r"])
    llm.core.check_idle()


def test_steps_over_the_largest_graph_run_eagerly(tiny_checkpoint, wanted, monkeypatch):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=True)
    on_triton(llm, token_counts=(4,))
    assert answers(llm, PARAMS) == wanted
    expect_counts(llm, wanted)


def test_graph_sizes_reach_the_largest_recorded_step():
    assert token_counts(8) == [8]
    assert token_counts(2048)[-2:] == [1536, 2048]
    assert token_counts(10**5)[-1] == 4096
    for most in (100, 2048, 4096):
        sizes = token_counts(most)
        assert sizes[-1] == most
        assert all(next(size for size in sizes if size >= n) <= max(16, 2 * n) for n in range(1, most + 1))
