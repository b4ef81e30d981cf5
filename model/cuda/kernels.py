"""Triton kernels for a layer's dense parts: embedding, norms, small products, dynamics.

Sizes of the network are compile-time constants; the number of tokens is not, and is never specialised on, so a kernel
is compiled once for each block shape. Whatever dtype comes in, arithmetic is FP32 and products add up in FP32.

With PDL (programmatic dependent launch, sm_90 and later) a kernel begins while the previous one still runs, and waits
in `follow` for the previous kernel's results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FRESH = tl.constexpr(".cg")
"""Read past the nearest cache, which may hold old values: for reads that come before `follow`."""


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def dot(a, b, acc):
    """a [M, K] times b [N, K] transposed, added to FP32 [M, N]; FP32 inputs are multiplied as such, not as TF32."""
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait until all kernels before this one have written; then the next one may begin.

    Before this call a kernel may read only weights, data that the host sent before the step, and (FRESH) results of
    kernels before the last one: those have ended. Every program must call it, because the next kernel relies on that.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def side(x, x_stride, weight, x2, x2_stride, weight2, N: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr):
    """Choose which of two neighbouring products this program computes.

    Returns its input, the input's stride, its weight, this program's rows of the weight [BLOCK_N], how many rows the
    weight has, and the column of the output where the product begins.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = N
    first = 0
    if N2 > 0:
        blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        if tl.program_id(0) >= blocks:
            x, x_stride, weight = x2, x2_stride, weight2
            rows -= blocks * BLOCK_N
            count = N2
            first = N
    return x, x_stride, weight, rows, count, first


@triton.jit(do_not_specialize_on_alignment=["ids"])
def embed_kernel(ids, weight, out, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Row ids[t] of weight [vocab, H] as FP32; a negative id gives zeros. Grid: (tokens, blocks of H)."""
    follow(PDL)
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token)
    value = tl.load(weight + row * H + at, mask=at < tl.where(row >= 0, H, 0), other=0.0)
    tl.store(out + token.to(tl.int64) * H + at, value.to(tl.float32), mask=at < H)


@triton.jit
def norm_kernel(
    x, weight, mu, out, eps, out_stride, H: tl.constexpr, BLOCK: tl.constexpr, MU: tl.constexpr, PDL: tl.constexpr
):
    """RMSNorm of rows [H] into `out`, whose rows continue with those of `mu` if MU. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    share = tl.load(weight + at, mask=inside, other=0.0)
    follow(PDL)
    value = tl.load(x + token * H + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    value = value * scale * share
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + token * out_stride + at, value.to(dtype), mask=inside)
    if MU:
        below = tl.load(mu + token * H + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * out_stride + H + at, below.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x, weight, x2, weight2, out, tokens, x_stride, x2_stride,
    N: tl.constexpr, K: tl.constexpr, N2: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [T, K] times weight [N, K], and next to it x2 [T, K] times weight2 [N2, K]: out [T, N + N2].

    Grid: (blocks of N + blocks of N2, blocks of tokens).
    """
    x, x_stride, weight, columns, count, first = side(x, x_stride, weight, x2, x2_stride, weight2, N, N2, BLOCK_N)
    column_ok = columns < count
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < tokens
    inner = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None].to(tl.int64) * x_stride + inner[None, :]
    weight_at = weight + columns[:, None].to(tl.int64) * K + inner[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    follow(PDL)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x_at + start, mask=row_ok[:, None], other=0.0)
            w = tl.load(weight_at + start, mask=column_ok[:, None], other=0.0)
        else:
            inside = start + inner < K
            a = tl.load(x_at + start, mask=row_ok[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight_at + start, mask=column_ok[:, None] & inside[None, :], other=0.0)
        acc = dot(a.to(weight.dtype.element_ty), w, acc)
    place = out + rows[:, None].to(tl.int64) * (N + N2) + (first + columns)[None, :]
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
# long: one kernel, whose parameters alone take twenty lines
def dynamics_kernel(
    x, h, velocity, products, from_velocity, in_bias, weight, out_bias, base, mu, below, residual, tokens, dt,
    products_stride, from_stride, below_stride, H: tl.constexpr, C: tl.constexpr, CONTEXTUAL: tl.constexpr,
    MOVING: tl.constexpr, HIGHWAY: tl.constexpr, FIRST: tl.constexpr, MAX_BETA: tl.constexpr,
    MAX_VELOCITY: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The controller's second product, the dynamics, the residual stream and the highway, for a block of [T, H].

    `products` [T, H + C] (or [T, C] unless CONTEXTUAL) holds the attention output times dynamics_in, `from_velocity`
    [T, C] the velocity times controller_v. Changes x, velocity and residual in place, writes mu and, with HIGHWAY, the
    mu for the layer above. Not MOVING: velocity is still zero. Grid: (blocks of H, blocks of tokens).
    """
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_ok = rows < tokens
    hidden = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden_ok = hidden < H
    at = tl.arange(0, BLOCK_C)
    inner = tl.load(in_bias + at, mask=at < C, other=0.0)[None, :]
    middle = tl.load(base + hidden, mask=hidden_ok, other=0.0)[None, :] + tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    follow(PDL)
    inner_ok = row_ok[:, None] & (at < C)[None, :]
    inner_at = rows[:, None] * products_stride + (H if CONTEXTUAL else 0) + at[None, :]
    inner += tl.load(products + inner_at, mask=inner_ok, other=0.0).to(tl.float32)
    if MOVING:
        inner += tl.load(from_velocity + rows[:, None] * from_stride + at[None, :], mask=inner_ok, other=0.0)
    inner = (inner * sigmoid(inner)).to(weight.dtype.element_ty)

    ok = row_ok[:, None] & hidden_ok[None, :]
    place = rows[:, None] * H + hidden[None, :]
    now = tl.load(h + place, mask=ok, other=0.0).to(tl.float32)
    if CONTEXTUAL:
        middle += tl.load(products + rows[:, None] * products_stride + hidden[None, :], mask=ok, other=0.0)
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
