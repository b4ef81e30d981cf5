"""How much memory is free for the KV cache, and how many blocks that makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import EngineConfig
from .errors import EngineStartError

DEFAULT_HOST_BYTES = 4 << 30
"""Most that the KV cache takes of a CPU's memory unless told otherwise."""
HOST_SHARE = 0.5
"""Of what is free on the CPU: the rest is for the step itself, the API process and other programs."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a type of its own for a GPU's memory only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def num_kv_blocks(
    config: EngineConfig, device: torch.device, block_bytes: int, max_model_len: int, reserve: int = 0
) -> int:
    """How many blocks the KV cache has; a request of full length fits at least.

    Call it when the weights are in place: what is free then is what there is, but for `reserve` bytes on a GPU, which
    are for the steps themselves.

    Raises:
        EngineStartError: it does not fit; one sentence that says what to set.
    """
    per_sequence = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        blocks, mend = config.num_kv_blocks, f"raise --num-kv-blocks to {per_sequence}"
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // block_bytes
        mend = f"raise --kv-cache-memory-bytes to {per_sequence * block_bytes}"
        if device.type == "cpu" and config.kv_cache_memory_bytes > (free := free_host_bytes()):
            raise EngineStartError(
                f"--kv-cache-memory-bytes asks for {config.kv_cache_memory_bytes} bytes, but only {free} are free: "
                "lower it, or leave it out to have a size chosen."
            )
    else:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            room = int(config.gpu_memory_utilization * total) - (total - free) - reserve
            mend = "raise --gpu-memory-utilization, lower --max-num-batched-tokens, or free memory on the GPU"
        else:
            room = min(DEFAULT_HOST_BYTES, int(free_host_bytes() * HOST_SHARE))
            mend = f"free memory, or set --kv-cache-memory-bytes to {per_sequence * block_bytes} if there is as much"
        blocks = max(room, 0) // block_bytes
        if device.type == "cpu" or not config.enable_prefix_caching:
            # All that the sequences that may run at once can fill; a GPU's memory is good for nothing else.
            blocks = min(blocks, config.most_seqs(device.type) * per_sequence)
    if blocks < per_sequence:
        tokens = blocks * config.block_size
        shorter = f"lower --max-model-len to {tokens}, or " if tokens else ""
        raise EngineStartError(
            f"The KV cache has room for {tokens} tokens, fewer than one request of {max_model_len}: {shorter}{mend}."
        )
    return blocks


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can take without swapping: what the machine has free, and what its groups still allow.

    `root` is where the file system begins, for tests.
    """
    return min([_machine_bytes(root), *_group_bytes(root)])


def _machine_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    except (OSError, StopIteration):  # not Linux: take half of what there is for free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group around this process that has a limit still allows (versions 1 and 2)."""
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
                continue  # a container sees its own group as the topmost one
            if most != "max":
                counts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                # Cached files, such as the checkpoint just read, make room when it is needed.
                used -= counts.get(f"{cached}active_file", 0) + counts.get(f"{cached}inactive_file", 0)
                yield max(int(most) - used, 0)
