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
from ctypes import POINTER, Structure, addressof, c_float, c_int32, c_int64, c_void_p, sizeof
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import (
    BASE_EXPERT_SCORE,
    HIGHWAY_SHARE,
    MAX_BETA,
    MAX_VELOCITY,
    QK_NORM_EPS,
    AttentionMetadata,
    Backend,
    lazy_zeros,
)
from ..config import DeepConfig
from ..layer import DeepLayer
from ..network import DeepForCausalLM

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


class _Step(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("cos", "sin", "slots", "tables", "query_lens", "seq_lens")]
        + [("page_bytes", c_int64)]
        + [(name, c_int32) for name in ("tokens", "sequences", "table_stride", "block_size")]
    )


class _Attention(Structure):
    _fields_ = (
        [(name, POINTER(_Matrix)) for name in ("kqv", "out")]
        + [(name, c_void_p) for name in ("input_norm", "q_norm", "k_norm")]
        + [(name, c_float) for name in ("eps", "head_eps")]
        + [(name, c_int32) for name in ("size", "heads", "kv_heads", "head_dim", "window", "kind")]
    )


class _Dynamics(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("base", "in_bias", "out_bias")]
        + [(name, POINTER(_Matrix)) for name in ("into", "into_velocity", "out")]
        + [(name, c_float) for name in ("dt", "max_beta", "max_velocity")]
        + [(name, c_int32) for name in ("size", "inner", "contextual")]
    )


class _Mlp(Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("norm", "router", "own")]
        + [(name, POINTER(_Matrix)) for name in ("gate_up", "down", "shared_gate_up", "shared_down")]
        + [(name, c_float) for name in ("eps", "own_score")]
        + [(name, c_int32) for name in ("size", "num_experts", "activation", "shared_activation")]
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
    try:
        library = ctypes.CDLL(str(found))
        # The file may be older or newer than this one, where sources change and are not installed again.
        fits = library.pyllm_layout() == sizeof(_Matrix) + 1000 * sum(map(sizeof, (_Step, _Attention, _Dynamics, _Mlp)))
    except (OSError, AttributeError):
        fits = False
    if not fits:
        return None
    pointer, number, real = c_void_p, c_int32, c_float
    signatures: dict[str, list[Any]] = {
        "set_threads": [number],
        "linear": [number, pointer, pointer, pointer],
        "attention": [pointer] * 7,
        "dynamics": [pointer, number, number, pointer, pointer, pointer, pointer],
        "mlp": [pointer, number, pointer, pointer, pointer, pointer],
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
        self._data = lazy_zeros(words.numel() * 4).view(torch.int32).view(words.shape)
        self._data.copy_(words)
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
    return padded.view(count, -1, rows, k).transpose(0, 1).reshape(-1, k)


class _NativeLayer:
    """One layer's packed matrices, and the structures that tell the kernels of them."""

    def __init__(self, layer: DeepLayer, kind: int, take: Callable[..., PackedMatrix]) -> None:
        config, size = layer.config, layer.config.hidden_size
        self.packed: list[PackedMatrix] = []  # alive as long as the structures that point to them

        def matrix(name: str, **how: Any) -> Any:
            self.packed.append(take(layer, name, **how))
            return ctypes.pointer(self.packed[-1].struct)

        def stack(name: str, arrange: Callable[[Tensor], Tensor] | None = None) -> Any:
            parts = [matrix(name, index=e, arrange=arrange).contents for e in range(config.experts)]
            return ctypes.cast((_Matrix * len(parts))(*parts), POINTER(_Matrix))

        def halves(weight: Tensor) -> Tensor:
            return _interleave(weight.unflatten(0, (2, -1)), LANES * PANELS // 2)

        self._attention = _Attention(
            kqv=matrix("kqv_proj"), out=matrix("o_proj"), input_norm=_pointer(layer.input_norm),
            q_norm=_pointer(layer.q_norm), k_norm=_pointer(layer.k_norm), eps=config.rms_norm_eps,
            head_eps=QK_NORM_EPS, size=size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, window=config.sliding_window or 0, kind=kind,
        )  # fmt: skip
        self._mlp = _Mlp(
            norm=_pointer(layer.post_norm), router=_pointer(layer.router), own=_pointer(layer.token_to_expert),
            gate_up=stack("gate_up", halves), down=stack("down"), eps=config.rms_norm_eps,
            own_score=BASE_EXPERT_SCORE, size=size, num_experts=config.experts,
            activation=ACTIVATIONS[layer.activation],
        )  # fmt: skip
        if layer.shared_gate_up is not None:
            self._mlp.shared_gate_up = matrix("shared_gate_up", arrange=halves)
            self._mlp.shared_down = matrix("shared_down")
        self.attention, self.mlp, self.dynamics = addressof(self._attention), addressof(self._mlp), 0
        if layer.dynamics_in is not None:
            self._dynamics = _Dynamics(
                base=_pointer(layer.mu), in_bias=_pointer(layer.controller_bias),
                out_bias=_pointer(layer.controller_out_bias), into=matrix("dynamics_in"),
                into_velocity=matrix("controller_v"),
                out=matrix("controller_out", panels=3, arrange=lambda w: _interleave(w.unflatten(0, (3, -1)), LANES)),
                dt=config.dynamics_dt, max_beta=MAX_BETA, max_velocity=MAX_VELOCITY, size=size,
                inner=config.dynamics_controller_hidden, contextual=layer.contextual_mu,
            )  # fmt: skip
            self.dynamics = addressof(self._dynamics)


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
        self._metadata: AttentionMetadata | None = None
        self._cache: Tensor | None = None
        self._step, self._step_tensors, self._step_address = _Step(), list[Tensor](), 0
        self._whole: tuple[AttentionMetadata, Tensor, AttentionMetadata] | None = None
        self._matrices: dict[int, PackedMatrix] = {}  # by the id of the tensor that stands in the model for each

        def take(
            owner: nn.Module, name: str, *, arrange: Callable[[Tensor], Tensor] | None = None,
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
            self._layers: list[_NativeLayer] = []
            for layer in model.layers:
                assert isinstance(layer, DeepLayer)  # nn.ModuleList forgets its type
                self._layers.append(_NativeLayer(layer, self._kind, take))
                if layer.mu_guidance_proj is not None:
                    take(layer, "mu_guidance_proj")

    def new_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `Backend.new_kv_cache`.

        In memory all layers' part of a page is one run, so that a step touches new memory here and there in one place
        and not in every layer's; in a layer's part, one head's keys or values are one run.
        """
        layers, sides, blocks, block_size, kv_heads, head_dim = shape
        pages = super().new_kv_cache((blocks, layers, sides, kv_heads, block_size, head_dim), dtype, device)
        return pages.permute(1, 2, 0, 4, 3, 5)

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.embed`."""
        out = torch.empty(len(input_ids), self._size)
        self._lib.pyllm_embed(len(input_ids), input_ids.data_ptr(), self._matrices[id(weight)].address, out.data_ptr())
        return out

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `Backend.linear`."""
        matrix, rows = self._matrices[id(weight)], len(x)
        out = torch.empty(rows, matrix.n)
        self._lib.pyllm_linear(rows, x.data_ptr(), matrix.address, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `Backend.rms_norm`."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._lib.pyllm_rms_norm(x.numel() // size, size, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    def attention(
        self,
        layer: DeepLayer,
        x: Tensor,
        mu_below: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: Tensor | None,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """As `Backend.attention`; without a cache, over pages of its own that are thrown away."""
        if cache is None:
            cache, metadata = self._passing_pages(layer, metadata)
        assert mu_below is not None or layer.kqv_proj.shape[1] == self._size
        if metadata is not self._metadata or rope[0] is not self._step_tensors[0] or cache is not self._cache:
            self._begin_step(metadata, rope, cache)
        h = torch.empty_like(x)
        keys = cache.data_ptr() + layer.index * cache.stride(0) * cache.element_size()
        self._lib.pyllm_attention(
            self._layers[layer.index].attention, self._step_address, x.data_ptr(),
            None if mu_below is None else mu_below.data_ptr(), keys,
            keys + cache.stride(1) * cache.element_size(), h.data_ptr(),
        )  # fmt: skip
        return h

    def _passing_pages(self, layer: DeepLayer, metadata: AttentionMetadata) -> tuple[Tensor, AttentionMetadata]:
        """Pages for whole sequences without a cache, one page a sequence, the same ones for every layer."""
        if self._whole is None or self._whole[0] is not metadata:
            config, lengths = layer.config, metadata.seq_lens
            longest = max(lengths)
            shape = (1, 2, len(lengths), longest, config.num_key_value_heads, config.head_dim)
            cache = self.new_kv_cache(shape, layer.o_proj.dtype, torch.device("cpu"))
            tables = torch.arange(len(lengths), dtype=torch.int32)[:, None]
            slots = torch.cat([n * longest + torch.arange(length) for n, length in enumerate(lengths)])
            paged = replace(metadata, slot_mapping=slots, block_tables=tables)
            self._whole = metadata, cache.expand(config.num_hidden_layers, -1, -1, -1, -1, -1), paged
        return self._whole[1:]

    def _begin_step(self, metadata: AttentionMetadata, rope: tuple[Tensor, Tensor], cache: Tensor) -> None:
        """Lay down once what the attention of all layers needs to know of the step."""
        assert metadata.slot_mapping is not None  # for the type checker
        assert metadata.block_tables is not None
        query_lens = torch.tensor(metadata.query_lens, dtype=torch.int32)
        seq_lens = torch.tensor(metadata.seq_lens, dtype=torch.int32)
        tables = metadata.block_tables.to(torch.int32).contiguous()
        tensors = [*rope, metadata.slot_mapping, tables, query_lens, seq_lens]
        self._step = _Step(
            *(tensor.data_ptr() for tensor in tensors), cache.stride(2) * cache.element_size(),
            len(metadata.slot_mapping), len(seq_lens), tables.shape[1], cache.shape[3],
        )  # fmt: skip
        self._step_address = addressof(self._step)
        self._cache, self._metadata, self._step_tensors = (
            cache,
            metadata,
            tensors,
        )  # alive as long as the kernels may read them

    def dynamics(
        self, layer: DeepLayer, x: Tensor, h: Tensor, velocity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Backend.dynamics`; changes `x` and `velocity` in place."""
        speed = torch.empty_like(x) if velocity is None else velocity
        mu = torch.empty_like(x)
        self._lib.pyllm_dynamics(
            self._layers[layer.index].dynamics, len(x), velocity is None, x.data_ptr(), h.data_ptr(),
            speed.data_ptr(), mu.data_ptr(),
        )  # fmt: skip
        return x, speed, mu

    def routed_mlp(
        self, layer: DeepLayer, x: Tensor, input_ids: Tensor, mu: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Backend.routed_mlp`; changes `x` in place."""
        experts = None if layer.token_to_expert is None else torch.empty_like(input_ids)
        self._lib.pyllm_mlp(
            self._layers[layer.index].mlp, len(x), x.data_ptr(), input_ids.data_ptr(),
            None if mu is None else mu.data_ptr(), None if experts is None else experts.data_ptr(),
        )  # fmt: skip
        return x, experts

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
