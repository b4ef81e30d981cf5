"""The CPU's fast path: `Backend` on the compiled kernels of `kernels/`, over packed weights.

A library for each instruction set is compiled when the package is built, and `library.py` chooses one. If none can run
here, or the environment says so, `available` is false and plain torch computes instead.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from ctypes import addressof, c_float, c_int32, c_void_p, sizeof
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backend import AttentionMetadata, Backend, Rope
from ..config import DeepConfig
from ..network import DeepNetwork
from ..parameters import HIGHWAY_SHARE, DeepLayer, DynamicsLayer
from .library import NONE, chosen_set, file_of
from .packing import Attention, Dynamics, Matrix, Mlp, Packer, Step

MAX_HEAD_DIM = 256
MAX_GROUP = 16
SIGNATURES = {
    "set_threads": "i", "linear": "ippp", "attention": "ppppppp", "dynamics": "piipppp", "mlp": "pipppp",
    "highway": "iiifppp", "embed": "ippp", "rms_norm": "iippfp",
}  # fmt: skip
"""The arguments of each function: integers, floats and pointers."""


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    """The kernels compiled for an instruction set; None if they cannot be used."""
    if name == NONE:
        return None
    try:
        library = ctypes.CDLL(str(file_of(name)))
        # In an editable install the compiled file may be older or newer than this one.
        if library.pyllm_layout() != sizeof(Matrix) + 1000 * sum(map(sizeof, (Step, Attention, Dynamics, Mlp))):
            return None
    except (OSError, AttributeError):
        return None
    types = {"i": c_int32, "f": c_float, "p": c_void_p}
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"pyllm_{name}")
        function.argtypes, function.restype = [types[each] for each in arguments], None
    return library


def available(config: DeepConfig) -> bool:
    """Whether this machine and this network can use the compiled kernels; may raise `InstructionSetError`."""
    fits = config.head_dim <= MAX_HEAD_DIM and config.num_attention_heads <= MAX_GROUP * config.num_key_value_heads
    return _library(chosen_set()) is not None and fits


class NativeBackend(Backend):
    """The operations of `Backend`, each in one call, on the large matrices of `model`, which it packs one by one.

    The model can then compute but no longer be trained or saved. `available` must be true. Products are summed in one
    order whatever else is in the step, so prompts may be cut anywhere. With `int8` the large matrices are quantised by
    row, and activations by token as they come.
    """

    prefill_multiple = 1

    def __init__(self, model: DeepNetwork, *, int8: bool = False) -> None:
        self.instruction_set = chosen_set()
        library = _library(self.instruction_set)
        if library is None:
            raise RuntimeError("The CPU kernels were not built, or this CPU cannot run them.")
        self._lib = library
        library.pyllm_set_threads(torch.get_num_threads())
        self._size = model.config.hidden_size
        with torch.inference_mode():
            packer = Packer(model, int8=int8)
        self._matrices, self._layers = packer.matrices, packer.layers
        self._packer = packer  # keeps all packed matrices alive
        self._step, self._step_tensors = Step(), list[Tensor]()
        self._step_key: tuple[Any, ...] = (None, None, None)
        self._uncached: tuple[AttentionMetadata, Tensor, AttentionMetadata] | None = None

    def new_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `Backend.new_kv_cache`.

        In memory, all layers' part of a page is contiguous, so a step that reaches new pages touches new memory in one
        place and not once for each layer; within a layer's part, one head's keys or values are contiguous.
        """
        layers, sides, blocks, block_size, kv_heads, head_dim = shape
        pages = super().new_kv_cache((blocks, layers, sides, kv_heads, block_size, head_dim), dtype, device)
        return pages.permute(1, 2, 0, 4, 3, 5)

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(len(input_ids), self._size)
        self._lib.pyllm_embed(len(input_ids), input_ids.data_ptr(), self._matrices[id(weight)].address, out.data_ptr())
        return out

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        matrix = self._matrices[id(weight)]
        out = torch.empty(len(x), matrix.n)
        self._lib.pyllm_linear(len(x), x.data_ptr(), matrix.address, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, size = torch.empty_like(x), x.shape[-1]
        self._lib.pyllm_rms_norm(x.numel() // size, size, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    def attention(
        self, layer: DeepLayer, x: Tensor, mu: Tensor | None, rope: Rope, cache: Tensor | None, step: AttentionMetadata
    ) -> Tensor:
        """As `Backend.attention`; without a cache, over temporary pages."""
        if cache is None:
            cache, step = self._temporary_pages(layer, step)
        assert mu is not None or layer.kqv_proj.shape[1] == self._size
        self._begin_step(step, rope, cache)
        h = torch.empty_like(x)
        keys = cache.data_ptr() + layer.index * cache.stride(0) * cache.element_size()
        values = keys + cache.stride(1) * cache.element_size()
        self._lib.pyllm_attention(
            self._layers[layer.index].attention, addressof(self._step), x.data_ptr(), _address(mu), keys, values,
            h.data_ptr(),
        )  # fmt: skip
        return h

    def _temporary_pages(self, layer: DeepLayer, metadata: AttentionMetadata) -> tuple[Tensor, AttentionMetadata]:
        """Pages for whole sequences without a cache, one page per sequence, the same for every layer."""
        if self._uncached is None or self._uncached[0] is not metadata:
            config, lengths = layer.config, metadata.seq_lens
            longest = max(lengths)
            shape = (1, 2, len(lengths), longest, config.num_key_value_heads, layer.head_dim)
            cache = self.new_kv_cache(shape, layer.o_proj.dtype, torch.device("cpu"))
            tables = torch.arange(len(lengths), dtype=torch.int32)[:, None]
            slots = torch.cat([n * longest + torch.arange(length) for n, length in enumerate(lengths)])
            paged = replace(metadata, slot_mapping=slots, block_tables=tables)
            self._uncached = metadata, cache.expand(config.num_hidden_layers, -1, -1, -1, -1, -1), paged
        return self._uncached[1:]

    def _begin_step(self, metadata: AttentionMetadata, rope: Rope, cache: Tensor) -> None:
        """Fill the structure about the step that the attention of all layers reads, in its first layer."""
        key = (metadata, cache, rope[0])
        if all(map(operator.is_, key, self._step_key)):
            return
        tables = metadata.block_tables.to(torch.int32).contiguous()
        lens = [torch.tensor(each, dtype=torch.int32) for each in (metadata.query_lens, metadata.seq_lens)]
        tensors = [*rope, metadata.slot_mapping, tables, *lens]
        self._step = Step(
            *map(_address, tensors), cache.stride(2) * cache.element_size(), len(metadata.slot_mapping),
            len(metadata.seq_lens), tables.shape[1], cache.shape[3],
        )  # fmt: skip
        self._step_key, self._step_tensors = key, tensors  # alive as long as the kernels may read them

    def dynamics(
        self, layer: DynamicsLayer, x: Tensor, h: Tensor, velocity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Backend.dynamics`; changes `x` and `velocity` in place."""
        speed, mu = torch.empty_like(x) if velocity is None else velocity, torch.empty_like(x)
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
            self._layers[layer.index].mlp, len(x), x.data_ptr(), input_ids.data_ptr(), _address(mu), _address(experts)
        )
        return x, experts

    def highway(self, mu: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Backend.highway`; changes `residual` in place."""
        first = residual is None
        total, out = torch.empty_like(mu) if residual is None else residual, torch.empty_like(mu)
        self._lib.pyllm_highway(
            len(mu), self._size, first, HIGHWAY_SHARE, mu.data_ptr(), total.data_ptr(), out.data_ptr()
        )
        return out, total


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
