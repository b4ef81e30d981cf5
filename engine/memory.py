"""How much memory is free for the KV cache, and how many blocks fit."""

from __future__ import annotations

import torch

from .config import EngineConfig
from .errors import EngineStartError
from .host import free_host_bytes

DEFAULT_HOST_BYTES = 4 << 30  # maximum size of the KV cache in the CPU's memory by default
HOST_SHARE = 0.5  # of the free memory; the rest is for steps, the API process and other programs


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; torch has an error type only for a GPU's memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def num_kv_blocks(
    config: EngineConfig, device: torch.device, block_bytes: int, max_model_len: int, reserve: int = 0
) -> int:
    """Choose how many blocks the KV cache has, once the weights are loaded; on a GPU, `reserve` bytes stay free.

    Raises `EngineStartError`, naming the flag to change, if not even one request of full length fits.
    """
    per_sequence = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        blocks, fix = config.num_kv_blocks, f"raise --num-kv-blocks to {per_sequence}"
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // block_bytes
        fix = f"raise --kv-cache-memory-bytes to {per_sequence * block_bytes}"
        if device.type == "cpu" and config.kv_cache_memory_bytes > (free := free_host_bytes()):
            raise EngineStartError(
                f"--kv-cache-memory-bytes asks for {config.kv_cache_memory_bytes} bytes, but only {free} are free: "
                "lower it, or leave it out to use a default size."
            )
    else:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            budget = int(config.gpu_memory_utilization * total) - (total - free) - reserve
            fix = "raise --gpu-memory-utilization, lower --max-num-batched-tokens, or free memory on the GPU"
        else:
            budget = min(DEFAULT_HOST_BYTES, int(free_host_bytes() * HOST_SHARE))
            fix = (
                f"free memory, or set --kv-cache-memory-bytes to {per_sequence * block_bytes} if that much is available"
            )
        blocks = max(budget, 0) // block_bytes
        if device.type == "cpu" or not config.enable_prefix_caching:
            # No more than running sequences can fill: only a prefix cache in a GPU's memory has a use for more.
            blocks = min(blocks, config.most_seqs(device.type) * per_sequence)
    if blocks < per_sequence:
        tokens = blocks * config.block_size
        shorter = f"lower --max-model-len to {tokens}, or " if tokens else ""
        raise EngineStartError(
            f"The KV cache has room for {tokens} tokens, fewer than one request of {max_model_len}: {shorter}{fix}."
        )
    return blocks
