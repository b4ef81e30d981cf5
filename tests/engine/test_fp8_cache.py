"""Keys and values in 8 bits: what is kept, what it changes, and that nothing else notices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.checkpoints import TINY, random_model, write_checkpoint

from pyllm import LLM, SamplingParams
from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.errors import EngineStartError
from pyllm.engine.runner.model_runner import ModelRunner
from pyllm.model import AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.fp8 import FP8, centre, narrow

SIZES = {"block_size": 4, "max_model_len": 160, "max_num_seqs": 4, "max_num_batched_tokens": 24}
PROMPTS = [[(7 * i + n) % 250 + 4 for i in range(length)] for n, length in enumerate((30, 3, 41, 17))]
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference; the CPU's compiled kernels have no FP8."""
    monkeypatch.setenv("PYLLM_NATIVE", "0")


def engine(folder, **settings: object) -> LLM:
    """In FP32: where BF16 adds up in another order, the last bit of a key decides how FP8 rounds it."""
    sizes = SIZES | {"num_kv_blocks": 100, "dtype": "float32", "kv_cache_dtype": "fp8"}
    return LLM(str(folder), quiet=True, device="cpu", **(sizes | settings))


def answers(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY)]


def logits(model: DeepForCausalLM, ids: torch.Tensor, cache: torch.Tensor | None) -> torch.Tensor:
    """Of all places of one text, which is alone in page 0."""
    at = torch.arange(len(ids))
    metadata = AttentionMetadata(
        query_lens=[len(ids)], seq_lens=[len(ids)], slot_mapping=at, block_tables=torch.zeros(1, 1, dtype=torch.int32)
    )
    with torch.inference_mode():
        return model.logits(model(ids, at, metadata, cache))


@pytest.fixture(scope="module")
def wanted(tiny_checkpoint) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYLLM_NATIVE", "0")
        return [answers(engine(tiny_checkpoint), [prompt])[0] for prompt in PROMPTS]


def test_fp8_rounds_to_nearest_and_saturates():
    given = torch.tensor([0.0, 1.06, -1.07, 0.0009, 447.0, 465.0, -1e9, float("inf")])
    assert narrow(given).float().tolist() == [0.0, 1.0, -1.125, 0.0, 448.0, 448.0, -448.0, 448.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 41},
        {"block_size": 16},
        {"max_num_batched_tokens": 7},
        {"enable_prefix_caching": False},
        {"speculative_config": {"method": "ngram"}},
        {"overlap_scheduling": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_answer_depends_on_nothing_but_the_prompt(tiny_checkpoint, wanted, settings):
    assert answers(engine(tiny_checkpoint, **settings)) == wanted


def test_fp8_cache_survives_preemption_and_prefix_hits(tiny_checkpoint, wanted):
    llm = engine(tiny_checkpoint, num_kv_blocks=41)
    assert answers(llm) == wanted
    assert llm.core.stats().num_preemptions > 0
    before = llm.core.stats().prefix_cache_hits
    assert answers(llm, PROMPTS[2:3]) == wanted[2:3]
    assert llm.core.stats().prefix_cache_hits == before + 40


def test_fp8_is_what_the_pages_hold(tiny_checkpoint):
    runner = engine(tiny_checkpoint).core.runner
    assert isinstance(runner, ModelRunner)
    assert runner.kv_cache.dtype == FP8
    assert runner.kv_cache.element_size() == 1


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 2), ("float32", 4)])
def test_as_many_bytes_hold_more_blocks(tiny_checkpoint, dtype, times):
    blocks = []
    for kept in ("auto", "fp8"):
        config = EngineConfig(
            model=str(tiny_checkpoint), dtype=dtype, device="cpu", kv_cache_dtype=kept, quiet=True,
            max_model_len=64, kv_cache_memory_bytes=1 << 20,
        )  # fmt: skip
        info = build_engine(config).info
        assert info.config.kv_cache_dtype == kept
        blocks.append(info.config.num_kv_blocks)
    assert blocks[1] // times == blocks[0]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_centring_is_exact_and_normalises_keys_and_values(qk_norm):
    config = replace(TINY, use_qk_norm=qk_norm)
    ids = torch.arange(4, 44)
    for dtype in (torch.float32, torch.bfloat16):
        model = oversized(config, dtype)
        cache = model.new_kv_cache(1, 64)
        before = logits(model, ids, cache)
        for layer in model.layers:
            centre(layer)
        after = model.new_kv_cache(1, 64)
        assert torch.equal(logits(model, ids, after), before)
        assert cache[1:].float().abs().max() > 2000
        # mu's part of values and keys, in layers above the first, is not foreseen.
        for layer in range(config.num_hidden_layers):
            sizes = after[layer, :, 0, :40].float().square().mean(dim=(1, 2, 3)).sqrt()
            assert ((sizes > 0.7) & (sizes < 4.0)).all()


def oversized(config: DeepConfig, dtype: torch.dtype = torch.float32) -> DeepForCausalLM:
    """A model like any other, but whose keys and values are 1000 times as large, and their use as much smaller."""
    exact = random_model(config, seed=5)
    with torch.no_grad():
        for layer in exact.layers:
            kv = config.num_key_value_heads * config.head_dim
            layer.kqv_proj[-kv:] *= 1024
            layer.o_proj /= 1024
            if layer.k_norm is not None:
                layer.k_norm *= 1024
                layer.q_norm /= 1024
            else:
                layer.kqv_proj[:kv] *= 1024
                layer.kqv_proj[kv:-kv] /= 1024
    model = DeepForCausalLM(config, exact.architecture, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    return model


def test_centring_keeps_precision_of_large_keys_and_values():
    ids = torch.arange(4, 44)
    errors = []
    for model in (random_model(TINY, seed=5), oversized(TINY)):
        exact = logits(model, ids, model.new_kv_cache(1, 64)).log_softmax(-1)
        for layer in model.layers:
            centre(layer)
        rounded = logits(model, ids, model.new_kv_cache(1, 64, FP8)).log_softmax(-1)
        errors.append(float((exact.exp() * (exact - rounded)).sum(-1).mean()))
    assert errors[0] == pytest.approx(errors[1])
    assert 0 < errors[0] < 0.1


def test_checkpoint_with_large_values_gives_equal_answers(tmp_path):
    given = []
    for name, model in (("usual", random_model(TINY, seed=5)), ("oversized", oversized(TINY))):
        write_checkpoint(tmp_path / name, seed=5)
        save_checkpoint(model, tmp_path / name, dtype=torch.float32)
        given.append(answers(engine(tmp_path / name)))
    assert given[0] == given[1]


def test_a_sliding_window_and_no_qk_norm_are_served_too(tmp_path):
    write_checkpoint(tmp_path, 3, replace(TINY, use_qk_norm=False, sliding_window=6, num_key_value_heads=1))
    alone = [answers(engine(tmp_path), [prompt])[0] for prompt in PROMPTS]
    assert answers(engine(tmp_path)) == alone


def test_the_compiled_kernels_refuse_it_in_one_sentence(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("pyllm.engine.build.native_available", lambda config: True)
    with pytest.raises(EngineStartError) as caught:
        engine(tiny_checkpoint)
    assert str(caught.value) == (
        "--kv-cache-dtype fp8 needs a GPU: the compiled CPU kernels do not support it."
    )  # fmt: skip
