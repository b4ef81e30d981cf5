"""The operations that differ by device, in plain torch: the reference, which runs on any device.

The network calls nothing device-specific but the methods of `Backend`, each sized so that a device can do it well as
one operation. A device is a subclass that overrides the operations it does faster; tests compare its results with those
of `Backend`. Element-wise arithmetic, norms and softmax are FP32; products run in the weights' dtype.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sampling
from .config import DeepConfig
from .fp8 import FP8, narrow
from .parameters import BASE_EXPERT_SCORE, HIGHWAY_SHARE, MAX_BETA, MAX_VELOCITY, QK_NORM_EPS, DeepLayer, DynamicsLayer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}
SMALL_PRODUCT = 16**3  # multiplications in a BF16 product up to which torch uses its own loop; above, it uses oneDNN
PREFILL_BLOCK = 256  # queries of a prompt are computed in blocks that end at multiples of this position
Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, FP32 [T, D/2] each; element i of a head is paired with i + D/2."""

_NO_CACHE = torch.empty(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """The sequences to which one step's flat tokens belong.

    A step holds S sequences, one after the other: first `num_decodes` sequences with one token each, then the rest with
    any number of tokens (prefill chunks). In a captured graph, the lists keep the values of the capture, and the
    tensors hold those of each replay. A sequence of length 0 is padding.
    """

    query_lens: list[int]  # tokens of each sequence in this step, summing to T
    seq_lens: list[int]  # length of each sequence after this step
    num_decodes: int = 0
    slot_mapping: Tensor = _NO_CACHE  # int64 [T], the place of each token in the flattened pages
    block_tables: Tensor = _NO_CACHE  # int32 [S, B], the pages of each sequence in order, padded with any valid page
    seq_lens_device: Tensor | None = None  # int32 [S], on the device; None: `seq_lens` is copied when needed
    query_starts: Tensor | None = None  # int32 [S + 1], the first token of each sequence, on the device; likewise
    num_splits: int | None = None  # how many parts decode attention splits the keys into; None lets the backend choose

    @classmethod
    def without_cache(cls, lengths: list[int]) -> AttentionMetadata:
        """Whole sequences that attend only to their own tokens, without a KV cache."""
        return cls(query_lens=lengths, seq_lens=lengths)


def lazy_zeros(size: int) -> Tensor:
    """Zeroed uint8 [size] that takes memory only where it is written, in huge pages where the system has them.

    With small pages, a kernel with scattered reads waits longer for page tables than for the data. Raises `MemoryError`
    if the system has too little memory.
    """
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class Backend:
    """Plain torch operations, on any device, and with gradients where no KV cache is involved.

    T is the number of tokens in the step, H the hidden size, D the size of a head. A subclass may change `x`,
    `velocity` and `residual` in place; the caller continues with the returned tensors.
    """

    prefill_multiple = PREFILL_BLOCK
    """Cutting a prompt at multiples of this leaves its tokens' results bit-for-bit identical."""
    capturable = False
    """Whether a whole step can be captured in a graph: no operation waits for the device, all lengths are read there,
    and rows with negative token ids, negative slots and length 0 are skipped."""

    def new_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeroed pages [layers, 2, blocks, block_size, KV, D]."""
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return lazy_zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of `weight` [vocab, H] for int64 [T] -> FP32 [T, H]."""
        return F.embedding(input_ids, weight).float()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in] times weight [out, in], in the weight's dtype, as FP32 [T, out]."""
        x = x.to(weight.dtype)
        # The BF16 kernels sum one row in a different order than several rows, and very small products in yet another.
        # A second row costs no time, so pad: then a token's result does not depend on the rest of the step.
        least = 1 if weight.dtype != torch.bfloat16 else max(2, SMALL_PRODUCT // weight.numel() + 1)
        if len(x) < least:
            return F.linear(F.pad(x, (0, 0, 0, least - len(x))), weight)[: len(x)].float()
        return F.linear(x, weight).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension of an FP32 tensor."""
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def attention(
        self, layer: DeepLayer, x: Tensor, mu: Tensor | None, rope: Rope, cache: Tensor | None, step: AttentionMetadata
    ) -> Tensor:
        """Mu-guided causal attention with grouped queries, QK-norm and rotary positions; writes K and V to their pages.

        x [T, H] is the residual stream, mu [T, H] the mu of the layer below, if there is one. `cache` is the pages of
        all layers [layers, 2, blocks, block_size, KV, D], in the weights' dtype or in FP8. With FP8, all tokens, even
        this step's, are read back from their FP8 form. Without a cache, tokens attend to this step's tokens only. Query
        head h reads KV head h // (heads / KV). Returns FP32 [T, H], to be added to the residual stream.
        """
        config = layer.config
        a = self.rms_norm(x, layer.input_norm, config.rms_norm_eps)
        if mu is not None and layer.kqv_proj.shape[1] > a.shape[1]:
            a = torch.cat((a, mu), dim=-1)
        kqv = self.linear(a, layer.kqv_proj).unflatten(-1, (-1, layer.head_dim))
        kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
        k, q, v = kqv.split((kv_heads, heads, kv_heads), dim=1)  # [T, heads, D] each
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self.rms_norm(q, layer.q_norm, QK_NORM_EPS)
            k = self.rms_norm(k, layer.k_norm, QK_NORM_EPS)
        dtype = layer.kqv_proj.dtype
        q, k, v = _rotate(q, *rope).to(dtype), _rotate(k, *rope).to(dtype), v.to(dtype)
        if cache is None:
            out = _attention_without_cache(q, k, v, step.seq_lens, config)
        else:
            out = _paged_attention(q, k, v, cache[layer.index], step, config)
        return self.linear(out.flatten(1), layer.o_proj)

    def dynamics(
        self, layer: DynamicsLayer, x: Tensor, h: Tensor, velocity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """INL dynamics on the attention output h [T, H]; velocity [T, H] comes from the layer below, None is zero.

        Returns the residual stream x [T, H] with h and the dynamics added, the velocity and mu, FP32 [T, H] each.
        """
        hidden = h.shape[-1]
        products = self.linear(h, layer.dynamics_in)
        mu = layer.mu + products[:, :hidden] if layer.contextual_mu else layer.mu.expand_as(h)
        inner = products[:, -layer.controller_bias.shape[0] :] + layer.controller_bias
        if velocity is not None:
            inner = inner + self.linear(velocity, layer.controller_v)
        control = self.linear(F.silu(inner), layer.controller_out) + layer.controller_out_bias
        alpha = control[:, :hidden].sigmoid()
        beta = F.softplus(control[:, hidden : 2 * hidden]).clamp(max=MAX_BETA)
        gate = control[:, 2 * hidden :].sigmoid()
        velocity = -beta * (h - mu) if velocity is None else alpha * velocity - beta * (h - mu)
        velocity = velocity.clamp(-MAX_VELOCITY, MAX_VELOCITY)
        return x + (h + layer.config.dynamics_dt * gate * velocity), velocity, mu

    def routed_mlp(
        self, layer: DeepLayer, x: Tensor, input_ids: Tensor, mu: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x [T, H] with the gated MLP of each token's expert, and the shared one's, added.

        Also returns the expert of each token, int64 [T], or None for a dense MLP and where the layer has `routes`.
        `mu` [T, H] is None where the era has none.
        """
        b = self.rms_norm(x, layer.post_norm, layer.config.rms_norm_eps)
        if layer.routes is not None:
            return x + self._hash_mlp(layer, b, input_ids), None
        experts = self.route(layer, input_ids, mu)
        if experts is None:
            x = x + self._mlp(b, layer.gate_up[0], layer.down[0], layer.activation)
        else:
            order = experts.argsort(stable=True)
            counts = torch.bincount(experts, minlength=len(layer.gate_up)).tolist()
            groups = zip(b[order].split(counts), layer.gate_up, layer.down, strict=True)
            parts = [self._mlp(tokens, w_in, w_out, layer.activation) for tokens, w_in, w_out in groups if len(tokens)]
            x = x + torch.zeros_like(x).index_copy(0, order, torch.cat(parts))
        if layer.shared_gate_up is not None and layer.shared_down is not None:
            x = x + self._mlp(b, layer.shared_gate_up, layer.shared_down, "silu")
        return x, experts

    def route(self, layer: DeepLayer, input_ids: Tensor, mu: Tensor | None) -> Tensor | None:
        """The expert of each token: its id's own, unless another's mu score is over BASE_EXPERT_SCORE higher.

        Returns int64 [T]. The CUDA backend does the same in `route_kernel`, and the CPU backend in `pyllm_mlp`.
        """
        if layer.token_to_expert is None:
            return None
        own = layer.token_to_expert[input_ids]
        if layer.router is None or mu is None:
            return own
        scores = F.linear(mu, layer.router)
        return (scores + BASE_EXPERT_SCORE * F.one_hot(own, scores.shape[-1])).argmax(dim=-1)

    def _hash_mlp(self, layer: DeepLayer, b: Tensor, input_ids: Tensor) -> Tensor:
        """The shared MLP and those of each id's experts: b [T, H] -> FP32 [T, H].

        All experts compute all tokens, and the results that an id does not use are multiplied by zero: experts are so
        small that choosing columns by id takes longer (docs/performance.md).
        """
        gate, up = self.linear(b, layer.gate_up[0]).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        factors = route_factors(layer, input_ids)
        inner[:, : layer.shared_width] *= layer.output_scales()[0]
        inner[:, layer.shared_width :].unflatten(1, (factors.shape[1], -1)).mul_(factors)
        return self.linear(inner, layer.down[0])

    def _mlp(self, x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
        """One gated MLP: x [T, H], gate_up [2W, H] (gate rows first), down [H, W] -> FP32 [T, H]."""
        gate, up = self.linear(x, gate_up).chunk(2, dim=-1)
        return self.linear(ACTIVATIONS[activation](gate) * up, down)

    def highway(self, mu: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mu for the layer above and the sum of all mu so far: FP32 [T, H] each."""
        residual = mu if residual is None else residual + mu
        return mu + HIGHWAY_SHARE * residual, residual

    def draw(self, logits: Tensor, batch: sampling.SamplingBatch) -> Tensor:
        """One token for each row of final scores, FP32 [N, vocab] -> int64 [N]."""
        return sampling.draw(logits, batch)

    def logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `sampling.logprobs`."""
        return sampling.logprobs(logits, chosen, top)


def route_factors(layer: DeepLayer, input_ids: Tensor) -> Tensor:
    """The factors of each expert's inner channels: FP32 [T, E, 1], or [T, E, W] if ids modulate channels."""
    assert layer.routes is not None
    chosen = layer.routes[:, input_ids].T  # [T, K]
    weights = layer.output_scales()[1:].expand(chosen.shape)
    factors = weights.new_zeros(len(chosen), layer.config.experts).scatter_add(1, chosen, weights)[:, :, None]
    if layer.channel_scale is None:
        return factors
    return factors * (1.0 + _hash_signs(layer, input_ids) * layer.channel_scale)


def _hash_signs(layer: DeepLayer, input_ids: Tensor) -> Tensor:
    """A sign for each token and channel of each expert, from 32-bit arithmetic: int64 [T, E, W], 1 or -1."""
    assert layer.channel_scale is not None
    experts, channels = (torch.arange(size, device=input_ids.device) for size in layer.channel_scale.shape)
    start = 0xA511E9B3 + layer.index * 0x63D83595
    h = input_ids[:, None, None] * 0x9E3779B1 + experts[:, None] * 0x85EBCA77 + channels * 0xC2B2AE3D + start
    h &= 0xFFFFFFFF
    h ^= h >> 16
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h ^= h >> 15
    return (h & 1) * 2 - 1


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by tables [T, D/2], pairing element i with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, step: AttentionMetadata, config: DeepConfig
) -> Tensor:
    """Write k and v [T, KV, D] to their pages, then attend over these: q [T, heads, D] -> [T, heads, D].

    Position i sees i - window + 1 … i; without a window, all of 0 … i.
    """
    for side, new in zip(cache, (k, v), strict=True):
        if cache.dtype == FP8:  # torch can copy FP8 only as bits
            side, new = side.view(torch.uint8), narrow(new).view(torch.uint8)
        side.flatten(0, 1).index_copy_(0, step.slot_mapping, new)
    decodes = step.num_decodes
    out = torch.empty_like(q)
    if decodes:
        tables, lengths = step.block_tables[:decodes], step.seq_lens_device
        if lengths is None:
            tables = tables[:, : -(-max(step.seq_lens[:decodes]) // cache.shape[2])]
            lengths = torch.tensor(step.seq_lens[:decodes], device=q.device)
        out[:decodes] = _decode_attention(q[:decodes], cache, tables, lengths[:decodes, None], config)
    start = decodes
    prompts = zip(step.block_tables[decodes:], step.query_lens[decodes:], step.seq_lens[decodes:], strict=True)
    for table, query_len, seq_len in prompts:
        end = start + query_len
        pages = table[: -(-seq_len // cache.shape[2])]
        keys, values = (_pages(side, pages, q.dtype).flatten(0, 1) for side in cache)  # [L, KV, D] each
        at = seq_len - query_len
        # The kernels split a sum according to the number of queries. Blocks with fixed ends give a token the same
        # result however its prompt was cut into chunks, as long as chunks end there too.
        while start < end:
            block_end = min(seq_len, (at // PREFILL_BLOCK + 1) * PREFILL_BLOCK)
            rows = slice(start, start + block_end - at)
            out[rows] = _attend(q[None, rows], keys[None, :block_end], values[None, :block_end], config)[0]
            start, at = rows.stop, block_end
    return out


def _pages(side: Tensor, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Pages of the keys or the values, side [blocks, block_size, KV, D], in `dtype`."""
    # A page is contiguous: index_select copies it whole, nine times as fast as indexing.
    if side.dtype == FP8:
        return side.view(torch.uint8).index_select(0, pages).view(FP8).to(dtype)
    return side.index_select(0, pages)


def _decode_attention(q: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, config: DeepConfig) -> Tensor:
    """One query per sequence, all sequences at once: q [S, heads, D], lengths [S, 1] -> [S, heads, D]."""
    kv_heads = cache.shape[3]
    pages = (_pages(side, tables.flatten(), q.dtype) for side in cache)
    keys, values = (page.view(len(q), -1, *page.shape[2:]).transpose(1, 2) for page in pages)  # [S, KV, L, D]
    at = torch.arange(keys.shape[2], device=q.device)[None]
    visible = at < lengths.clamp(min=1)  # [S, L]; a row of padding sees one key, or it would be NaN
    if config.sliding_window is not None:
        visible &= at >= lengths - config.sliding_window
    # The query heads that share a KV head are the rows of one small matrix, so K and V are not repeated.
    grouped = q.unflatten(1, (kv_heads, -1))  # [S, KV, group, D]
    mask = visible[:, None, None]
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=config.attention_scale)
    return out.flatten(1, 2)


def _attention_without_cache(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], config: DeepConfig) -> Tensor:
    if len(set(lengths)) == 1:
        batch = (len(lengths), lengths[0])
        return _attend(q.unflatten(0, batch), k.unflatten(0, batch), v.unflatten(0, batch), config).flatten(0, 1)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_attend(a[None], b[None], c[None], config)[0] for a, b, c in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, config: DeepConfig) -> Tensor:
    """Causal attention of the last query positions over all keys: q [B, Tq, heads, D], k and v [B, L, KV, D]."""
    queries, length, window, scale = q.shape[1], k.shape[1], config.sliding_window, config.attention_scale
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if queries == length and (window is None or window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    at = torch.arange(length, device=q.device)
    position = at[length - queries :, None]
    visible = at <= position  # [Tq, L]
    if window is not None:
        visible &= at > position - window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(1, 2)
