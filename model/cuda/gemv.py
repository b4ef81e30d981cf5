"""Triton kernels of products for the fewest tokens: matrix times vector, with the weights in registers.

A program reads its rows of the weights whole, before its input is there (see `kernels.follow`), and then goes
through the tokens one by one. Matrix units would compute 16 tokens in the same time, but they contend for shared
memory: keys, queries and values of one token take 14 us with them on an H200, where reading memory takes 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import FRESH, follow, side
from .mlp import activated, hash_factors


@triton.jit
def _rows_of(weight, rows, row_ok, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [N] of a weight [.., K]: [N, BLOCK_K], zero beyond."""
    at = tl.arange(0, BLOCK_K)
    place = weight + rows[:, None].to(tl.int64) * K + at[None, :]
    mask = row_ok[:, None]
    if K != BLOCK_K:
        mask = mask & (at < K)[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _vector(x, K: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    """x [K] as FP32 [BLOCK_K], rounded to `dtype` as for a matrix unit."""
    at = tl.arange(0, BLOCK_K)
    return tl.load(x + at, mask=at < K, other=0.0).to(dtype).to(tl.float32)


@triton.jit
def _times(weights, vector):
    """[N, K] times [K]: FP32 [N]."""
    return tl.sum(weights.to(tl.float32) * vector[None, :], axis=1)


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x, weight, x2, weight2, out, tokens, x_stride, x2_stride,
    N: tl.constexpr, K: tl.constexpr, N2: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes the same as `kernels.linear_kernel`. Grid: (blocks of N + blocks of N2,)."""
    x, x_stride, weight, rows, count, first = side(x, x_stride, weight, x2, x2_stride, weight2, N, N2, BLOCK_N)
    weights = _rows_of(weight, rows, rows < count, K, BLOCK_K)
    follow(PDL)
    for token in range(tokens):
        vector = _vector(x + token * x_stride, K, BLOCK_K, weight.dtype.element_ty)
        tl.store(out + token * (N + N2) + first + rows, _times(weights, vector), mask=rows < count)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["ids"])
def gate_up_kernel(
    b, weight, table, ids, experts, routes, scales, channels, layer, out,
    H: tl.constexpr, W: tl.constexpr, ROUTED: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
    SHARED: tl.constexpr, EXPERT: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, VOCAB: tl.constexpr,
    MODULATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes the same as `mlp.gate_up_kernel`. Grid: (blocks of W, tokens)."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < W
    own = token * 0
    if ROUTED:  # the id's own expert is known already, and mu seldom overrides it
        identity = tl.load(ids + token, cache_modifier=FRESH)
        own = tl.load(table + identity, mask=identity >= 0, other=0)
    read = row_ok
    if K > 0:  # columns that the id does not use are zero, and their weights are not read
        identity = tl.load(ids + token + tl.arange(0, 1), cache_modifier=FRESH)
        factor = hash_factors(
            identity, identity >= 0, rows, routes, scales, channels, layer, SHARED, EXPERT, EXPERTS, K, VOCAB, MODULATED
        )
        factor = tl.sum(factor, axis=0)
        read = row_ok & (factor != 0.0)
    gate = _rows_of(weight, own * 2 * W + rows, read, H, BLOCK_K)
    up = _rows_of(weight, own * 2 * W + W + rows, read, H, BLOCK_K)
    follow(PDL)
    expert = own
    if ROUTED:
        expert = tl.load(experts + token)
        if (expert != own) & (expert >= 0):
            gate = _rows_of(weight, expert * 2 * W + rows, row_ok, H, BLOCK_K)
            up = _rows_of(weight, expert * 2 * W + W + rows, row_ok, H, BLOCK_K)
    if expert >= 0:
        vector = _vector(b + token * H, H, BLOCK_K, weight.dtype.element_ty)
        both = activated(_times(gate, vector), ACTIVATION) * _times(up, vector)
        if K > 0:
            both *= factor
        tl.store(out + token * W + rows, both.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def down_kernel(
    a, weight, experts, x,
    H: tl.constexpr, W: tl.constexpr, ROUTED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes the same as `mlp.down_kernel`. Grid: (blocks of H, tokens)."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = token * 0
    if ROUTED:  # written two kernels ago, by a kernel that has ended
        expert = tl.load(experts + token, cache_modifier=FRESH)
    weights = _rows_of(weight, expert * H + rows, (rows < H) & (expert >= 0), W, BLOCK_K)
    follow(PDL)
    if expert >= 0:
        place = x + token * H + rows
        before = tl.load(place, mask=rows < H, other=0.0)
        tl.store(
            place, before + _times(weights, _vector(a + token * W, W, BLOCK_K, weight.dtype.element_ty)), mask=rows < H
        )
