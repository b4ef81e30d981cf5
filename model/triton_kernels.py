"""Triton kernels for a layer's dense parts: embedding, norms, small products, dynamics.

Sizes of the network are compile-time constants; the number of tokens is not, and is never specialised on, so a kernel
is compiled once for each block shape. Whatever dtype comes in, arithmetic is FP32 and products add up in FP32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def dot(a, b, acc):
    """a [M, K] times b [N, K] transposed, added to FP32 [M, N]; FP32 inputs are multiplied as such, not as TF32."""
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@triton.jit(do_not_specialize_on_alignment=["ids"])
def embed_kernel(ids, weight, out, H: tl.constexpr, BLOCK: tl.constexpr):
    """Row ids[t] of weight [vocab, H] as FP32; a negative id gives zeros. Grid: (tokens, blocks of H)."""
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token)
    value = tl.load(weight + row * H + at, mask=at < tl.where(row >= 0, H, 0), other=0.0)
    tl.store(out + token.to(tl.int64) * H + at, value.to(tl.float32), mask=at < H)


@triton.jit
def norm_kernel(x, weight, mu, out, eps, out_stride, H: tl.constexpr, BLOCK: tl.constexpr, MU: tl.constexpr):
    """RMSNorm of rows [H] into `out`, whose rows go on with those of `mu` where MU. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    value = tl.load(x + token * H + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    value = value * scale * tl.load(weight + at, mask=inside, other=0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + token * out_stride + at, value.to(dtype), mask=inside)
    if MU:
        below = tl.load(mu + token * H + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * out_stride + H + at, below.to(dtype), mask=inside)


@triton.jit
def _product(acc, squares, x, norm, weight, rows, columns, row_ok, column_ok, x_stride, weight_stride,
             K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """acc += (x * norm) [M, K] times weight [N, K] transposed; squares += x * x."""
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = weight.dtype.element_ty
    x_at = x + rows[:, None].to(tl.int64) * x_stride + inner[None, :]
    weight_at = weight + columns[:, None].to(tl.int64) * weight_stride + inner[None, :]
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x_at + start, mask=row_ok[:, None], other=0.0)
            w = tl.load(weight_at + start, mask=column_ok[:, None], other=0.0)
        else:
            inside = start + inner < K
            a = tl.load(x_at + start, mask=row_ok[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight_at + start, mask=column_ok[:, None] & inside[None, :], other=0.0)
        if NORM:
            a = a.to(tl.float32)
            squares += a * a
            a *= tl.load(norm + start + inner, mask=start + inner < K, other=0.0)[None, :]
        acc = dot(a.to(dtype), w, acc)
    return acc, squares


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x, norm, weight, x2, weight2, out, tokens, eps, x_stride, weight_stride, x2_stride, weight2_stride, second_from,
    N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [T, K] times weight [N, K], for few tokens: the weights are read once and the norm costs no pass of its own.

    With NORM, x is RMS-normalised: its scale is one number a row and comes in after the sum. With K2, x2 [T, K2] times
    weight2 is added to the columns from `second_from` on. Grid: (blocks of N, blocks of tokens).
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < tokens, columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    acc, squares = _product(acc, squares, x, norm, weight, rows, columns, row_ok, column_ok, x_stride, weight_stride,
                            K, NORM, BLOCK_K)  # fmt: skip
    if NORM:
        acc *= tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
    if K2 > 0:
        if (tl.program_id(0) + 1) * BLOCK_N > second_from:
            acc, squares = _product(acc, squares, x2, norm, weight2, rows, columns - second_from, row_ok,
                                    column_ok & (columns >= second_from), x2_stride, weight2_stride,
                                    K2, False, BLOCK_K)  # fmt: skip
    place = out + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _control(inner, weight, bias, hidden, hidden_ok, part: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One third of the controller's output for a block: FP32 [M, N]."""
    at = tl.arange(0, BLOCK_C)
    rows = part * H + hidden
    w = tl.load(weight + rows[:, None] * C + at[None, :], mask=hidden_ok[:, None] & (at < C)[None, :], other=0.0)
    acc = dot(inner, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    return acc + tl.load(bias + rows, mask=hidden_ok, other=0.0)[None, :]


@triton.jit(do_not_specialize=["tokens"])
def dynamics_kernel(
    x, h, velocity, products, from_velocity, in_bias, weight, out_bias, base, mu, below, residual, tokens, dt,
    below_stride, H: tl.constexpr, C: tl.constexpr, CONTEXTUAL: tl.constexpr, MOVING: tl.constexpr,
    SPLIT_INPUT: tl.constexpr, HIGHWAY: tl.constexpr, FIRST: tl.constexpr, MAX_BETA: tl.constexpr,
    MAX_VELOCITY: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The controller's second product, the dynamics, the residual stream and the highway, for a block of [T, H].

    `products` [T, H + C] (or [T, C] unless CONTEXTUAL) holds the attention output times dynamics_in; with SPLIT_INPUT
    the velocity's share of the controller's input is in `from_velocity` [T, C] and not yet in it. Changes x, velocity
    and residual in place, writes mu and, with HIGHWAY, the mu for the layer above. Not MOVING: velocity is zero still.
    Grid: (blocks of H, blocks of tokens).
    """
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_ok = rows < tokens
    stride: tl.constexpr = C + (H if CONTEXTUAL else 0)
    at = tl.arange(0, BLOCK_C)
    inner_ok = row_ok[:, None] & (at < C)[None, :]
    inner_at = rows[:, None] * stride + (stride - C) + at[None, :]
    inner = tl.load(products + inner_at, mask=inner_ok, other=0.0).to(tl.float32)
    inner += tl.load(in_bias + at, mask=at < C, other=0.0)[None, :]
    if SPLIT_INPUT:
        inner += tl.load(from_velocity + rows[:, None] * C + at[None, :], mask=inner_ok, other=0.0).to(tl.float32)
    inner = (inner * sigmoid(inner)).to(weight.dtype.element_ty)

    hidden = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden_ok = hidden < H
    ok = row_ok[:, None] & hidden_ok[None, :]
    place = rows[:, None] * H + hidden[None, :]
    now = tl.load(h + place, mask=ok, other=0.0).to(tl.float32)
    middle = tl.load(base + hidden, mask=hidden_ok, other=0.0)[None, :] + tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if CONTEXTUAL:
        middle += tl.load(products + rows[:, None] * stride + hidden[None, :], mask=ok, other=0.0).to(tl.float32)
    control = _control(inner, weight, out_bias, hidden, hidden_ok, 1, H, C, BLOCK_M, BLOCK_N, BLOCK_C)
    softplus = tl.maximum(control, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(control)))
    speed = -tl.minimum(softplus, MAX_BETA) * (now - middle)
    if MOVING:
        control = _control(inner, weight, out_bias, hidden, hidden_ok, 0, H, C, BLOCK_M, BLOCK_N, BLOCK_C)
        speed += sigmoid(control) * tl.load(velocity + place, mask=ok, other=0.0)
    speed = tl.minimum(tl.maximum(speed, -MAX_VELOCITY), MAX_VELOCITY)
    control = _control(inner, weight, out_bias, hidden, hidden_ok, 2, H, C, BLOCK_M, BLOCK_N, BLOCK_C)
    tl.store(velocity + place, speed, mask=ok)
    stream = tl.load(x + place, mask=ok, other=0.0) + (now + dt * sigmoid(control) * speed)
    tl.store(x + place, stream, mask=ok)
    tl.store(mu + place, middle, mask=ok)
    if HIGHWAY:
        total = middle
        if not FIRST:
            total += tl.load(residual + place, mask=ok, other=0.0)
        tl.store(residual + place, total, mask=ok)
        above = (middle + SHARE * total).to(below.dtype.element_ty)
        tl.store(below + rows[:, None] * below_stride + hidden[None, :], above, mask=ok)
