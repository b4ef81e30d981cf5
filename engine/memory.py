"""How much memory is free for the KV cache, and how many blocks fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import EngineConfig
from .errors import EngineStartError

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


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return how much memory this process can use without swapping, within the limits of its control groups."""
    return min([_machine_bytes(root), *_group_bytes(root)])


def _machine_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    except (OSError, StopIteration):  # not Linux: assume that half is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield the bytes that each limited control group around this process still allows (versions 1 and 2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts, limit, usage, cached = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], "max", "current", ""
        elif "memory" in controllers.split(","):
            mounts, limit, usage, cached = ["sys/fs/cgroup/memory"], "limit_in_bytes", "usage_in_bytes", "total_"
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in (root / mount / group for mount in mounts for group in (own, *own.parents)):
            try:
                most = (folder / f"memory.{limit}").read_text(encoding="ascii").strip()
                used = int((folder / f"memory.{usage}").read_text(encoding="ascii"))
                stat = (folder / "memory.stat").read_text(encoding="ascii").split()
            except OSError:
                continue  # inside a container, its own group is the root
            if most != "max":
                counts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                # The kernel drops cached files, such as the checkpoint, when memory is needed.
                used -= counts.get(f"{cached}active_file", 0) + counts.get(f"{cached}inactive_file", 0)
                yield max(int(most) - used, 0)
