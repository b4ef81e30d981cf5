"""A network in the form that the compiled kernels read: packed matrices, and the C structures of `kernels/`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import lazy_zeros
from ..network import DeepNetwork
from ..parameters import BASE_EXPERT_SCORE, MAX_BETA, MAX_VELOCITY, QK_NORM_EPS, DeepLayer, DynamicsLayer, GuidedLayer

LANES = 16
PANELS = 4
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
HALF = LANES * PANELS // 2  # rows of gate in a group, next to as many of up
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "relu": 2}


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class Matrix(Structure):
    _fields_ = _fields((c_void_p, "data scales totals"), (c_int32, "n k kind panels"))


class Step(Structure):
    _fields_ = _fields(
        (c_void_p, "cos sin slots tables query_lens seq_lens"), (c_int64, "page_bytes"),
        (c_int32, "tokens sequences table_stride block_size"),
    )  # fmt: skip


class Attention(Structure):
    _fields_ = _fields(
        (POINTER(Matrix), "kqv out"), (c_void_p, "input_norm q_norm k_norm"), (c_float, "eps head_eps scale"),
        (c_int32, "size heads kv_heads head_dim window kind"),
    )  # fmt: skip


class Dynamics(Structure):
    _fields_ = _fields(
        (c_void_p, "base in_bias out_bias"), (POINTER(Matrix), "into into_velocity out"),
        (c_float, "dt max_beta max_velocity"), (c_int32, "size inner contextual"),
    )  # fmt: skip


class Mlp(Structure):
    _fields_ = _fields(
        (c_void_p, "norm router own"), (POINTER(Matrix), "gate_up down shared_gate_up shared_down"),
        (c_void_p, "routes output_scales channel_scale"), (c_float, "eps own_score"),
        (c_int32, "size num_experts activation shared_activation num_routes vocab layer expert_width"),
        (c_int32, "shared_columns expert_columns"),
    )  # fmt: skip


class PackedMatrix:
    """Weights [n, k] in groups of 16 * panels rows: [groups, words along k, rows of the group].

    A word is 32 bits: one FP32, two BF16 or four INT8 numbers that are neighbours along k, so one instruction
    multiplies the words of 16 rows by one word of the input. With `int8` each row is quantised with a scale of its own:
    w = scale * q, |q| <= 127.
    """

    def __init__(self, weight: Tensor, *, panels: int = PANELS, int8: bool = False) -> None:
        n, k = weight.shape
        scales = totals = None
        if int8:
            wide = weight.float()
            scales = wide.abs().amax(dim=1) / 127.0
            weight = (wide / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
            # 128 is added to activations to make them unsigned; subtracting this undoes it.
            totals = weight.sum(dim=1, dtype=torch.int32) * 128
        rows, per_word = LANES * panels, PER_WORD[weight.dtype]
        if n % rows or k % per_word:
            padded = weight.new_zeros(-(-n // rows) * rows, -(-k // per_word) * per_word)
            padded[:n, :k] = weight
            weight = padded
        words = weight.contiguous().view(torch.int32).unflatten(0, (-1, rows)).transpose(1, 2)
        data = lazy_zeros(words.numel() * 4).view(torch.int32).view(words.shape)
        data.copy_(words)
        self.n = n
        self.struct = Matrix(*map(pointer, (data, scales, totals)), n, k, KINDS[weight.dtype], panels)
        self.address = ctypes.addressof(self.struct)
        self._tensors = data, scales, totals  # alive as long as the structure that points to them


class Packer:
    """Replaces a model's large matrices with packed ones, one at a time, so that memory never holds two copies of all.

    The model keeps tensors without memory in their place; `matrices` has the packed matrix by the id of such a tensor.
    """

    def __init__(self, model: DeepNetwork, *, int8: bool) -> None:
        self._int8 = int8
        self._alive: list[PackedMatrix] = []
        self.matrices: dict[int, PackedMatrix] = {}
        tied = model.lm_head is model.embed_tokens
        self.pack(model, "embed_tokens", exact=not tied)
        if tied:
            model.lm_head = model.embed_tokens
        else:
            self.pack(model, "lm_head")
        self.layers: list[PackedLayer] = []
        for layer in model.layers:
            self.layers.append(PackedLayer(layer, KINDS[model.dtype], self))
            if isinstance(layer, GuidedLayer):
                self.pack(layer, "mu_guidance_proj")

    def pack(
        self, owner: nn.Module, name: str, *, arrange: Callable[[Tensor], Tensor] | None = None,
        index: int | None = None, panels: int = PANELS, exact: bool = False,
    ) -> PackedMatrix:  # fmt: skip
        """Pack a matrix, or one of a stack; with the last of a stack, drop the original. `exact` is never INT8."""
        weight: Tensor = getattr(owner, name).detach()
        part = weight if index is None else weight[index]
        packed = PackedMatrix(arrange(part) if arrange else part, panels=panels, int8=self._int8 and not exact)
        if index is None or index == len(weight) - 1:
            setattr(owner, name, nn.Parameter(weight.to("meta"), requires_grad=False))
        self.matrices[id(getattr(owner, name))] = packed
        self._alive.append(packed)
        return packed


class PackedLayer:
    """The addresses of one layer's structures; 0 for dynamics that the era does not have."""

    def __init__(self, layer: DeepLayer, kind: int, packer: Packer) -> None:
        config, size = layer.config, layer.config.hidden_size

        def matrix(name: str, **options: Any) -> Any:
            return ctypes.pointer(packer.pack(layer, name, **options).struct)

        def stack(name: str, arrange: Callable[[Tensor], Tensor] | None = None) -> Any:
            parts = [packer.pack(layer, name, index=e, arrange=arrange).struct for e in range(len(layer.down))]
            return ctypes.cast((Matrix * len(parts))(*parts), POINTER(Matrix))

        widths = [layer.shared_width] + [config.expert_size] * config.experts if layer.routes is not None else None

        def halves(weight: Tensor) -> Tensor:
            return _interleave(_aligned(weight.unflatten(0, (2, -1)), 1, widths), HALF)

        attention = Attention(
            kqv=matrix("kqv_proj"), out=matrix("o_proj"), input_norm=pointer(layer.input_norm),
            q_norm=pointer(layer.q_norm), k_norm=pointer(layer.k_norm), eps=config.rms_norm_eps,
            head_eps=QK_NORM_EPS, scale=config.attention_scale, size=size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, window=config.sliding_window or 0, kind=kind,
        )  # fmt: skip
        mlp = Mlp(
            norm=pointer(layer.post_norm), router=pointer(layer.router), own=pointer(layer.token_to_expert),
            gate_up=stack("gate_up", halves), down=stack("down", lambda w: _aligned(w, 1, widths)),
            eps=config.rms_norm_eps,
            own_score=BASE_EXPERT_SCORE, size=size, num_experts=config.experts,
            activation=ACTIVATIONS[layer.activation],
        )  # fmt: skip
        if layer.shared_gate_up is not None:
            mlp.shared_gate_up = matrix("shared_gate_up", arrange=halves)
            mlp.shared_down = matrix("shared_down")
        self._scales = _set_routes(mlp, layer)
        dynamics = None
        if isinstance(layer, DynamicsLayer):
            dynamics = Dynamics(
                base=pointer(layer.mu), in_bias=pointer(layer.controller_bias),
                out_bias=pointer(layer.controller_out_bias), into=matrix("dynamics_in"),
                into_velocity=matrix("controller_v"),
                out=matrix("controller_out", panels=3, arrange=lambda w: _interleave(w.unflatten(0, (3, -1)), LANES)),
                dt=config.dynamics_dt, max_beta=MAX_BETA, max_velocity=MAX_VELOCITY, size=size,
                inner=config.dynamics_controller_hidden, contextual=layer.contextual_mu,
            )  # fmt: skip
        self._structures = attention, mlp, dynamics  # alive as long as their addresses
        self.attention, self.mlp = ctypes.addressof(attention), ctypes.addressof(mlp)
        self.dynamics = ctypes.addressof(dynamics) if dynamics else 0


def _set_routes(mlp: Mlp, layer: DeepLayer) -> Tensor | None:
    """Fill in the fields that only the TR-Hash line has; return a tensor to keep as long as `mlp`."""
    if layer.routes is None:
        return None
    scales, size = layer.output_scales(), layer.config.expert_size
    mlp.routes, mlp.num_routes, mlp.vocab = pointer(layer.routes), *layer.routes.shape
    mlp.output_scales, mlp.channel_scale = pointer(scales), pointer(layer.channel_scale)
    mlp.layer, mlp.expert_width = layer.index, size
    mlp.shared_columns, mlp.expert_columns = (-(-width // HALF) * HALF for width in (layer.shared_width, size))
    return scales


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's data; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def _aligned(weight: Tensor, dim: int, widths: list[int] | None) -> Tensor:
    """Pad each part of a dimension to a multiple of `HALF`, so that a group holds columns of one expert only."""
    if widths is None:
        return weight
    parts = []
    for part in weight.split(widths, dim):
        size = [*part.shape]
        size[dim] = -size[dim] % HALF
        parts += [part, part.new_zeros(size)]
    return torch.cat(parts, dim)


def _interleave(parts: Tensor, rows: int) -> Tensor:
    """[parts, n, k] -> the first `rows` rows of each part, then the next, and so on, padded: [parts * n', k]."""
    count, n, k = parts.shape
    padded = parts.new_zeros(count, -(-n // rows) * rows, k)
    padded[:, :n] = parts
    return padded.view(count, -1, rows, k).transpose(0, 1).reshape(-1, k)
