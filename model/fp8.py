"""Keys and values in 8 bits: a sign, four bits of exponent and three of mantissa (e4m3), in half of BF16's memory.

Numbers from 2^-6 to 448 keep their four leading bits; smaller ones, down to 2^-9, keep fewer. No data is
needed: the size of a layer's keys and values is estimated from its weights, which are scaled to the middle of the
format's range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .parameters import DeepLayer

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0
CAPABILITY = (8, 9)  # of the first GPUs that convert FP8: Ada and Hopper


def has_fp8(device: torch.device) -> bool:
    """Whether the kernels can keep FP8 on a device; plain torch on the CPU can."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= CAPABILITY


def narrow(x: Tensor) -> Tensor:
    """The nearest FP8 numbers; larger numbers become the largest one, which torch does not promise."""
    return x.clamp(-MAX_FP8, MAX_FP8).to(FP8)


@torch.no_grad()
def centre(layer: DeepLayer) -> None:
    """Scale a layer's weights so that its keys and values are of size 1 to 2, by the root mean square expected of them.

    A factor in one place is divided out in another: keys and queries, values and the output's product. Powers of
    two change no bit of a result, so neither the pages nor the kernels need a scale. With QK-norm
    the size of a key is its norm's weight; otherwise, and for values, it follows from the rows of the product and
    input_norm's weight. The part from mu is known only at run time, and is left out.
    """
    kv = layer.config.num_key_value_heads * layer.config.head_dim
    keys, queries, values = layer.kqv_proj[:kv], layer.kqv_proj[kv:-kv], layer.kqv_proj[-kv:]
    if layer.k_norm is not None and layer.q_norm is not None:
        by = _to_one(layer.k_norm.square().mean())
        layer.k_norm.mul_(by)
        layer.q_norm.div_(by)
    else:
        by = _to_one(_of_rows(layer, keys))
        keys.mul_(by)
        queries.div_(by)
    by = _to_one(_of_rows(layer, values))
    values.mul_(by)
    layer.o_proj.div_(by)


def _of_rows(layer: DeepLayer, rows: Tensor) -> Tensor:
    """The expected mean square of these rows' products with a normed input."""
    return (rows[:, : len(layer.input_norm)] * layer.input_norm).square().sum() / len(rows)


def _to_one(mean_square: Tensor) -> float:
    """The power of two that scales numbers of this mean square to a size of 1 to 2."""
    return math.ldexp(1.0, 1 - math.frexp(math.sqrt(float(mean_square)))[1])
