"""With `deterministic`, a token's bits do not depend on its company, its row, or how its text was computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from support.checkpoints import TINY, random_model
from triton.runtime import interpreter

from pyllm.model import Architecture, AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.cuda import backend as cuda

# Inputs that no block divides, so that the last of a sum is not like the others.
CONFIG = replace(
    TINY,
    vocab_size=64,
    hidden_size=80,
    intermediate_size=180,
    num_hidden_layers=2,
    num_key_value_heads=1,
    num_experts=2,
)
LATEST = Architecture.latest(CONFIG)
VARIANTS: dict[str, tuple[DeepConfig, Architecture | None]] = {
    "routed": (CONFIG, None),
    "sliding window, untied": (replace(CONFIG, sliding_window=5, tie_word_embeddings=False), None),
    "mu after the MLP, a shared expert": (
        CONFIG,
        replace(LATEST, contextual_mu=False, mu_highway=False, mu_guidance=True, shared_expert_size=24),
    ),
}
PAGE, MOST = 4, 6
"""Tokens of a page, and pages of a text."""


@pytest.fixture(autouse=True)
def _matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as matrix units make them: every row alike, and rounded by an instruction that the block chooses."""

    def numbers(handle: Any) -> Any:
        data = handle.data
        if handle.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float64)

    def dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        left, right, total = numbers(a), numbers(b), d.data
        depth = 32 if len(left) >= 64 else 16
        for at in range(0, left.shape[1], depth):
            total = total + (left[:, at : at + depth] @ right[at : at + depth]).astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def make(name: str = "routed", dtype: torch.dtype = torch.bfloat16, *, deterministic: bool = True) -> DeepForCausalLM:
    config, architecture = VARIANTS[name]
    exact = random_model(config, seed=3, architecture=architecture)
    model = DeepForCausalLM(config, exact.architecture, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    model.ops = cuda.TritonBackend(model, deterministic=deterministic)
    return model


def texts(count: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(4, CONFIG.vocab_size, (length,), generator=generator) for _ in range(count)]


def compute(
    model: DeepForCausalLM, cache: torch.Tensor, parts: list[tuple[torch.Tensor, int, int]]
) -> list[torch.Tensor]:
    """Logits of each part of a step: tokens `begin` ... `end` - 1 of a text, whose pages follow from its place."""
    at = [torch.arange(begin, end) for _, begin, end in parts]
    metadata = AttentionMetadata(
        query_lens=[len(places) for places in at], seq_lens=[end for *_, end in parts],
        num_decodes=sum(len(places) == 1 for places in at),
        slot_mapping=torch.cat([places + n * MOST * PAGE for n, places in enumerate(at)]),
        block_tables=torch.arange(len(parts) * MOST, dtype=torch.int32).view(-1, MOST),
    )  # fmt: skip
    ids = torch.cat([text[places] for (text, *_), places in zip(parts, at, strict=True)])
    with torch.inference_mode():
        logits = model.logits(model(ids, torch.cat(at), metadata, cache))
    return list(logits.split(metadata.query_lens))


def in_pieces(model: DeepForCausalLM, text: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """All logits of a text that is computed alone in these pieces."""
    cache, logits, begin = model.new_kv_cache(MOST, PAGE), [], 0
    for piece in pieces:
        logits += compute(model, cache, [(text, begin, begin + piece)])
        begin += piece
    return torch.cat(logits)


class Watched:
    """A text whose last token is decoded, again and again, in the middle of others."""

    def __init__(self, model: DeepForCausalLM) -> None:
        self._model, self._text = model, texts(1, 20)[0]
        self._pages = model.new_kv_cache(MOST, PAGE)
        compute(model, self._pages, [(self._text, 0, 19)])

    def among(self, company: int, prompts: int = 0) -> torch.Tensor:
        """Its logits in a step with `others` decodes and `prompts` prompts."""
        cache = torch.zeros_like(self._model.new_kv_cache((company + 1 + prompts) * MOST, PAGE))
        place = company // 2
        cache[:, :, place * MOST : (place + 1) * MOST] = self._pages
        parts = [(other, 4, 5) for other in texts(company, 5)]  # their own pages are empty, which matters to no other
        parts[place:place] = [(self._text, 19, 20)]
        parts += [(prompt, 0, 3) for prompt in texts(prompts, 3)]
        return compute(self._model, cache, parts)[place][0]


@pytest.mark.parametrize(
    ("dtype", "companies"), [(torch.bfloat16, (1, 17, 65)), (torch.float32, (33,))], ids=["bf16", "fp32"]
)
def test_a_token_has_the_same_bits_alone_and_in_any_company(dtype, companies):
    watched = Watched(make(dtype=dtype))
    alone = watched.among(0)
    for company in companies:
        assert torch.equal(watched.among(company), alone), company
    assert torch.equal(watched.among(3, prompts=1), alone), "next to a prompt"


@pytest.mark.parametrize("name", VARIANTS)
def test_bits_are_equal_for_prompt_chunks_drafts_and_decodes(name):
    model, text = make(name), texts(1, 21)[0]
    whole = in_pieces(model, text, [21])
    assert torch.equal(in_pieces(model, text, [5, 9, 1, 6]), whole), "odd chunks"
    assert torch.equal(in_pieces(model, text, [18, 3]), whole), "guesses that were right"
    assert torch.equal(in_pieces(model, text, [19, 1, 1]), whole), "decoded, as if it had never been preempted"


def test_without_it_the_same_comparisons_find_differences():
    """Or they would show nothing."""
    model, text = make(deterministic=False), texts(1, 21)[0]
    whole = in_pieces(model, text, [21])
    assert not torch.equal(in_pieces(model, text, [5, 9, 1, 6]), whole)
    watched = Watched(model)
    assert not torch.equal(watched.among(33), watched.among(0))
