"""The whole engine on Triton kernels: recorded decode steps that overlap, as a GPU runs them, in the interpreter."""

from __future__ import annotations

import pytest

from pyllm import LLM, SamplingParams
from pyllm.engine.core import EngineCore
from pyllm.engine.decode_graphs import Reruns
from pyllm.engine.model_runner import ModelRunner
from pyllm.model.cuda import TritonBackend
from pyllm.model.fp8 import FP8

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
def wanted(tiny_checkpoint) -> list[list[int]]:
    return answers(open_llm(tiny_checkpoint), PARAMS)


@pytest.mark.parametrize(
    ("overlap", "deterministic", "kept"),
    [(False, False, "auto"), (True, False, "auto"), (True, True, "auto"), (True, False, "fp8"), (True, True, "fp8")],
)
def test_the_engine_gives_the_same_tokens_on_triton_kernels_and_graphs(
    tiny_checkpoint, wanted, monkeypatch, overlap, deterministic, kept
):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=overlap, kv_cache_dtype=kept)
    if kept == "fp8":
        wanted = answers(llm, PARAMS)  # by plain torch
    model = llm.core.runner.model
    model.ops = TritonBackend(model, deterministic=deterministic)
    dtype = FP8 if kept == "fp8" else None
    runner = ModelRunner(model, num_blocks=24, block_size=8, max_num_seqs=4, kv_cache_dtype=dtype)
    runner.capture(Reruns(), 48, [2, 4])
    llm.core = core = EngineCore(llm.core.info, runner, runner.watcher)
    assert answers(llm, PARAMS) == wanted
    counted = core.stats().expert_tokens or []
    computed = sum(len(llm.tokenizer.encode(p)) + len(tokens) - 1 for p, tokens in zip(PROMPTS, wanted, strict=True))
    assert [sum(layer) for layer in counted] == [computed] * 3, "and padding is nobody's work"
