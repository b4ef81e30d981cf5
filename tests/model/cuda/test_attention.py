"""Attention over pages on Triton kernels against plain torch, one layer at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.checkpoints import TINY, random_model

from pyllm.model import AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.backend import Backend
from pyllm.model.cuda import backend as cuda
from pyllm.model.fp8 import FP8
from pyllm.model.parameters import DeepLayer

SHAPES = {
    "head dim 16, two queries a head": (4, 2, 16),
    "head dim 40": (4, 2, 40),
    "head dim 64, one query a head": (2, 2, 64),
    "head dim 80, four queries a head": (4, 1, 80),
    "head dim 96, three queries a head": (3, 1, 96),
    "head dim 128, eight queries a head": (8, 1, 128),
}
Cut = tuple[int, int]
"""(tokens in the pages already, new tokens)."""


def shape(heads: int, kv_heads: int, head_dim: int, **other: object) -> DeepConfig:
    return replace(
        TINY, hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=2, intermediate_size=64, vocab_size=64, **other,
    )  # fmt: skip


def compare(
    config: DeepConfig, cuts: list[Cut], *, page: int = 4, splits: int | None = None, padding: int = 0,
    dtype: torch.dtype = torch.float32, layer_index: int = 1, kept: torch.dtype | None = None, gain: float = 1.0,
) -> None:  # fmt: skip
    """The layer's output and its pages after one step, computed by both; decodes come first, then padding.

    Pages are of dtype `kept`, or that of the weights. `gain` makes keys and values so many times as large.
    """
    exact = random_model(config, seed=3)
    model = DeepForCausalLM(config, exact.architecture, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    for own in model.layers:
        own.kqv_proj.data.mul_(gain)
        if own.k_norm is not None:
            own.k_norm.data.mul_(gain)
    generator = torch.Generator().manual_seed(9)
    decodes = sum(new == 1 for _, new in cuts)
    assert padding == 0 or decodes == len(cuts)
    per = max(-(-(past + new) // page) for past, new in cuts)
    blocks = len(cuts) * per + 2
    order = torch.randperm(blocks, generator=generator).to(torch.int32)
    tables = order[: len(cuts) * per].view(len(cuts), per)
    slots = torch.cat([
        tables[n][at // page].long() * page + at % page
        for n, (past, new) in enumerate(cuts) for at in [torch.arange(past, past + new)]
    ])  # fmt: skip
    positions = torch.cat([torch.arange(past, past + new) for past, new in cuts])
    tokens = len(positions)
    x, mu = torch.randn(2, tokens, config.hidden_size, generator=generator)
    angles = positions[:, None].float() * model.inv_freq
    written = torch.randn(2, 2, blocks, page, *_kv(config), generator=generator).to(kept or dtype)
    lens = [past + new for past, new in cuts]
    metadata = AttentionMetadata(
        query_lens=[new for _, new in cuts], seq_lens=lens, num_decodes=decodes, slot_mapping=slots, block_tables=tables
    )
    layer = model.layers[layer_index]
    assert isinstance(layer, DeepLayer)
    below = mu if layer_index else None
    caches = [
        ops.new_kv_cache(written.shape, kept or dtype, torch.device("cpu"))
        for ops in (Backend(), cuda.TritonBackend(model))
    ]
    for cache in caches:
        cache.copy_(written)
    rope = (angles.cos(), angles.sin())
    with torch.inference_mode():
        expected = Backend().attention(layer, x, below, rope, caches[0], metadata)
        if padding:
            x, mu, *rope = (torch.cat([t, torch.full((padding, t.shape[1]), 3.0)]) for t in (x, mu, *rope))
            below = mu if layer_index else None
            nothing = torch.zeros(padding, dtype=torch.int64)
            metadata = AttentionMetadata(
                query_lens=[1] * (decodes + padding), seq_lens=[1] * (decodes + padding), num_decodes=decodes + padding,
                slot_mapping=torch.cat([slots, nothing - 1]),
                block_tables=torch.cat([tables, torch.full((padding, per), -5, dtype=torch.int32)]),
                seq_lens_device=torch.cat([torch.tensor(lens), nothing]).to(torch.int32),
            )  # fmt: skip
        metadata = replace(metadata, num_splits=splits)
        out = cuda.TritonBackend(model).attention(layer, x, below, (rope[0], rope[1]), caches[1], metadata)
    assert out.isfinite().all()
    close = 3e-5 if dtype == torch.float32 else 2e-2
    assert (out[:tokens].float() - expected).abs().max() <= close * expected.abs().max()
    wide = [cache.float() for cache in caches]
    # A number between two of FP8 may go either way where BF16 is rounded earlier or later.
    step = 0.126 if kept == FP8 and dtype == torch.bfloat16 else 0.0
    assert torch.allclose(*wide, rtol=step, atol=1e-4 if dtype == torch.float32 else 4e-2)
    untouched = torch.ones(blocks * page, dtype=torch.bool)
    untouched[slots] = False
    before = written.float().flatten(2, 3)[:, :, untouched]
    assert torch.equal(wide[1].flatten(2, 3)[:, :, untouched], before)


def _kv(config: DeepConfig) -> tuple[int, int]:
    return config.num_key_value_heads, config.head_dim


@pytest.fixture
def by_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products by torch, as with many tokens, so that only attention is interpreted."""
    monkeypatch.setattr(cuda, "FEW_TOKENS", 0)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("name", SHAPES)
def test_decodes_of_any_length_equal_plain_torch(name):
    compare(shape(*SHAPES[name]), [(0, 1), (3, 1), (4, 1), (37, 1)], splits=1)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("name", SHAPES)
def test_prompts_and_chunks_of_any_length_equal_plain_torch(name):
    compare(shape(*SHAPES[name]), [(0, 1), (0, 9), (5, 4), (16, 17)])


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("splits", [2, 8])
def test_keys_cut_into_runs_equal_plain_torch(splits):
    compare(shape(4, 2, 16), [(0, 1), (15, 1), (16, 1), (17, 1), (77, 1)], splits=splits)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize(("window", "splits"), list(itertools.product([1, 5, 40], [1, 4])))
def test_a_sliding_window_hides_what_is_further_back(window, splits):
    compare(shape(4, 2, 16, sliding_window=window), [(0, 1), (4, 1), (60, 1), (0, 7), (45, 20)], splits=splits)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("page", [1, 3, 16, 32])
def test_pages_of_any_size(page):
    compare(shape(4, 2, 16), [(0, 1), (page, 1), (page - 1, 2), (2, page + 1)], page=page)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("splits", [1, 4])
def test_padding_rows_write_nothing(splits):
    compare(shape(4, 2, 16), [(0, 1), (33, 1), (20, 1)], splits=splits, padding=2)


@pytest.mark.usefixtures("by_cublas")
def test_no_qk_norm():
    compare(shape(4, 2, 16, use_qk_norm=False), [(3, 1), (0, 6)])


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("cuts", [[(70, 1), (130, 1)], [(9, 1), (40, 70), (0, 3)]], ids=["decodes", "mixed"])
def test_bf16_equals_plain_torch_within_its_rounding(cuts):
    compare(shape(4, 2, 32), cuts, page=16, splits=2, dtype=torch.bfloat16)


FP8_STEPS: dict[str, tuple[DeepConfig, list[Cut], dict[str, int]]] = {
    "decodes": (shape(8, 1, 128), [(0, 1), (3, 1), (37, 1)], {"splits": 1}),
    "keys cut into runs": (shape(4, 2, 16), [(0, 1), (16, 1), (17, 1), (77, 1)], {"splits": 4}),
    "prompts and chunks": (shape(4, 1, 80), [(0, 9), (5, 4), (16, 17)], {}),
    "mixed, three queries a head": (shape(3, 1, 96), [(0, 1), (33, 1), (0, 5), (7, 20)], {"page": 3}),
    "sliding window": (shape(4, 2, 16, sliding_window=5), [(4, 1), (60, 1), (0, 7), (45, 20)], {"splits": 2}),
    "padding": (shape(4, 2, 16), [(0, 1), (33, 1)], {"splits": 2, "padding": 2}),
    "no QK-norm": (shape(4, 2, 16, use_qk_norm=False), [(3, 1), (0, 6)], {}),
}


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("name", FP8_STEPS)
def test_pages_in_fp8_equal_plain_torch_with_the_same_rounding(name):
    config, cuts, options = FP8_STEPS[name]
    compare(config, cuts, kept=FP8, **options)


@pytest.mark.usefixtures("by_cublas")
@pytest.mark.parametrize("cuts", [[(5, 1), (20, 1)], [(5, 1), (20, 9)]], ids=["decodes", "mixed"])
def test_fp8_pages_saturate_large_keys_and_values(cuts):
    compare(shape(4, 2, 16), cuts, kept=FP8, gain=300.0)


@pytest.mark.parametrize("cuts", [[(70, 1), (9, 1)], [(9, 1), (40, 30)]], ids=["decodes", "mixed"])
def test_fp8_pages_equal_plain_torch_within_rounding(cuts):
    compare(shape(4, 2, 32), cuts, page=16, splits=2, dtype=torch.bfloat16, kept=FP8)


@pytest.mark.parametrize("layer_index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_with_norm_and_mu_inside_the_product(layer_index, dtype):
    compare(shape(4, 2, 12), [(3, 1), (8, 1), (0, 5)], dtype=dtype, layer_index=layer_index)


@pytest.mark.usefixtures("by_cublas")
def test_a_token_is_the_same_however_its_prompt_was_cut():
    config = shape(4, 2, 16)
    model = random_model(config, seed=3)
    x = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = torch.arange(50)[:, None].float() * model.inv_freq
    outs = []
    for cut in ([50], [17, 33], [32, 2, 16]):
        cache, start, parts = model.new_kv_cache(4, 16), 0, []
        for count in cut:
            at = torch.arange(start, start + count)
            metadata = AttentionMetadata(
                query_lens=[count], seq_lens=[start + count], slot_mapping=at,
                block_tables=torch.arange(4, dtype=torch.int32)[None],
            )  # fmt: skip
            rope = angles[at].cos(), angles[at].sin()
            with torch.inference_mode():
                ops = cuda.TritonBackend(model)
                parts.append(ops.attention(model.layers[0], x[at], None, rope, cache, metadata))
            start += count
        outs.append(torch.cat(parts))
    # Torch's products may add up in another order for another number of rows, so not to the bit.
    assert all(torch.allclose(outs[0], other, atol=1e-5) for other in outs[1:])
