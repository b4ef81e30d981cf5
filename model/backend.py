"""The operations that differ by device, in plain torch: the reference, and what every device can run.

The network calls nothing device-specific but the methods of `Backend`. Another device is one more
subclass that overrides what it can do faster; its results are tested against the ones here.
Element-wise arithmetic, norms and softmax are FP32 throughout; products run in the weights' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_PRODUCT = 16**3
"""Multiplications up to which torch takes its own loop for a BF16 product, and oneDNN from there on."""
PREFILL_BLOCK = 256
"""Queries of a prompt are computed in blocks that end at multiples of this position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where the flat tokens of one step belong.

    A step holds S sequences, one after the other: first `num_decodes` sequences with one token each,
    then the rest with any number of tokens (prefill chunks).

    Attributes:
        query_lens: tokens of each sequence in this step, S numbers that sum to T.
        seq_lens: length of each sequence after this step, S numbers.
        num_decodes: how many of the first sequences have exactly one token.
        slot_mapping: int64 [T], the place of each token in the flattened pages; None without a cache.
        block_tables: int64 [S, B], the pages of each sequence in order, padded with any valid page.
    """

    query_lens: list[int]
    seq_lens: list[int]
    num_decodes: int = 0
    slot_mapping: Tensor | None = None
    block_tables: Tensor | None = None

    @classmethod
    def without_cache(cls, lengths: list[int]) -> AttentionMetadata:
        """Whole sequences that attend to their own tokens only; needs no KV cache."""
        return cls(query_lens=lengths, seq_lens=lengths)


class Backend:
    """Plain torch operations, on any device and with gradients where no KV cache is involved."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in] times weight [out, in], in the weight's dtype, as FP32 [T, out]."""
        x = x.to(weight.dtype)
        # The BF16 kernels add up one row in another order than several, and very small products in yet another. Two
        # rows take the time of one, so with a few rows more a token's result does not depend on its company.
        least = 1 if weight.dtype != torch.bfloat16 else max(2, SMALL_PRODUCT // weight.numel() + 1)
        if len(x) < least:
            return F.linear(F.pad(x, (0, 0, 0, least - len(x))), weight)[: len(x)].float()
        return F.linear(x, weight).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension of an FP32 tensor."""
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, heads, D] by tables [T, 1, D/2], pairing element i with i + D/2."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Tensor | None,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> Tensor:
        """Causal grouped-query attention, after writing K and V to their pages.

        Args:
            q: [T, heads, D], normed and rotated, in the cache's dtype.
            k: [T, kv_heads, D], likewise.
            v: [T, kv_heads, D].
            cache: one layer's pages [2, blocks, block_size, kv_heads, D]; None attends within this step's tokens.
            metadata: which tokens belong to which sequence and page.
            window: position i sees i - window + 1 … i; None sees all of 0 … i.

        Returns:
            [T, heads, D]; query head h reads KV head h // (heads / kv_heads).
        """
        if cache is None:
            return self._attention_without_cache(q, k, v, metadata.seq_lens, window)
        assert metadata.slot_mapping is not None  # for the type checker
        assert metadata.block_tables is not None
        cache[0].flatten(0, 1).index_copy_(0, metadata.slot_mapping, k)
        cache[1].flatten(0, 1).index_copy_(0, metadata.slot_mapping, v)
        decodes = metadata.num_decodes
        out = torch.empty_like(q)
        if decodes:
            out[:decodes] = self._decode_attention(
                q[:decodes], cache, metadata.block_tables[:decodes], metadata.seq_lens[:decodes], window
            )
        start = decodes
        for table, query_len, seq_len in zip(
            metadata.block_tables[decodes:], metadata.query_lens[decodes:], metadata.seq_lens[decodes:], strict=True
        ):
            end = start + query_len
            pages = table[: -(-seq_len // cache.shape[2])]
            keys, values = (side.index_select(0, pages).flatten(0, 1) for side in cache)  # [L, kv_heads, D] each
            at = seq_len - query_len
            # The kernels cut a sum by the number of queries. Blocks with fixed ends give a token the same result
            # however its prompt was cut into chunks, as long as chunks end there too.
            while start < end:
                block_end = min(seq_len, (at // PREFILL_BLOCK + 1) * PREFILL_BLOCK)
                rows = slice(start, start + block_end - at)
                out[rows] = _attend(q[None, rows], keys[None, :block_end], values[None, :block_end], window)[0]
                start, at = rows.stop, block_end
        return out

    def _decode_attention(
        self, q: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: list[int], window: int | None
    ) -> Tensor:
        """One query per sequence, all sequences at once: q [S, heads, D] -> [S, heads, D]."""
        block_size, kv_heads = cache.shape[2], cache.shape[3]
        longest = max(seq_lens)
        tables = block_tables[:, : -(-longest // block_size)]
        # One page is one run of memory: index_select copies it as such, nine times as fast as indexing does.
        pages = (side.index_select(0, tables.flatten()) for side in cache)
        keys, values = (page.view(len(q), -1, *page.shape[2:]).transpose(1, 2) for page in pages)  # [S, kv_heads, L, D]
        lengths = torch.tensor(seq_lens, device=q.device)[:, None]
        at = torch.arange(keys.shape[2], device=q.device)[None]
        visible = at < lengths  # [S, L]
        if window is not None:
            visible &= at >= lengths - window
        # The query heads that share a KV head stand as rows of one small matrix, so K and V are not repeated.
        grouped = q.unflatten(1, (kv_heads, -1))  # [S, kv_heads, group, D]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None]).flatten(1, 2)

    def _attention_without_cache(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None
    ) -> Tensor:
        if len(set(lengths)) == 1:
            batch = (len(lengths), lengths[0])
            return _attend(q.unflatten(0, batch), k.unflatten(0, batch), v.unflatten(0, batch), window).flatten(0, 1)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_attend(a[None], b[None], c[None], window)[0] for a, b, c in parts])

    def activation(self, x: Tensor, name: str) -> Tensor:
        """silu (swish), exact gelu or relu, by the config's `hidden_act`."""
        if name in ("silu", "swish"):
            return F.silu(x)
        return F.gelu(x) if name == "gelu" else F.relu(x)

    def mlp(self, x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
        """One gated MLP: x [T, H], gate_up [2W, H], down [H, W] -> FP32 [T, H]."""
        gate, up = self.linear(x, gate_up).chunk(2, dim=-1)
        return self.linear(self.activation(gate, activation) * up, down)

    def routed_mlp(self, x: Tensor, experts: Tensor | None, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
        """Each token through its own expert's gated MLP.

        Args:
            x: [T, H].
            experts: int64 [T], the expert of each token; None when there is one for all.
            gate_up: [E, 2W, H], gate rows first.
            down: [E, H, W].
            activation: name of the activation.

        Returns:
            FP32 [T, H].
        """
        if experts is None:
            return self.mlp(x, gate_up[0], down[0], activation)
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=len(gate_up)).tolist()
        groups = zip(x[order].split(counts), gate_up, down, strict=True)
        parts = [self.mlp(tokens, w_in, w_out, activation) for tokens, w_in, w_out in groups if len(tokens)]
        return torch.zeros_like(x, dtype=torch.float32).index_copy(0, order, torch.cat(parts))


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last query positions over all keys: q [B, Tq, heads, D], k and v [B, L, kv_heads, D]."""
    queries, length = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if queries == length and (window is None or window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    at = torch.arange(length, device=q.device)
    position = at[length - queries :, None]
    visible = at <= position  # [Tq, L]
    if window is not None:
        visible &= at > position - window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
