"""The CPU's fast path: `Backend` on the compiled kernels of `kernels.cpp`, over packed weights.

The extension is compiled when the package is built. Where that could not be done, or the CPU lacks AVX-512 with
BF16 and VNNI, or `PYLLM_NATIVE=0` is set, `available` says so and plain torch computes instead.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, addressof, c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backend import (
    BASE_EXPERT_SCORE,
    HIGHWAY_SHARE,
    MAX_BETA,
    MAX_VELOCITY,
    QK_NORM_EPS,
    AttentionMetadata,
    Backend,
    lazy_zeros,
)
from .config import DeepConfig
from .layer import DeepLayer
from .network import DeepForCausalLM

CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"})
LANES = 16
PANELS = 4
MAX_HEAD_DIM = 256
MAX_GROUP = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "relu": 2}


class _Matrix(Structure):
    _fields_ = [("data", c_void_p), ("scales", c_void_p), ("totals", c_void_p)] + [
        (name, c_int32) for name in ("n", "k", "kind", "panels")
    ]


class _Attention(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("kqv", "q_norm", "k_norm", "cos", "sin", "keys", "values", "slots", "tables",
                                       "query_lens", "seq_lens", "out")]
        + [("norm_eps", c_float)]
        + [(name, c_int32) for name in ("tokens", "sequences", "table_stride", "heads", "kv_heads", "head_dim",
                                        "block_size", "window", "kind")]
    )  # fmt: skip


class _Dynamics(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("x", "h", "velocity", "mu", "base", "in_bias", "out_bias")]
        + [(name, POINTER(_Matrix)) for name in ("into", "into_velocity", "out")]
        + [(name, c_float) for name in ("dt", "max_beta", "max_velocity")]
        + [(name, c_int32) for name in ("tokens", "size", "inner", "contextual", "first")]
    )


class _Mlp(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("x", "norm", "experts")]
        + [(name, POINTER(_Matrix)) for name in ("gate_up", "down", "shared_gate_up", "shared_down")]
        + [("eps", c_float)]
        + [(name, c_int32) for name in ("tokens", "size", "num_experts", "activation", "shared_activation")]
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they were not built or this CPU cannot run them."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return None
    files = [Path(__file__).with_name("_kernels" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((file for file in files if file.exists()), None)
    if found is None or not set(flags.split()) >= CPU_FLAGS:
        return None
    library = ctypes.CDLL(str(found))
    pointer, number, real = c_void_p, c_int32, c_float
    signatures: dict[str, list[Any]] = {
        "set_threads": [number],
        "linear": [number, number, pointer, pointer, real, pointer, pointer, pointer],
        "attention": [pointer],
        "dynamics": [pointer],
        "route": [number, number, number, pointer, pointer, real, pointer, pointer],
        "mlp": [pointer],
        "highway": [number, number, number, real, pointer, pointer, pointer],
        "embed": [number, pointer, pointer, pointer],
        "rms_norm": [number, number, pointer, pointer, real, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"pyllm_{name}")
        function.argtypes, function.restype = arguments, None
    return library


def available(config: DeepConfig) -> bool:
    """Whether this machine and this network can use the compiled kernels."""
    fits = config.head_dim <= MAX_HEAD_DIM and config.num_attention_heads <= MAX_GROUP * config.num_key_value_heads
    return fits and os.environ.get("PYLLM_NATIVE") != "0" and _library() is not None


class PackedMatrix:
    """Weights as the kernels read them: [groups of 16 * panels rows, words along k, rows of the group].

    A word is 32 bits: one FP32, two BF16 or four INT8 numbers that are neighbours along k, so that one instruction
    multiplies 16 rows' words with one word of the input.

    Args:
        weight: [n, k], FP32 or BF16.
        panels: runs of 16 rows in a group.
        int8: quantise each row to INT8 with a scale of its own: w = scale * q, |q| <= 127.
    """

    def __init__(self, weight: Tensor, *, panels: int = PANELS, int8: bool = False) -> None:
        n, k = weight.shape
        self._scales = self._totals = None
        if int8:
            wide = weight.float()
            self._scales = wide.abs().amax(dim=1) / 127.0
            weight = (wide / self._scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
            # Activations come with 128 added, to be unsigned; this takes it out of the sums again.
            self._totals = weight.sum(dim=1, dtype=torch.int32) * 128
        rows = LANES * panels
        per_word = PER_WORD[weight.dtype]
        if n % rows or k % per_word:
            padded = weight.new_zeros(-(-n // rows) * rows, -(-k // per_word) * per_word)
            padded[:n, :k] = weight
            weight = padded
        words = weight.contiguous().view(torch.int32).unflatten(0, (-1, rows)).transpose(1, 2)
        self._data = lazy_zeros(words.numel() * 4).view(torch.int32).view(words.shape).copy_(words)
        self.n, self.k = n, k
        self.struct = _Matrix(
            self._data.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            None if self._totals is None else self._totals.data_ptr(),
            n, k, KINDS[weight.dtype], panels,
        )  # fmt: skip
        self.address = addressof(self.struct)


def _interleave(parts: Tensor, rows: int) -> Tensor:
    """[parts, n, k] -> the first `rows` rows of each part, then the next, and so on, padded: [parts * n', k]."""
    count, n, k = parts.shape
    padded = parts.new_zeros(count, -(-n // rows) * rows, k)
    padded[:, :n] = parts
    return padded.unflatten(1, (-1, rows)).transpose(0, 1).flatten(0, 2)


class _NativeLayer:
    """The packed matrices of one layer and the argument structures that do not change from step to step."""

    def __init__(self, layer: DeepLayer, take: Callable[..., PackedMatrix]) -> None:
        config = layer.config
        self.kqv = take(layer, "kqv_proj")
        self.attention = _Attention(
            q_norm=_pointer(layer.q_norm), k_norm=_pointer(layer.k_norm), norm_eps=QK_NORM_EPS,
            heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
            window=config.sliding_window or 0,
        )  # fmt: skip
        self.attention_address = addressof(self.attention)
        if layer.dynamics_in is not None:
            size = config.hidden_size
            self._dynamics = [
                take(layer, "dynamics_in"),
                take(layer, "controller_v"),
                take(layer, "controller_out", lambda w: _interleave(w.unflatten(0, (3, -1)), LANES), panels=3),
            ]
            into, into_velocity, out = (ctypes.pointer(matrix.struct) for matrix in self._dynamics)
            self.dynamics = _Dynamics(
                base=_pointer(layer.mu), in_bias=_pointer(layer.controller_bias),
                out_bias=_pointer(layer.controller_out_bias), into=into, into_velocity=into_velocity, out=out,
                dt=config.dynamics_dt, max_beta=MAX_BETA, max_velocity=MAX_VELOCITY, size=size,
                inner=config.dynamics_controller_hidden, contextual=layer.contextual_mu,
            )  # fmt: skip
            self.dynamics_address = addressof(self.dynamics)

        def halves(weight: Tensor) -> Tensor:
            return _interleave(weight.unflatten(0, (2, -1)), LANES * PANELS // 2)

        experts = range(config.experts)
        self._experts = [take(layer, "gate_up", halves, index=e) for e in experts]
        self._experts += [take(layer, "down", index=e) for e in experts]
        stacks = (_Matrix * (2 * config.experts))(*(matrix.struct for matrix in self._experts))
        self.mlp = _Mlp(
            norm=_pointer(layer.post_norm), gate_up=stacks, eps=config.rms_norm_eps, size=config.hidden_size,
            down=ctypes.cast(addressof(stacks[config.experts]), POINTER(_Matrix)), num_experts=config.experts,
            activation=ACTIVATIONS[layer.activation],
        )  # fmt: skip
        self._stacks = stacks
        if layer.shared_gate_up is not None:
            self._shared = [take(layer, "shared_gate_up", halves), take(layer, "shared_down")]
            self.mlp.shared_gate_up, self.mlp.shared_down = (ctypes.pointer(matrix.struct) for matrix in self._shared)
        self.mlp_address = addressof(self.mlp)


class NativeBackend(Backend):
    """The operations of `Backend`, each in one call. It takes the model's large matrices over, packing each in turn.

    The model keeps tensors without memory in their place, so it can compute but no longer be trained or saved.
    Products are summed in one order whatever else is in the step, so prompts may be cut anywhere.

    Args:
        model: on the CPU; `available` must have said yes.
        int8: quantise the large matrices, per row; activations are then quantised per token as they come.
    """

    prefill_multiple = 1

    def __init__(self, model: DeepForCausalLM, *, int8: bool = False) -> None:
        library = _library()
        assert library is not None  # available() said so
        self._lib = library
        library.pyllm_set_threads(torch.get_num_threads())
        self._size = model.config.hidden_size
        self._kind = KINDS[model.dtype]
        self._matrices: dict[int, PackedMatrix] = {}
        self._metadata: AttentionMetadata | None = None
        self._step: tuple[Tensor, ...] = ()

        def take(
            owner: nn.Module, name: str, arrange: Callable[[Tensor], Tensor] | None = None, *,
            index: int | None = None, panels: int = PANELS, exact: bool = False,
        ) -> PackedMatrix:  # fmt: skip
            weight: Tensor = getattr(owner, name).detach()
            part = weight if index is None else weight[index]
            packed = PackedMatrix(arrange(part) if arrange else part, panels=panels, int8=int8 and not exact)
            if index is None or index == len(weight) - 1:
                setattr(owner, name, nn.Parameter(weight.to("meta"), requires_grad=False))
            self._matrices[id(getattr(owner, name))] = packed
            return packed

        with torch.inference_mode():
            tied = model.lm_head is model.embed_tokens
            take(model, "embed_tokens", exact=not tied)
            if tied:
                model.lm_head = model.embed_tokens
            else:
                take(model, "lm_head")
            self._layers: dict[DeepLayer, _NativeLayer] = {}
            for layer in model.layers:
                assert isinstance(layer, DeepLayer)  # nn.ModuleList forgets its type
                self._layers[layer] = _NativeLayer(layer, take)
                take(layer, "o_proj")
                if layer.mu_guidance_proj is not None:
                    take(layer, "mu_guidance_proj")

    def new_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `Backend.new_kv_cache`; in memory, one head's part of a page is one run."""
        layers, sides, blocks, block_size, kv_heads, head_dim = shape
        return (
            super().new_kv_cache((layers, sides, blocks, kv_heads, block_size, head_dim), dtype, device).transpose(3, 4)
        )

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.embed`."""
        out = torch.empty(len(input_ids), self._size)
        self._lib.pyllm_embed(len(input_ids), input_ids.data_ptr(), self._matrices[id(weight)].address, out.data_ptr())
        return out

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.linear`."""
        matrix, rows = self._matrices[id(weight)], len(x)
        out = torch.empty(rows, matrix.n)
        self._lib.pyllm_linear(rows, matrix.k, x.data_ptr(), None, 0.0, None, matrix.address, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `Backend.rms_norm`."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._lib.pyllm_rms_norm(x.numel() // size, size, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    def project_kqv(self, layer: DeepLayer, x: Tensor, mu_below: Tensor | None) -> Tensor:
        """As `Backend.project_kqv`."""
        matrix, rows = self._layers[layer].kqv, len(x)
        out = torch.empty(rows, matrix.n)
        beside = None if matrix.k == self._size or mu_below is None else mu_below.data_ptr()
        self._lib.pyllm_linear(
            rows, self._size, x.data_ptr(), layer.input_norm.data_ptr(), layer.config.rms_norm_eps, beside,
            matrix.address, out.data_ptr(),
        )  # fmt: skip
        return out

    def attention(
        self,
        layer: DeepLayer,
        kqv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Tensor | None,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """As `Backend.attention`; returns FP32."""
        if cache is None:
            return super().attention(layer, kqv, rope, cache, metadata).float()
        assert metadata.slot_mapping is not None  # for the type checker
        assert metadata.block_tables is not None
        native = self._layers[layer]
        args = native.attention
        if metadata is not self._metadata:
            self._metadata = metadata
            self._step = (
                torch.tensor(metadata.query_lens, dtype=torch.int32),
                torch.tensor(metadata.seq_lens, dtype=torch.int32),
                metadata.block_tables.to(torch.int32).contiguous(),
            )
        query_lens, seq_lens, tables = self._step
        out = torch.empty(len(kqv), args.heads * args.head_dim)
        args.kqv, args.cos, args.sin = kqv.data_ptr(), rope[0].data_ptr(), rope[1].data_ptr()
        args.keys = cache.data_ptr()
        args.values = args.keys + cache.stride(0) * cache.element_size()
        args.slots, args.tables = metadata.slot_mapping.data_ptr(), tables.data_ptr()
        args.query_lens, args.seq_lens = query_lens.data_ptr(), seq_lens.data_ptr()
        args.out = out.data_ptr()
        args.tokens, args.sequences, args.table_stride = len(kqv), len(seq_lens), tables.shape[1]
        args.block_size, args.kind = cache.shape[2], self._kind
        self._lib.pyllm_attention(native.attention_address)
        return out

    def dynamics(
        self, layer: DeepLayer, x: Tensor, h: Tensor, velocity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Backend.dynamics`; changes `x` and `velocity` in place."""
        native = self._layers[layer]
        args = native.dynamics
        args.first = velocity is None
        velocity = torch.empty_like(x) if velocity is None else velocity
        mu = torch.empty_like(x)
        args.x, args.h, args.velocity, args.mu = x.data_ptr(), h.data_ptr(), velocity.data_ptr(), mu.data_ptr()
        args.tokens = len(x)
        self._lib.pyllm_dynamics(native.dynamics_address)
        return x, velocity, mu

    def route(self, layer: DeepLayer, input_ids: Tensor, mu: Tensor | None) -> Tensor | None:
        """As `Backend.route`."""
        if layer.token_to_expert is None:
            return None
        own = layer.token_to_expert[input_ids]
        if layer.router is None or mu is None:
            return own
        experts = torch.empty_like(own)
        self._lib.pyllm_route(
            len(own), self._size, len(layer.router), mu.data_ptr(), layer.router.data_ptr(), BASE_EXPERT_SCORE,
            own.data_ptr(), experts.data_ptr(),
        )  # fmt: skip
        return experts

    def routed_mlp(self, layer: DeepLayer, x: Tensor, experts: Tensor | None) -> Tensor:
        """As `Backend.routed_mlp`; changes `x` in place."""
        native = self._layers[layer]
        args = native.mlp
        args.x, args.tokens = x.data_ptr(), len(x)
        args.experts = None if experts is None else experts.data_ptr()
        self._lib.pyllm_mlp(native.mlp_address)
        return x

    def highway(self, mu: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Backend.highway`; changes `residual` in place."""
        first = residual is None
        total = torch.empty_like(mu) if residual is None else residual
        out = torch.empty_like(mu)
        self._lib.pyllm_highway(
            len(mu), self._size, first, HIGHWAY_SHARE, mu.data_ptr(), total.data_ptr(), out.data_ptr()
        )
        return out, total


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
