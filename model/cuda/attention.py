"""Triton kernels of attention over paged keys and values: decode with split keys, and prompts of any mixture.

Both read lengths and page tables on the device, so that a captured graph also serves sequences other than those of its
capture. A sequence of length 0 is padding: nothing is written for it but zeros to its output. Softmax is FP32.
Kernels are not specialised on parts of a step's tensors: otherwise, a server would compile again for every new
mixture.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..fp8 import MAX_FP8
from .kernels import FRESH, dot, follow

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(MAX_FP8)
BLOCK_S = tl.constexpr(256)  # sequences searched at once


@triton.jit
def _rotated(
    source, norm, cos, sin, ok, at, eps,
    D: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Heads [M, BLOCK_D] of one token from `source` [M, 1] pointers, normed and rotated, FP32; zero outside of `ok`."""
    half: tl.constexpr = D // 2
    partner = tl.where(at < half, at + half, at - half)
    mask = ok[:, None] & (at < D)[None, :]
    value = tl.load(source + at[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if QK_NORM:
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
        value = value * scale * tl.load(norm + at, mask=at < D, other=0.0)[None, :]
        other = other * scale * tl.load(norm + partner, mask=at < D, other=0.0)[None, :]
    angle = tl.where(at < half, at, at - half)
    c = tl.load(cos + angle, mask=at < D, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=at < D, other=0.0)[None, :]
    return value * c + tl.where(at < half, -1.0, 1.0)[None, :] * other * s


@triton.jit
def _kept(value, dtype: tl.constexpr):
    """Keys or values in the format of the pages; FP8 has no infinity, so larger values become its largest number."""
    if dtype == tl.float8e4nv:
        value = tl.clamp(value.to(tl.float32), -LARGEST, LARGEST)
    return value.to(dtype)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rotate_kernel(
    kqv, q_norm, k_norm, cos, sin, slots, cache, out, eps, side_stride, page_stride, slot_stride, head_stride,
    D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr, QK_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """QK-norm and rotary positions for the heads of one token [k; q; v]; K and V to their page, q to `out`.

    A token whose slot is negative is not written to a page. Grid: (tokens,).
    """
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    line = kqv + token * ((HEADS + 2 * KV) * D)
    cos += token * (D // 2)
    sin += token * (D // 2)
    head = tl.arange(0, BLOCK_Q)
    q = _rotated(line + (KV + head)[:, None] * D, q_norm, cos, sin, head < HEADS, at, eps, D, QK_NORM)
    place = out + (token * HEADS + head)[:, None] * D + at[None, :]
    tl.store(place, q.to(out.dtype.element_ty), mask=(head < HEADS)[:, None] & (at < D)[None, :])
    slot = tl.load(slots + token)
    if slot >= 0:
        kv = tl.arange(0, BLOCK_KV)
        k = _rotated(line + kv[:, None] * D, k_norm, cos, sin, kv < KV, at, eps, D, QK_NORM)
        mask = (kv < KV)[:, None] & (at < D)[None, :]
        v = tl.load(line + (KV + HEADS + kv)[:, None] * D + at[None, :], mask=mask, other=0.0)
        page = cache + slot // PAGE * page_stride + slot % PAGE * slot_stride + kv[:, None] * head_stride
        tl.store(page + at[None, :], _kept(k, cache.dtype.element_ty), mask=mask)
        tl.store(page + side_stride + at[None, :], _kept(v, cache.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    acc, highest, total, q, pages, table, first, low, high, query_at, scale, side_stride, page_stride, slot_stride,
    D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take keys low ... high - 1 into the running softmax of queries q [M, BLOCK_D] at positions query_at [M].

    Blocks of keys begin at multiples of BLOCK_N from `first`. CAUSAL masks keys after a query and, with WINDOW, those
    too far before it; else every key in the range counts for every query.
    """
    inner = tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_D)
    for start in range(first, high, BLOCK_N):
        key = start + inner
        ok = (key >= low) & (key < high)
        page = tl.load(table + key // PAGE, mask=ok, other=0).to(tl.int64)
        place = pages + (page * page_stride + key % PAGE * slot_stride)[:, None] + at[None, :]
        mask = ok[:, None]
        if D != BLOCK_D:
            mask = mask & (at < D)[None, :]
        k = tl.load(place, mask=mask, other=0.0).to(q.dtype)
        scores = dot(q, k, tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
        if CAUSAL:
            seen = ok[None, :] & (key[None, :] <= query_at[:, None])
            if WINDOW > 0:
                seen = seen & (key[None, :] > query_at[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
        else:
            scores = tl.where(ok[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # A query that has seen no key yet has nothing to compare with.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(highest - safe)
        v = tl.load(place + side_stride, mask=mask, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(share, axis=1)
        acc = tl.dot(share.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
        highest = higher
    return acc, highest, total


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["slots", "tables", "lengths"])
# long: one kernel, whose parameters alone take twenty lines
def decode_kernel(
    kqv, q_norm, k_norm, cos, sin, slots, tables, lengths, cache, out, partial, weights, eps, scale, table_stride,
    side_stride, page_stride, slot_stride, head_stride,
    D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr, QK_NORM: tl.constexpr,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One new token per sequence: QK-norm, rotary positions, its K and V to their page, and attention over all keys.

    The keys before the new token are cut into at most SPLITS runs; the first run's program takes the new key as well,
    from its registers but as the pages keep it, so no program waits for another's write. With SPLITS > 1 the results go
    to `partial` [S, HEADS, SPLITS, D] with their log2 weights [S, HEADS, SPLITS]. Grid: (SPLITS, KV, sequences).
    """
    split, kv, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence, cache_modifier=FRESH)
    follow(PDL)
    group: tl.constexpr = HEADS // KV
    member, at = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv * group + member
    mask = (member < group)[:, None] & (at < D)[None, :]
    out_at = (sequence * HEADS + head)[:, None]
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    past = length - 1 - low
    run = tl.maximum(tl.cdiv(tl.cdiv(past, SPLITS), BLOCK_N) * BLOCK_N, BLOCK_N)
    if length == 0:
        if split == 0:
            tl.store(out + out_at * D + at[None, :], tl.zeros((BLOCK_G, BLOCK_D), out.dtype.element_ty), mask=mask)
    elif (split == 0) | (split * run < past):
        dtype: tl.constexpr = cache.dtype.element_ty
        line = kqv + sequence * ((HEADS + 2 * KV) * D)
        cos += sequence * (D // 2)
        sin += sequence * (D // 2)
        q = _rotated(line + (KV * D + head * D)[:, None], q_norm, cos, sin, member < group, at, eps, D, QK_NORM)
        q = q.to(out.dtype.element_ty)
        pages = cache + kv * head_stride
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        highest = tl.full((BLOCK_G,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        scale = scale * LOG2_E
        if split == 0:
            one = tl.zeros((1,), tl.int32)
            k = _rotated(line + (kv * D + one)[:, None], k_norm, cos, sin, one == 0, at, eps, D, QK_NORM)
            v = tl.load(line + (KV + HEADS + kv) * D + at, mask=at < D, other=0.0)
            k, v = _kept(k, dtype), _kept(v, dtype)
            slot = tl.load(slots + sequence)
            if slot >= 0:
                place = pages + slot // PAGE * page_stride + slot % PAGE * slot_stride
                tl.store(place + (one[:, None] + at[None, :]), k, mask=(at < D)[None, :])
                tl.store(place + side_stride + at, v, mask=at < D)
            highest = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
            total += 1.0
            acc += v.to(tl.float32)[None, :]
        start = low + split * run
        end = tl.minimum(start + run, length - 1)
        acc, highest, total = _attend(
            acc, highest, total, q, pages, tables + sequence * table_stride, start, start, end, highest, scale,
            side_stride, page_stride, slot_stride, D, PAGE, WINDOW, False, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        acc = acc / total[:, None]
        if SPLITS == 1:
            tl.store(out + out_at * D + at[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            line_at = (sequence * HEADS + head) * SPLITS + split
            tl.store(partial + line_at[:, None] * D + at[None, :], acc, mask=mask)
            tl.store(weights + line_at, highest + tl.log2(total), mask=member < group)


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def combine_kernel(
    partial, weights, lengths, out,
    D: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The results of a head's runs of keys, put together. Grid: (HEADS, sequences)."""
    follow(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    line = sequence * HEADS + tl.program_id(0)
    at, split = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    length = tl.load(lengths + sequence)
    if length > 0:
        past = length - 1
        if WINDOW > 0:
            past = tl.minimum(past, WINDOW - 1)
        run = tl.maximum(tl.cdiv(tl.cdiv(past, SPLITS), BLOCK_N) * BLOCK_N, BLOCK_N)
        used = (split == 0) | (split * run < past)
        weight = tl.load(weights + line * SPLITS + split, mask=used, other=-float("inf"))
        share = tl.exp2(weight - tl.max(weight, axis=0))
        share = share / tl.sum(share, axis=0)
        place = partial + (line * SPLITS + split)[:, None] * D + at[None, :]
        parts = tl.load(place, mask=used[:, None] & (at < D)[None, :], other=0.0)
        whole = tl.sum(parts * share[:, None], axis=0)
        tl.store(out + line * D + at, whole.to(out.dtype.element_ty), mask=at < D)


@triton.jit(
    do_not_specialize=["sequences", "first_token", "table_stride"],
    do_not_specialize_on_alignment=["tables", "starts", "lengths"],
)
# long: one kernel, whose parameters alone take twenty lines
def prefill_kernel(
    q, tables, starts, lengths, cache, out, scale, sequences, first_token, table_stride,
    side_stride, page_stride, slot_stride, head_stride,
    D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Causal attention of each sequence's new tokens over its pages, which hold their keys already.

    The rows of a block are (token, query head of the KV head) pairs. `starts` int32 [S + 1] says where a sequence's
    tokens begin, `lengths` how long it is after them; q and out begin at token `first_token`. Keys are taken in blocks
    from the sequence's beginning, so a token's result does not depend on how its prompt was cut.
    Grid: (tokens // (BLOCK_M // group) + sequences, KV).
    """
    follow(PDL)
    block, kv = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = HEADS // KV
    block_q: tl.constexpr = BLOCK_M // group
    # Block n of sequence s is number starts[s] // block_q + s + n: at least one of each.
    left = -1
    for first in range(0, sequences, BLOCK_S):
        name = first + tl.arange(0, BLOCK_S)
        number = (tl.load(starts + name, mask=name < sequences, other=0) - first_token) // block_q + name
        left += tl.sum(((number <= block) & (name < sequences)).to(tl.int32), axis=0)
    begin = tl.load(starts + left) - first_token
    count = tl.load(starts + left + 1) - first_token - begin
    local = (block - begin // block_q - left) * block_q
    if local < count:
        length = tl.load(lengths + left)
        row, at = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        token = local + row // group
        ok = (row < block_q * group) & (token < count)
        place = ((begin + token).to(tl.int64) * HEADS + kv * group + row % group)[:, None] * D + at[None, :]
        mask = ok[:, None] & (at < D)[None, :]
        queries = tl.load(q + place, mask=mask, other=0.0)
        position = length - count + token
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        scale = scale * LOG2_E
        pages = cache + kv * head_stride
        table = tables + left.to(tl.int64) * table_stride
        oldest = length - count + local
        end = tl.minimum(oldest + block_q, length)
        masked_from = 0
        if WINDOW > 0:
            masked_from = tl.maximum(oldest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        else:
            # Keys that all of the block's queries see need no mask.
            masked_from = (oldest + 1) // BLOCK_N * BLOCK_N
            acc, highest, total = _attend(
                acc, highest, total, queries, pages, table, 0, 0, masked_from, position, scale,
                side_stride, page_stride, slot_stride, D, PAGE, WINDOW, False, BLOCK_D, BLOCK_N,
            )  # fmt: skip
        acc, highest, total = _attend(
            acc, highest, total, queries, pages, table, masked_from, masked_from, end, position, scale,
            side_stride, page_stride, slot_stride, D, PAGE, WINDOW, True, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
