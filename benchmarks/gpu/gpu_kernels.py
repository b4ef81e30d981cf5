"""Every operation of a backend against plain torch in FP32, on random weights and inputs; part of gpu_check.py.

What an operation leaves unwritten shows: all memory that is not initialised comes full of NaN.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pyllm.model import DeepForCausalLM, sampling
from pyllm.model.backend import AttentionMetadata, Backend
from pyllm.model.config import DeepConfig
from pyllm.model.draw_params import DrawParams
from pyllm.model.fp8 import FP8, has_fp8
from pyllm.model.parameters import DeepLayer

PAGE = 16
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 1.5e-2}
"""Largest error of a result, as a share of its root mean square."""
FP8_LIMITS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""The same for FP8 pages: a number between two of them may go either way."""
Cut = tuple[int, int]
"""(tokens in the pages already, new tokens)."""
Make = Callable[[DeepForCausalLM], Backend]


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison."""

    name: str
    shape: str
    dtype: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the result is as near as it must be; NaN is not."""
        return self.error <= self.limit


def attention_config(heads: int, kv_heads: int, head_dim: int, **other: Any) -> DeepConfig:
    """A small network around one shape of attention."""
    return DeepConfig(
        vocab_size=512, hidden_size=heads * head_dim, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, **other,
    )  # fmt: skip


@torch.no_grad()
def randomise(model: DeepForCausalLM, seed: int = 0) -> None:
    """Random weights on which a network neither dies out nor blows up."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = "norm" in name
        std = 0.1 if norm or parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        noise = torch.randn(parameter.shape, generator=generator, device=model.device) * std
        parameter.copy_(noise + 1.0 if norm else noise)
    for name, buffer in model.named_buffers():
        if name.endswith("token_to_expert"):
            buffer.copy_(torch.arange(len(buffer), device=model.device) % model.config.experts)
        elif name.endswith("routes"):
            scores = torch.rand(buffer.shape[1], model.config.experts, generator=generator, device=model.device)
            buffer.copy_(scores.argsort(dim=1)[:, : len(buffer)].T)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Unwritten memory is NaN, or a number that is no token."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **how: Any) -> Tensor:
            out: Tensor = make(*args, **how)
            return out.fill_(float("nan") if out.is_floating_point() else 10**6)

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            stack.enter_context(patch.object(owner, name, poison(getattr(owner, name))))
        yield


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference in a row, as a share of the row's root mean square, over 8: rounding's usual spread.

    Row by row, since rows differ: a prompt's first token attends to one value, its last to the mean of thousands.
    """
    got, wanted = (
        part.float().reshape(-1, part.shape[-1] if part.dim() > 1 else part.numel()) for part in (got, wanted)
    )
    difference = (got - wanted) / wanted.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
    return float(torch.maximum(difference.square().mean(dim=-1).sqrt(), difference.abs().amax(dim=-1) / 8).amax())


class Pair:
    """One network twice: the operations to be checked, and plain torch on the same weights in FP32."""

    def __init__(self, config: DeepConfig, dtype: torch.dtype, device: torch.device, make: Make) -> None:
        self.exact = DeepForCausalLM(config, dtype=torch.float32, device=device)
        randomise(self.exact)
        self.model = DeepForCausalLM(config, self.exact.architecture, dtype=dtype, device=device)
        self.model.load_state_dict(self.exact.state_dict())
        self.exact.load_state_dict(self.model.state_dict())  # with the weights as they were rounded
        self.model.ops = make(self.model)
        self.generator = torch.Generator(device).manual_seed(1)
        self.device = device

    def randn(self, *shape: int) -> Tensor:
        """Numbers that the model's dtype holds exactly, in FP32."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return numbers.to(self.model.dtype).float()

    def both(self, work: Callable[[DeepForCausalLM], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
        """What the two make of it, result by result."""
        with poisoned():
            got = work(self.model)
        return zip(got, work(self.exact), strict=True)

    def layer(self, model: DeepForCausalLM, index: int) -> DeepLayer:
        """A layer of one of the two."""
        layer = model.layers[index]
        assert isinstance(layer, DeepLayer)
        return layer


def check_tokens(pair: Pair, tokens: int) -> dict[str, float]:
    """The operations that work token by token."""
    config, size = pair.model.config, pair.model.config.hidden_size
    x, h, mu = pair.randn(tokens, size), pair.randn(tokens, size), pair.randn(tokens, size)
    ids = torch.randint(config.vocab_size, (tokens,), generator=pair.generator, device=pair.device)

    def simple(model: DeepForCausalLM) -> tuple[Tensor, ...]:
        ops = model.ops
        return ops.embed(ids, model.embed_tokens), ops.rms_norm(x, model.norm, 1e-6), model.logits(x)

    def dynamics(model: DeepForCausalLM) -> tuple[Tensor, ...]:
        first, second = (pair.layer(model, n) for n in (0, 1))
        x1, velocity, mu1 = model.ops.dynamics(first, x.clone(), h, None)
        below1, total = model.ops.highway(mu1, None)
        kept = [part.float().clone() for part in (x1, velocity, mu1, below1)]
        x2, velocity, mu2 = model.ops.dynamics(second, x1, mu, velocity)
        below2, total = model.ops.highway(mu2, total)
        return (*kept, x2, velocity, mu2, below2, total)

    def experts(model: DeepForCausalLM) -> tuple[Tensor, ...]:
        out, chosen = model.ops.routed_mlp(pair.layer(model, 1), x.clone(), ids, mu)
        assert chosen is not None
        return out, chosen

    found = dict(zip(("embed", "rms_norm", "linear"), (relative(*two) for two in pair.both(simple)), strict=True))
    found["dynamics"] = max(relative(*two) for two in pair.both(dynamics))
    (out, exact), (chosen, wanted) = pair.both(experts)
    same = chosen == wanted  # scores that tie but for rounding may fall either way
    found["experts"] = relative(out[same], exact[same]) if same.float().mean() >= 0.995 else float("inf")
    return found


def step_of(cuts: list[Cut], device: torch.device) -> tuple[AttentionMetadata, Tensor, int]:
    """A step's metadata, the positions of its tokens, and how many pages there are; decodes must come first."""
    per = max(-(-(past + new) // PAGE) for past, new in cuts)
    order = torch.randperm(len(cuts) * per, generator=torch.Generator().manual_seed(5)).to(torch.int32)
    tables = order.view(len(cuts), per)
    at = [torch.arange(past, past + new) for past, new in cuts]
    slots = torch.cat([tables[n][place // PAGE].long() * PAGE + place % PAGE for n, place in enumerate(at)])
    lengths = [past + new for past, new in cuts]
    starts = [0, *itertools.accumulate(new for _, new in cuts)]
    metadata = AttentionMetadata(
        query_lens=[new for _, new in cuts], seq_lens=lengths, num_decodes=sum(new == 1 for _, new in cuts),
        slot_mapping=slots.to(device), block_tables=tables.to(device),
        seq_lens_device=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
    )  # fmt: skip
    return metadata, torch.cat(at).to(device), len(cuts) * per


def check_attention(pair: Pair, cuts: list[Cut], kept: torch.dtype | None = None) -> dict[str, float]:
    """Attention over pages that hold random keys and values, in dtype `kept`, and the pages that it has written."""
    config = pair.model.config
    metadata, positions, blocks = step_of(cuts, pair.device)
    tokens, size = len(positions), config.hidden_size
    x, mu = pair.randn(tokens, size), pair.randn(tokens, size)
    pages = pair.randn(config.num_hidden_layers, 2, blocks, PAGE, config.num_key_value_heads, config.head_dim)

    def attend(model: DeepForCausalLM) -> tuple[Tensor, ...]:
        cache = model.new_kv_cache(blocks, PAGE, kept)
        cache.copy_(pages)
        angles = positions[:, None].float() * model.inv_freq
        below = mu.to(model.dtype) if model is pair.model else mu
        out = model.ops.attention(
            pair.layer(model, 1), x, below, (angles.cos(), angles.sin()), cache, metadata
        )  # fmt: skip
        return out, cache[1].float()

    (out, exact), (written, wanted) = pair.both(attend)
    if kept == FP8:  # in whose pages single numbers differ by whole steps
        spread = float((written - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        return {"attention, FP8": relative(out, exact), "pages, FP8": spread}
    return {"attention": relative(out, exact), "pages": relative(written, wanted)}


def check_draws(pair: Pair, rows: int, vocab: int) -> dict[str, float]:
    """Draws and log-probabilities; the share of rows whose draw differs is the error of a draw."""
    logits = 3 * torch.randn(rows, vocab, generator=pair.generator, device=pair.device)
    found = {}
    for name, fields in {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.9},
        "top-k, top-p": {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
    }.items():
        params = [DrawParams(seed=row, **fields) for row in range(rows)]
        batch = sampling.SamplingBatch.build(params, [7] * rows, pair.device, full=True)
        with poisoned():
            drawn = pair.model.ops.draw(logits, batch)
        different = float((drawn != sampling.draw(logits, batch)).float().mean())
        found[f"draw {name}"] = 0.0 if different <= (0.0 if name == "greedy" else 0.01) else float("inf")
    chosen = logits.argmax(dim=-1)
    with poisoned():
        got = pair.model.ops.logprobs(logits, chosen, 5)
    wanted = sampling.logprobs(logits, chosen, 5)
    found["logprobs"] = max(relative(a, b) for a, b in zip(got, wanted, strict=True))
    return found


def cases(quick: bool, dry: bool) -> Iterator[tuple[str, DeepConfig, torch.dtype, list[Any]]]:
    """What is compared, the most important first: a shape, its dtype, and numbers of tokens or lists of cuts."""
    from pyllm.benchmarks.checkpoint import SHAPES

    if dry:
        tiny = replace(attention_config(4, 2, 16), intermediate_size=64, dynamics_controller_hidden=16)
        yield "tiny", tiny, torch.float32, [1, 3, [(0, 1), (17, 1)], [(3, 1), (0, 5), (16, 3)]]
        return
    contexts = [1, 2, 15, 16, 17, 511, 512, 2048, 4097]
    decodes = [[(length - 1, 1)] for length in contexts] + [[(length - 1, 1) for length in contexts]]
    decodes += [[(100 + 31 * n, 1) for n in range(count)] for count in (3, 33, 131, 256)]
    prompts = [[(0, 1), (0, 5), (0, 512)], [(2047, 1), (64, 100), (1500, 548)], [(0, 2048)], [(7, 1)] * 30 + [(9, 77)]]
    few = [1, 7, 64, 500, decodes[9], prompts[1]]
    for name in ("1.5b", "150m"):
        config = replace(SHAPES[name], num_hidden_layers=2)
        everything = [1, 2, 5, 16, 17, 33, 64, 65, 129, 1000, 2048, *decodes, *prompts]
        yield name, config, torch.bfloat16, few if quick else everything
    if quick:
        return
    yield "150m", replace(SHAPES["150m"], num_hidden_layers=2), torch.float32, few
    for heads, kv_heads, head_dim in ((8, 8, 64), (16, 2, 128), (8, 2, 80), (6, 2, 96)):
        yield (
            f"{heads}/{kv_heads} heads of {head_dim}",
            attention_config(heads, kv_heads, head_dim),
            torch.bfloat16,
            few,
        )
    yield "window 100", attention_config(8, 2, 64, sliding_window=100), torch.bfloat16, few
    dense = replace(SHAPES["150m"], num_hidden_layers=2, use_qk_norm=False)
    yield "no QK-norm", dense, torch.bfloat16, few


@torch.inference_mode()
def check_all(device: torch.device, make: Make, *, quick: bool, dry: bool, seconds: float) -> tuple[list[Check], int]:
    """Compare until the time is up; the comparisons, and how many cases were left out."""
    checks: list[Check] = []
    left = 0
    until = time.monotonic() + seconds
    for name, config, dtype, wanted in cases(quick, dry):
        if time.monotonic() > until:
            left += len(wanted)
            continue
        pair = Pair(config, dtype, device, make)
        for case in wanted:
            if time.monotonic() > until:
                left += 1
                continue
            found = check_attention(pair, case) if isinstance(case, list) else check_tokens(pair, case)
            shown = f"{name}, {case if isinstance(case, int) else f'{len(case)} sequences, {case[-1]} last'}"
            checks += [Check(op, shown, str(dtype)[6:], error, LIMITS[dtype]) for op, error in found.items()]
            if isinstance(case, list) and has_fp8(device):
                found = check_attention(pair, case, FP8)
                checks += [Check(op, shown, str(dtype)[6:], error, FP8_LIMITS[dtype]) for op, error in found.items()]
        rows, vocab = (3, 300) if dry else (64, config.vocab_size)
        drawn = check_draws(pair, rows, vocab)
        checks += [Check(op, name, "float32", error, LIMITS[torch.float32]) for op, error in drawn.items()]
    return checks, left
