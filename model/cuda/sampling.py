"""Triton kernels that turn scores into tokens: the draw and log-probabilities. Nothing sorts the vocabulary.

One program reads one row several times, and nothing waits for the host. The smallest kept probability is
found by its bits: a probability in [0, 1] orders as its bit pattern does, so ten passes that each settle three bits
find it exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import SamplingBatch

VOCAB_BLOCK = 2048
NUM_WARPS = 16


@triton.jit
def _splitmix(x):
    """SplitMix64's mixing of uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """FP64 in [0, 1), the number that `sampling.uniform` makes from the same seed and position."""
    mixed = _splitmix(_splitmix(seed.to(tl.uint64)) + position.to(tl.uint64))
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _best(row, vocab, below, below_at, BLOCK: tl.constexpr):
    """The highest score after (below, below_at) in the order of score, then id, and its id."""
    at = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, vocab, BLOCK):
        score = tl.load(row + start + at, mask=start + at < vocab, other=-float("inf"))
        left = (start + at < vocab) & ((score < below) | ((score == below) & (start + at > below_at)))
        better = left & ((score > highest) | (where == 2147483647))
        highest = tl.where(better, score, highest)
        where = tl.where(better, start + at, where)
    score = tl.max(highest, axis=0)
    return score, tl.min(tl.where(highest == score, where, 2147483647), axis=0)


@triton.jit
def _kept_from(row, vocab, highest, temperature, floor, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest bit pattern t for which tokens of probability >= max(t, floor) number or weigh at least `wanted`.

    Probabilities are exp((score - highest) / temperature), so the likeliest token's is 1.
    """
    at, branch = tl.arange(0, BLOCK), tl.arange(0, 8)
    found = 0
    for step in range(10):
        shift = 27 - 3 * step
        pivots = tl.maximum(found + (branch << shift), floor)
        sums = tl.zeros((BLOCK, 8), tl.float32)
        for start in range(0, vocab, BLOCK):
            score = tl.load(row + start + at, mask=start + at < vocab, other=-float("inf"))
            weight = tl.exp((score - highest) / temperature)
            bits = weight.to(tl.int32, bitcast=True)
            counted = weight if BY_MASS else tl.where(start + at < vocab, 1.0, 0.0)
            sums += tl.where(bits[:, None] >= pivots[None, :], counted[:, None], 0.0)
        enough = tl.sum(sums.to(tl.float64), axis=0) >= wanted
        found += tl.maximum(tl.sum(enough.to(tl.int32), axis=0) - 1, 0) << shift
    return tl.maximum(found, floor)


@triton.jit
def _mass(row, vocab, highest, temperature, floor, target, BLOCK: tl.constexpr):
    """The sum of the kept probabilities, and the block in which the sum passes `target`, with the sum before it."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    block = 0
    before = tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        score = tl.load(row + start + at, mask=start + at < vocab, other=-float("inf"))
        weight = tl.exp((score - highest) / temperature)
        kept = tl.where(weight.to(tl.int32, bitcast=True) >= floor, weight, 0.0)
        share = tl.sum(kept.to(tl.float64), axis=0)
        here = (total <= target) & (share > 0.0)
        block = tl.where(here, start, block)
        before = tl.where(here, total, before)
        total += share
    return total, block, before


@triton.jit(do_not_specialize=["vocab"])
def draw_kernel(
    logits, temperature, top_k, top_p, min_p, seed, position, out, vocab, row_stride,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token id per row; temperature 0 takes the highest score, the first of equals. Grid: (rows,)."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    heat = tl.load(temperature + index)
    highest, chosen = _best(row, vocab, float("inf"), -1, BLOCK)
    if heat > 0.0:
        floor = 0
        if TOP_K:
            count = tl.load(top_k + index)
            if (count > 0) & (count < vocab):
                floor = _kept_from(row, vocab, highest, heat, floor, count.to(tl.float64), False, BLOCK)
        if TOP_P:
            share = tl.load(top_p + index)
            if share < 1.0:
                total, block, before = _mass(row, vocab, highest, heat, floor, -1.0, BLOCK)
                floor = _kept_from(row, vocab, highest, heat, floor, share * total, True, BLOCK)
        if MIN_P:
            least = tl.load(min_p + index)
            floor = tl.maximum(floor, least.to(tl.int32, bitcast=True))
        total, block, before = _mass(row, vocab, highest, heat, floor, -1.0, BLOCK)
        target = _uniform(tl.load(seed + index), tl.load(position + index)) * total
        total, block, before = _mass(row, vocab, highest, heat, floor, target, BLOCK)
        at = block + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < vocab, other=-float("inf"))
        weight = tl.exp((score - highest) / heat)
        kept = tl.where(weight.to(tl.int32, bitcast=True) >= floor, weight, 0.0)
        sums = before + tl.cumsum(kept.to(tl.float64), axis=0)
        last = tl.max(tl.where(kept > 0.0, at, block), axis=0)
        chosen = tl.minimum(block + tl.sum((sums <= target).to(tl.int32), axis=0), last)
    tl.store(out + index, chosen.to(tl.int64))


@triton.jit(do_not_specialize=["vocab", "top"])
def logprobs_kernel(logits, chosen, of_chosen, ranks, best, ids, vocab, row_stride, top, BLOCK: tl.constexpr):
    """Log-probability and rank of the chosen token, and the `top` most likely, best first. Grid: (rows,)."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    own = tl.load(row + tl.load(chosen + index))
    highest, _first = _best(row, vocab, float("inf"), -1, BLOCK)
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    better = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        score = tl.load(row + start + at, mask=start + at < vocab, other=-float("inf"))
        sums += tl.exp(score - highest)
        better += (score > own).to(tl.int32)
    scale = highest + tl.log(tl.sum(sums, axis=0))
    tl.store(of_chosen + index, own - scale)
    tl.store(ranks + index, tl.sum(better, axis=0).to(tl.int64) + 1)
    score = float("inf")
    place = -1
    for n in range(top):
        score, place = _best(row, vocab, score, place, BLOCK)
        tl.store(best + index * top + n, score - scale)
        tl.store(ids + index * top + n, place.to(tl.int64))


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw as `sampling.draw` does, from final scores FP32 [N, vocab] -> int64 [N].

    The random numbers are the same; a token exactly at the border of top-k, top-p or of the draw may differ, because
    sums are rounded in another order.
    """
    rows, vocab = logits.shape
    out = torch.empty_like(batch.seed)
    unused = batch.temperature
    draw_kernel[(rows,)](
        logits, batch.temperature, unused if batch.top_k is None else batch.top_k,
        unused if batch.top_p is None else batch.top_p, unused if batch.min_p is None else batch.min_p,
        batch.seed, batch.position, out, vocab, logits.stride(0), TOP_K=batch.top_k is not None,
        TOP_P=batch.top_p is not None, MIN_P=batch.min_p is not None, BLOCK=VOCAB_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sampling.logprobs`; each of the `top` takes a pass over the scores, so it is meant for a few dozen."""
    rows, vocab = logits.shape
    top = min(top, vocab)
    of_chosen, ranks = logits.new_empty(rows), chosen.new_empty(rows)
    best, ids = logits.new_empty((rows, top)), chosen.new_empty((rows, top))
    logprobs_kernel[(rows,)](
        logits, chosen, of_chosen, ranks, best, ids, vocab, logits.stride(0), top, BLOCK=VOCAB_BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return of_chosen, ranks, best, ids
