"""Our decode attention against FlashInfer's over the same pages, where that is installed; part of gpu_check.py.

Ours does more in its time: QK-norm, rotary positions, and the new token's write to its page.
"""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any

import torch

from pyllm.benchmarks.gpu.gpu_kernels import PAGE, step_of
from pyllm.benchmarks.gpu.gpu_measure import Machine
from pyllm.model.cuda.backend import TritonBackend
from pyllm.model.fp8 import FP8, has_fp8
from pyllm.model.parameters import DeepLayer


@torch.inference_mode()
def against_flashinfer(machine: Machine) -> list[dict[str, Any]]:
    """One layer of the 1.5B shape, 256 sequences of 2048 tokens, pages in BF16 and in FP8."""
    if importlib.util.find_spec("flashinfer") is None:
        return [{"pages": "flashinfer is not installed"}]
    import flashinfer

    (batch, context), rows = (2, 2 * PAGE) if machine.dry else (256, 2048), []
    model = machine.model(machine.shape("1.5b"))
    config, layer, ops = model.config, model.layers[0], model.ops
    assert isinstance(layer, DeepLayer)
    assert isinstance(ops, TritonBackend)
    metadata, positions, blocks = step_of([(context - 1, 1)] * batch, machine.device)
    assert metadata.block_tables is not None
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    kqv = torch.randn(batch, layer.kqv_proj.shape[0], device=machine.device).to(machine.dtype)
    angles = positions[:, None].float() * model.inv_freq
    queries = kqv[:, : heads * size].unflatten(1, (heads, size)).contiguous()
    rope, step = (angles.cos(), angles.sin()), ops._prepared(metadata, machine.device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=machine.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=machine.device) * (context // PAGE)
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=machine.device)
    for kept in (machine.dtype, FP8)[: 1 + has_fp8(machine.device)]:
        shape = (1, 2, blocks, PAGE, kv_heads, size)
        cache = ops.new_kv_cache(shape, kept, machine.device)[0]
        pages = tuple(side.transpose(1, 2) for side in cache)  # [blocks, KV, PAGE, D], as they lie in memory
        ours = machine.seconds(partial(ops._paged, layer, kqv, rope, cache, step, batch))
        row: dict[str, Any] = {"pages": str(kept)[6:], "ours ms": 1000 * ours}
        for matrix_units in (False, True):
            column = f"FlashInfer ÷ ours, {'matrix units' if matrix_units else 'plain'}"
            try:
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=matrix_units)
                wrapper.plan(
                    starts, metadata.block_tables.flatten(), last, heads, kv_heads, size, PAGE,
                    q_data_type=machine.dtype, kv_data_type=kept, sm_scale=1 / math.sqrt(size),
                )  # fmt: skip
                row[column] = machine.seconds(partial(wrapper.run, queries, pages)) / ours
            except Exception as error:  # it compiles kernels too, and no fault of its is one of ours
                row[column] = " ".join(str(error).split())[:60]
        rows.append(row)
    return rows
