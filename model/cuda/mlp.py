"""Triton kernels of the routed MLP: choosing experts, sorting tokens by expert on the device, grouped products.

One token goes to one expert, so an expert's result is added to the residual stream without atomics. An expert of -1
(a padding row) gets no work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import FRESH, dot, follow, sigmoid

DENSE = tl.constexpr(0)  # all tokens use expert 0; blocks of tokens along the grid
MASKED = tl.constexpr(1)  # all tokens in one block; one expert after the other along the grid, each keeps its own rows
SORTED = tl.constexpr(2)  # tokens are taken in the order of their experts
TOGETHER = tl.constexpr(4)  # experts scored at once


@triton.jit(do_not_specialize_on_alignment=["ids"])
def route_kernel(
    x, norm, mu, router, table, ids, experts, out, eps, own_score,
    H: tl.constexpr, E: tl.constexpr, ROUTED: tl.constexpr, ROUTER: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of x, and the expert of each token as `Backend.route` chooses it. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    follow(PDL)
    value = tl.load(x + token * H + at, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    value = value * scale * tl.load(norm + at, mask=inside, other=0.0)
    tl.store(out + token * H + at, value.to(out.dtype.element_ty), mask=inside)
    if ROUTED:
        identity = tl.load(ids + token)
        own = tl.load(table + identity, mask=identity >= 0, other=-1)
        best = own
        if ROUTER:
            guide = tl.load(mu + token * H + at, mask=inside, other=0.0)
            highest = -float("inf")
            for first in tl.static_range(0, E, TOGETHER):
                expert = first + tl.arange(0, TOGETHER)
                row = router + expert[:, None] * H + at[None, :]
                part = tl.load(row, mask=(expert < E)[:, None] & inside[None, :], other=0.0) * guide[None, :]
                score = tl.sum(part, axis=1) + tl.where(own == expert, own_score, 0.0)
                score = tl.where(expert < E, score, -float("inf"))
                top, name = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
                best = tl.where(top > highest, first + name, best)
                highest = tl.maximum(top, highest)
            best = tl.where(own < 0, own, best)
        tl.store(experts + token, best)


@triton.jit(do_not_specialize=["tokens"])
def sort_kernel(
    experts, order, offsets, tokens, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr
):
    """Token numbers int32 in the order of their experts, and where each expert's begin, int32 [E + 1].

    Every program counts all tokens for itself, so none waits for another. Grid: (blocks of tokens,).
    """
    follow(PDL)
    mine = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    names = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for block in range(tl.cdiv(tokens, BLOCK)):
        found = tl.load(experts + block * BLOCK + at, mask=block * BLOCK + at < tokens, other=-1)
        counts = tl.sum((found[:, None] == names[None, :]).to(tl.int32), axis=0)
        total += counts
        before += tl.where(block < mine, counts, 0)
    begins = tl.cumsum(total, axis=0) - total
    if mine == 0:
        tl.store(offsets + names, begins, mask=names <= E)
    token = mine * BLOCK + at
    found = tl.load(experts + token, mask=token < tokens, other=-1)
    is_mine = (found[:, None] == names[None, :]).to(tl.int32)
    rank = tl.cumsum(is_mine, axis=0) - is_mine + (before + begins)[None, :]
    place = tl.sum(rank * is_mine, axis=1)
    tl.store(order + place, token, mask=(found >= 0) & (found < E))


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """GELU, ReLU or SiLU of FP32."""
    if ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "relu":
        gate = tl.maximum(gate, 0.0)
    else:
        gate = gate * sigmoid(gate)
    return gate


@triton.jit
def hash_factors(
    ids, token_ok, columns, routes, scales, channels, layer, SHARED: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, VOCAB: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """The factors of the inner channels of the TR-Hash line: FP32 [M, N] for tokens' ids [M], columns [N].

    The first SHARED columns are the shared expert's; then come W of each of E experts. A negative id uses none.
    """
    ok = token_ok & (ids >= 0)
    expert = (columns - SHARED) // W  # negative for some shared columns, which no route has
    factor = tl.zeros((ids.shape[0], columns.shape[0]), tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(routes + k * VOCAB + ids, mask=ok, other=-1)
        used = (chosen[:, None] == expert[None, :]) & (columns >= SHARED)[None, :] & ok[:, None]
        factor += tl.where(used, tl.load(scales + 1 + k), 0.0)
    if MODULATED:
        channel = columns - SHARED - expert * W
        here = (columns >= SHARED) & (expert < E)
        amount = tl.load(channels + expert * W + channel, mask=here, other=0.0)
        start = expert.to(tl.uint32) * 0x85EBCA77 + channel.to(tl.uint32) * 0xC2B2AE3D + layer.to(tl.uint32)
        h = ids.to(tl.uint32)[:, None] * 0x9E3779B1 + start[None, :]
        h ^= h >> 16
        h *= 0x7FEB352D
        h ^= h >> 15
        factor *= 1.0 + tl.where((h & 1) == 1, amount[None, :], -amount[None, :])
    return tl.where((columns < SHARED)[None, :], tl.load(scales), factor)


@triton.jit
def _rows(experts, order, offsets, tokens, MODE: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's share of the work: its expert, its tokens [M], which of them count [M], and whether any does."""
    tile = tl.program_id(1)
    at = tl.arange(0, BLOCK_M)
    if MODE == DENSE:
        expert = 0
        rows = tile * BLOCK_M + at
        ok = rows < tokens
        some = tile * BLOCK_M < tokens
    elif MODE == MASKED:
        expert = tile
        rows = at
        ok = tl.load(experts + rows, mask=rows < tokens, other=-1, cache_modifier=FRESH) == expert
        some = tl.max(ok.to(tl.int32), axis=0) > 0
    else:
        expert = -1
        first = 0
        last = 0
        done = 0
        for e in tl.static_range(E):
            begin = tl.load(offsets + e, cache_modifier=FRESH)
            end = tl.load(offsets + e + 1, cache_modifier=FRESH)
            tiles = tl.cdiv(end - begin, BLOCK_M)
            here = (tile >= done) & (tile < done + tiles)
            expert = tl.where(here, e, expert)
            first = tl.where(here, begin + (tile - done) * BLOCK_M, first)
            last = tl.where(here, end, last)
            done += tiles
        ok = first + at < last
        rows = tl.load(order + first + at, mask=ok, other=0, cache_modifier=FRESH)
        some = expert >= 0
    return expert, rows, ok, some


@triton.jit(do_not_specialize=["tokens", "layer"], do_not_specialize_on_alignment=["ids"])
def gate_up_kernel(
    b, weight, experts, order, offsets, ids, routes, scales, channels, layer, out, tokens,
    H: tl.constexpr, W: tl.constexpr, E: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
    SHARED: tl.constexpr, EXPERT: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, VOCAB: tl.constexpr,
    MODULATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(b gate) * (b up) of each token's expert: b [T, H], weight [E, 2W, H] -> out [T, W], in the tokens' order.

    With K, the columns are those of `hash_factors`, with experts of width EXPERT.

    Grid: (blocks of W, blocks of tokens).
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < W
    follow(PDL)
    expert, rows, ok, some = _rows(experts, order, offsets, tokens, MODE, E, BLOCK_M)
    if some:
        inner = tl.arange(0, BLOCK_K)
        b_at = b + rows[:, None].to(tl.int64) * H + inner[None, :]
        gate_at = weight + (expert * 2 * W + columns)[:, None].to(tl.int64) * H + inner[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0:
                a_ok, w_ok = ok[:, None], column_ok[:, None]
            else:
                inside = (start + inner < H)[None, :]
                a_ok, w_ok = ok[:, None] & inside, column_ok[:, None] & inside
            a = tl.load(b_at + start, mask=a_ok, other=0.0)
            gate = dot(a, tl.load(gate_at + start, mask=w_ok, other=0.0), gate)
            up = dot(a, tl.load(gate_at + W * H + start, mask=w_ok, other=0.0), up)
        gate = activated(gate, ACTIVATION)
        if K > 0:
            token_ids = tl.load(ids + rows, mask=ok, other=-1)
            up *= hash_factors(
                token_ids, ok, columns, routes, scales, channels, layer, SHARED, EXPERT, EXPERTS, K, VOCAB, MODULATED
            )
        place = out + rows[:, None].to(tl.int64) * W + columns[None, :]
        tl.store(place, (gate * up).to(out.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    a, weight, experts, order, offsets, x, tokens,
    H: tl.constexpr, W: tl.constexpr, E: tl.constexpr, MODE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a [T, W] times its expert's weight [E, H, W] to the residual stream x [T, H].

    Grid: (blocks of H, blocks of tokens).
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < H
    # Each program's share was written by kernels before the last one, which have ended.
    expert, rows, ok, some = _rows(experts, order, offsets, tokens, MODE, E, BLOCK_M)
    follow(PDL)
    if some:
        inner = tl.arange(0, BLOCK_K)
        a_at = a + rows[:, None].to(tl.int64) * W + inner[None, :]
        weight_at = weight + (expert * H + columns)[:, None].to(tl.int64) * W + inner[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, W, BLOCK_K):
            if W % BLOCK_K == 0:
                a_ok, w_ok = ok[:, None], column_ok[:, None]
            else:
                inside = (start + inner < W)[None, :]
                a_ok, w_ok = ok[:, None] & inside, column_ok[:, None] & inside
            acc = dot(
                tl.load(a_at + start, mask=a_ok, other=0.0), tl.load(weight_at + start, mask=w_ok, other=0.0), acc
            )
        place = x + rows[:, None].to(tl.int64) * H + columns[None, :]
        mask = ok[:, None] & column_ok[None, :]
        tl.store(place, tl.load(place, mask=mask, other=0.0) + acc, mask=mask)
