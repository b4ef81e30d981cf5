"""The GPU's fast path: `Backend` on Triton kernels and cuBLAS, made so that a whole decode step can be captured.

Nothing here waits for the device or asks it for a number: the kernels read everything that depends on lengths, pages or
experts, and every allocation's size follows from the number of tokens and sequences alone. Under TRITON_INTERPRET=1,
the same object computes on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import AttentionMetadata, Backend, Rope
from ..config import DeepConfig
from ..network import DeepNetwork
from ..parameters import BASE_EXPERT_SCORE, HIGHWAY_SHARE, MAX_BETA, MAX_VELOCITY, QK_NORM_EPS, DeepLayer, DynamicsLayer
from ..sampling import SamplingBatch
from .blocks import BUSY, ONE_BLOCK, WIDE, Blocks, FixedBlocks, power_of_two

try:
    from . import attention as triton_attention
    from . import gemv as triton_gemv
    from . import kernels as triton_kernels
    from . import mlp as triton_mlp
    from . import sampling as triton_sampling
except ImportError:  # torch's builds for the CPU come without Triton
    HAS_TRITON = False
else:
    HAS_TRITON = True

MAX_HEAD_DIM = 256
MAX_GROUP = 16
FEW_TOKENS = 32  # up to this many tokens, our own products replace cuBLAS
GEMV_TOKENS = 3  # up to this many tokens, products do not use matrix units
SORT_BLOCK = 256
MAX_SPLITS = 32
NO_WINDOW = 1 << 30  # a sliding window that leaves nothing out


def available(config: DeepConfig) -> bool:
    """Whether Triton is installed and its kernels can hold this network, on any GPU."""
    group = config.num_attention_heads // config.num_key_value_heads
    return HAS_TRITON and config.head_dim <= MAX_HEAD_DIM and config.head_dim % 2 == 0 and group <= MAX_GROUP


def num_splits(sequences: int, kv_heads: int) -> int:
    """How many runs decode attention cuts each sequence's keys into: a power of two that keeps the GPU busy."""
    wanted = max(1, min(MAX_SPLITS, BUSY // max(1, sequences * kv_heads)))
    return 1 << (wanted.bit_length() - 1)


WITHOUT_ROUTES = {"SHARED": 0, "EXPERT": 1, "EXPERTS": 0, "K": 0, "VOCAB": 0, "MODULATED": False}


def _columns_by_id(layer: DeepLayer) -> dict[str, Any] | None:
    """The arguments of `hash_factors` for a layer of the TR-Hash line."""
    if layer.routes is None:
        return None
    (routes, vocab), scales, channels = layer.routes.shape, layer.output_scales().detach(), layer.channel_scale
    start = (0xA511E9B3 + layer.index * 0x63D83595) & 0xFFFFFFFF
    return {
        "routes": layer.routes, "scales": scales, "channels": scales if channels is None else channels,
        "layer": start - (start >> 31 << 32), "SHARED": layer.shared_width, "EXPERT": layer.config.expert_size,
        "EXPERTS": layer.config.experts, "K": routes, "VOCAB": vocab, "MODULATED": channels is not None,
    }  # fmt: skip


class _Above(NamedTuple):
    """Results that `dynamics` computed for later operations, in addition to its own."""

    mu: Tensor
    below: Tensor
    residual: Tensor
    stacked: Tensor


class TritonBackend(Backend):
    """The operations of `Backend` on Triton kernels.

    Up to `FEW_TOKENS` tokens our own kernels compute all products; beyond that, cuBLAS computes the dense ones. Norms
    write their inputs in the weights' dtype; the residual stream, velocity and mu stay FP32. On sm_90 and later a
    kernel begins while the previous one ends (`kernels.follow`).

    A row whose token id is negative is padding: it goes through the network without touching the KV cache (its slot is
    negative), other sequences' keys (its length is 0) or any expert, and its results mean nothing.

    `available` must be true. The kernels are made for a `generation` of GPUs: 8, 9, 10 or 12; None asks the model's
    device. `deterministic` gives a token the same bits whatever else is in the step. Then each operation is one
    compiled kernel, whose block does not depend on the number of tokens; cuBLAS, whose algorithm does, is never called;
    and decodes are computed as prompts of one token, with their keys taken one block after the other.
    """

    prefill_multiple = 1
    capturable = True

    def __init__(self, model: DeepNetwork, generation: int | None = None, *, deterministic: bool = False) -> None:
        # Otherwise cuBLAS may add the parts of a long sum in BF16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._highway = model.architecture.mu_highway
        self._exact = model.dtype == torch.float32
        if generation is None and model.device.type == "cuda":
            generation = torch.cuda.get_device_capability(model.device)[0]
        self._fixed = deterministic
        self._blocks = (FixedBlocks if deterministic else Blocks)(self._exact, generation)
        overlaps = generation is not None and generation >= 9
        self._launch: dict[str, Any] = {"PDL": overlaps, "launch_pdl": overlaps}
        self._columns = [_columns_by_id(layer) for layer in model.layers]
        self._seen: tuple[AttentionMetadata, AttentionMetadata] | None = None
        self._above: _Above | None = None

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.embed`; a negative id gives zeros."""
        size = weight.shape[1]
        out = weight.new_empty((len(input_ids), size), dtype=torch.float32)
        block = min(1024, power_of_two(16, size))
        grid = (len(input_ids), -(-size // block))
        triton_kernels.embed_kernel[grid](input_ids, weight, out, H=size, BLOCK=block, **self._launch)
        return out

    def _few(self, tokens: int) -> bool:
        """Whether our own products compute this many tokens."""
        return self._fixed or tokens <= FEW_TOKENS

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.linear`; the sum is not rounded to the weights' dtype."""
        if self._few(len(x)):
            return self._small(x, weight)
        x = x.to(weight.dtype)
        if weight.dtype == torch.float32:
            return F.linear(x, weight)
        if x.device.type == "cpu":  # torch has no such product there
            return F.linear(x.float(), weight.float())
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._normed(x, weight, eps, torch.float32)

    def _normed(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, mu: Tensor | None = None) -> Tensor:
        """RMSNorm of [.., H] in `dtype`, next to mu [T, H] if there is one: [T, 2H]."""
        out = x.new_empty((*x.shape[:-1], x.shape[-1] * (1 if mu is None else 2)), dtype=dtype)
        self._norm_into(out, x, weight, eps, mu)
        return out

    def _norm_into(self, out: Tensor, x: Tensor, weight: Tensor, eps: float, mu: Tensor | None = None) -> None:
        size = x.shape[-1]
        triton_kernels.norm_kernel[(x.numel() // size,)](
            x, weight, x if mu is None else mu, out, eps, out.shape[-1], H=size, BLOCK=power_of_two(16, size),
            MU=mu is not None, num_warps=4 if size <= 4096 else 8, **self._launch,
        )  # fmt: skip

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] times weight [N, K], both in one dtype, in FP32 or rounded to that dtype."""
        return self._small(x, weight) if self._few(len(x)) else F.linear(x, weight)

    def _small(self, x: Tensor, weight: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [T, K] times weight [N, K] -> FP32 [T, N + N2], next to the columns of a `second` such product."""
        (tokens, inner), n = x.shape, len(weight)
        other, other_weight = second or (x, weight)
        assert other.shape == x.shape
        assert other.dtype == x.dtype
        n2 = len(other_weight) if second else 0
        out = x.new_empty((tokens, n + n2), dtype=torch.float32)
        if tokens == 0:
            return out
        if tokens <= GEMV_TOKENS and n < WIDE and not self._fixed:
            blocks = self._blocks.gemv(inner)
            triton_gemv.linear_kernel[(-(-n // blocks["BLOCK_N"]) + -(-n2 // blocks["BLOCK_N"]),)](
                x, weight, other, other_weight, out, tokens, x.stride(0), other.stride(0), N=n, K=inner, N2=n2,
                **blocks, **self._launch,
            )  # fmt: skip
            return out
        blocks = self._blocks.linear(tokens, n, inner, x.dtype)
        columns = -(-n // blocks["BLOCK_N"]) + -(-n2 // blocks["BLOCK_N"])
        triton_kernels.linear_kernel[(columns, -(-tokens // blocks["BLOCK_M"]))](
            x, weight, other, other_weight, out, tokens, x.stride(0), other.stride(0), N=n, K=inner, N2=n2,
            **blocks, **self._launch,
        )  # fmt: skip
        return out

    def attention(
        self, layer: DeepLayer, x: Tensor, mu: Tensor | None, rope: Rope, cache: Tensor | None, step: AttentionMetadata
    ) -> Tensor:
        """As `Backend.attention`; the result may be in the weights' dtype. Without a cache, plain torch computes."""
        if cache is None:
            return super().attention(layer, x, mu, rope, cache, step)
        weight, eps, above = layer.kqv_proj, layer.config.rms_norm_eps, self._above
        takes_mu = weight.shape[1] > x.shape[1]
        assert mu is not None or not takes_mu
        if takes_mu and above is not None and above.below is mu:
            inputs = above.stacked  # mu is in its right half already
            self._norm_into(inputs, x, layer.input_norm, eps)
        else:
            inputs = self._normed(x, layer.input_norm, eps, weight.dtype, mu if takes_mu else None)
        kqv = self._product(inputs, weight)
        decodes = 0 if self._fixed else step.num_decodes
        out = self._paged(layer, kqv, rope, cache[layer.index], self._prepared(step, x.device), decodes)
        return self._product(out, layer.o_proj)

    def new_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `Backend.new_kv_cache`; in memory one head's keys or values of a page are contiguous."""
        layers, sides, blocks, block_size, kv_heads, head_dim = shape
        pages = super().new_kv_cache((layers, sides, blocks, kv_heads, block_size, head_dim), dtype, device)
        return pages.transpose(3, 4)

    def _prepared(self, metadata: AttentionMetadata, device: torch.device) -> AttentionMetadata:
        """The step's metadata as the kernels read it: int32 on the device, made at the step's first layer."""
        if self._seen is None or self._seen[0] is not metadata:
            lengths, starts = metadata.seq_lens_device, metadata.query_starts
            if lengths is None:
                lengths = torch.tensor(metadata.seq_lens, dtype=torch.int32).to(device, non_blocking=True)
            if starts is None and (self._fixed or metadata.num_decodes < len(metadata.query_lens)):
                sums = torch.tensor([0, *metadata.query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                starts = sums.to(device, non_blocking=True)
            tables = metadata.block_tables.to(torch.int32)
            self._seen = metadata, replace(metadata, block_tables=tables, seq_lens_device=lengths, query_starts=starts)
        return self._seen[1]

    def _paged(
        self, layer: DeepLayer, kqv: Tensor, rope: Rope, cache: Tensor, step: AttentionMetadata, decodes: int
    ) -> Tensor:
        """Attention over the pages of one layer [2, blocks, block_size, KV, D]: kqv [T, ..] -> [T, heads * D]."""
        tables, slots, lengths, starts = step.block_tables, step.slot_mapping, step.seq_lens_device, step.query_starts
        assert lengths is not None
        config, tokens = layer.config, len(kqv)
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, layer.head_dim
        out = kqv.new_empty((tokens, heads * size), dtype=layer.o_proj.dtype)
        norms = (kqv, kqv) if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        sides = (cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3))
        shape = {"D": size, "HEADS": heads, "KV": kv_heads, "PAGE": cache.shape[2]}
        # With a window, all keys of a prompt go through one loop, whichever tokens are in the block.
        qk_norm, window = layer.q_norm is not None, config.sliding_window or (NO_WINDOW if self._fixed else 0)
        block_d, group, scale = power_of_two(16, size), heads // kv_heads, config.attention_scale
        if decodes:
            splits = step.num_splits or num_splits(decodes, kv_heads)
            blocks = self._blocks.decode(splits, splits * kv_heads * decodes)
            partial, weights = out, out
            if splits > 1:
                partial = kqv.new_empty((decodes, heads, splits, size), dtype=torch.float32)
                weights = kqv.new_empty((decodes, heads, splits), dtype=torch.float32)
            triton_attention.decode_kernel[(splits, kv_heads, decodes)](
                kqv, *norms, *rope, slots, tables, lengths, cache, out, partial, weights, QK_NORM_EPS,
                scale, tables.stride(0), *sides, **shape, QK_NORM=qk_norm, WINDOW=window, SPLITS=splits,
                BLOCK_D=block_d, BLOCK_G=power_of_two(16, group), **blocks, **self._launch,
            )  # fmt: skip
            if splits > 1:
                triton_attention.combine_kernel[(heads, decodes)](
                    partial, weights, lengths, out, D=size, HEADS=heads, WINDOW=window, SPLITS=splits,
                    BLOCK_D=block_d, BLOCK_N=blocks["BLOCK_N"], num_warps=2, **self._launch,
                )  # fmt: skip
        if decodes < tokens:
            assert starts is not None
            rest = tokens - decodes
            q = kqv.new_empty((rest, heads, size), dtype=layer.o_proj.dtype)
            triton_attention.rotate_kernel[(rest,)](
                kqv[decodes:], *norms, rope[0][decodes:], rope[1][decodes:], slots[decodes:], cache, q,
                QK_NORM_EPS, *sides, **shape, QK_NORM=qk_norm, BLOCK_D=block_d, BLOCK_Q=power_of_two(1, heads),
                BLOCK_KV=power_of_two(1, kv_heads), **self._launch,
            )  # fmt: skip
            sequences = len(lengths) - decodes
            blocks = self._blocks.prompt()
            grid = (rest // (blocks["BLOCK_M"] // group) + sequences, kv_heads)
            triton_attention.prefill_kernel[grid](
                q, tables[decodes:], starts[decodes:], lengths[decodes:], cache, out[decodes:], scale,
                sequences, decodes, tables.stride(0), *sides, **shape, WINDOW=window, BLOCK_D=block_d,
                **blocks, **self._launch,
            )  # fmt: skip
        return out

    def dynamics(
        self, layer: DynamicsLayer, x: Tensor, h: Tensor, velocity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Backend.dynamics`; changes `x` and `velocity` in place, and computes the results of `highway`."""
        tokens, size = x.shape
        inner, few = len(layer.controller_v), self._few(tokens)
        if few:
            second = None if velocity is None else (velocity, layer.controller_v)
            products = self._small(h, layer.dynamics_in, second)
            from_velocity = products[:, len(layer.dynamics_in) :]
        else:
            products = F.linear(h.to(layer.dynamics_in.dtype), layer.dynamics_in)
            from_velocity = products if velocity is None else self._small(velocity, layer.controller_v)
        first = velocity is None
        speed = torch.empty_like(x) if velocity is None else velocity
        mu = torch.empty_like(x)
        below = stacked = residual = mu
        if self._highway:
            residual = torch.empty_like(mu) if first or self._above is None else self._above.residual
            stacked = x.new_empty((tokens, 2 * size), dtype=layer.kqv_proj.dtype)
            below = stacked[:, size:]
        blocks = self._blocks.dynamics(few)
        triton_kernels.dynamics_kernel[(-(-size // blocks["BLOCK_N"]), -(-tokens // blocks["BLOCK_M"]))](
            x, h, speed, products, from_velocity, layer.controller_bias, layer.controller_out,
            layer.controller_out_bias, layer.mu, mu, below, residual, tokens, layer.config.dynamics_dt,
            products.stride(0), from_velocity.stride(0), below.stride(0), H=size, C=inner,
            CONTEXTUAL=layer.contextual_mu, MOVING=velocity is not None, HIGHWAY=self._highway, FIRST=first,
            MAX_BETA=MAX_BETA, MAX_VELOCITY=MAX_VELOCITY, SHARE=HIGHWAY_SHARE, **blocks,
            BLOCK_C=power_of_two(16, inner), **self._launch,
        )  # fmt: skip
        self._above = _Above(mu, below, residual, stacked) if self._highway else None
        return x, speed, mu

    def highway(self, mu: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Backend.highway`; the mu for the layer above is in the weights' dtype. `dynamics` has computed both."""
        if self._above is None or self._above.mu is not mu:
            return super().highway(mu, residual)
        return self._above.below, self._above.residual

    def routed_mlp(
        self, layer: DeepLayer, x: Tensor, input_ids: Tensor, mu: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Backend.routed_mlp`; changes `x` in place. The expert of a padding row is -1."""
        tokens, size = x.shape
        table, router = layer.token_to_expert, None if mu is None else layer.router
        b = x.new_empty(x.shape, dtype=layer.gate_up.dtype)
        experts = None if table is None else torch.empty_like(input_ids)
        count = len(layer.gate_up)
        triton_mlp.route_kernel[(tokens,)](
            x, layer.post_norm, x if mu is None else mu, x if router is None else router,
            input_ids if table is None else table, input_ids, input_ids if experts is None else experts, b,
            layer.config.rms_norm_eps, BASE_EXPERT_SCORE, H=size, E=count, ROUTED=table is not None,
            ROUTER=router is not None, BLOCK=power_of_two(16, size), num_warps=4 if size <= 4096 else 8, **self._launch,
        )  # fmt: skip
        known = (input_ids, input_ids) if table is None else (table, input_ids)
        self._experts(x, b, layer.gate_up, layer.down, known, experts, layer.activation, self._columns[layer.index])
        if layer.shared_gate_up is not None and layer.shared_down is not None:
            self._experts(x, b, layer.shared_gate_up[None], layer.shared_down[None], known, None, "silu")
        return x, experts

    def _experts(
        self, x: Tensor, b: Tensor, gate_up: Tensor, down: Tensor, known: tuple[Tensor, Tensor],
        experts: Tensor | None, activation: str, columns: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Adds to x [T, H] the output of each token's expert for b [T, H]: gate_up [E, 2W, H], down [E, H, W].

        `known` is the table of the ids' own experts and the ids, by which weights can be read early. `columns` are the
        arguments by which ids choose columns of one MLP, see `_columns_by_id`.
        """
        tokens, size = x.shape
        count, width = len(down), down.shape[2]
        act = b.new_empty((tokens, width))
        own = b if experts is None else experts
        columns = columns or {"routes": b, "scales": b, "channels": b, "layer": 0, **WITHOUT_ROUTES}
        if tokens <= GEMV_TOKENS and not self._fixed:
            first, second, routed = self._blocks.gemv(size, 2), self._blocks.gemv(width), experts is not None
            triton_gemv.gate_up_kernel[(-(-width // first["BLOCK_N"]), tokens)](
                b, gate_up, *known, own, out=act, H=size, W=width, ROUTED=routed, ACTIVATION=activation, **columns,
                **first, **self._launch,
            )  # fmt: skip
            triton_gemv.down_kernel[(-(-size // second["BLOCK_N"]), tokens)](
                act, down, own, x, H=size, W=width, ROUTED=routed, **second, **self._launch
            )
            return
        mode, order, offsets = triton_mlp.DENSE.value, b, b
        narrow, wide, blocks = self._blocks.experts(tokens)
        rows = -(-tokens // blocks["BLOCK_M"])
        if experts is not None and rows == 1 and tokens <= ONE_BLOCK and not self._fixed:
            mode, rows = triton_mlp.MASKED.value, count
        elif experts is not None:
            mode, rows = triton_mlp.SORTED.value, rows + count - 1
            order = experts.new_empty(tokens, dtype=torch.int32)
            offsets = experts.new_empty(count + 1, dtype=torch.int32)
            triton_mlp.sort_kernel[(-(-tokens // SORT_BLOCK),)](
                experts, order, offsets, tokens, E=count, BLOCK=SORT_BLOCK, BLOCK_E=power_of_two(2, count + 1),
                **self._launch,
            )  # fmt: skip
        triton_mlp.gate_up_kernel[(-(-width // narrow), rows)](
            b, gate_up, own, order, offsets, known[1], out=act, tokens=tokens, H=size, W=width, E=count, MODE=mode,
            ACTIVATION=activation, BLOCK_N=narrow, **columns, **blocks, **self._launch,
        )  # fmt: skip
        triton_mlp.down_kernel[(-(-size // wide), rows)](
            act, down, own, order, offsets, x, tokens, H=size, W=width, E=count, MODE=mode, BLOCK_N=wide, **blocks,
            **self._launch,
        )  # fmt: skip

    def draw(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """As `Backend.draw`, except for rounding exactly at the border of the kept tokens."""
        return triton_sampling.draw(logits, batch)

    def logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return triton_sampling.logprobs(logits, chosen, top)
