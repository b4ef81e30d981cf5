"""From a configuration to a running engine core: loads the model and sizes the KV cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..model.config import CheckpointError, DeepConfig
from ..model.loader import load_checkpoint
from ..model.network import DeepForCausalLM
from .config import EngineConfig
from .core import EngineCore
from .errors import EngineStartError
from .messages import EngineInfo
from .model_runner import ModelRunner

DEFAULT_KV_BYTES = 4 << 30
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def build_engine(config: EngineConfig) -> EngineCore:
    """Load the model and make its engine.

    Raises:
        EngineStartError: the checkpoint, the device or the memory do not allow it; one plain sentence.
    """
    try:
        return _build(config)
    except CheckpointError as error:
        raise EngineStartError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        # torch has a type of its own for a GPU's memory only.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise EngineStartError(
            "The model and its KV cache do not fit in memory: lower --kv-cache-memory-bytes, or use --dtype bfloat16."
        ) from None


def _build(config: EngineConfig) -> EngineCore:
    device = _device(config)
    model, report = load_checkpoint(
        Path(config.model),
        dtype=DTYPES[config.dtype],
        device=device,
        load_format=config.load_format,
        seed=config.seed or 0,
        progress=not config.quiet,
    )
    model.eval().requires_grad_(False)
    max_model_len = config.max_model_len or model.config.max_position_embeddings
    num_blocks = _num_blocks(config, model, max_model_len)
    info = EngineInfo(
        era=report.era,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        parameters=report.parameters,
        file_dtypes=report.file_dtypes,
        load_seconds=report.seconds,
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=model.config.eos_token_ids,
    )
    return EngineCore(info, ModelRunner(model, num_blocks=num_blocks, block_size=config.block_size))


def _device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise EngineStartError("There is no CUDA device that torch can use: leave out --device cuda to run on the CPU.")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def block_bytes(config: DeepConfig, block_size: int, itemsize: int) -> int:
    """Bytes of one KV block over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_size * itemsize


def _num_blocks(config: EngineConfig, model: DeepForCausalLM, max_model_len: int) -> int:
    """How many blocks the KV cache has; at least one request of full length must fit."""
    size = block_bytes(model.config, config.block_size, model.dtype.itemsize)
    per_sequence = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // size
    else:
        # No more than what the sequences that may run at once can fill, and half of what is free now.
        blocks = min(min(DEFAULT_KV_BYTES, _free_bytes(model.device) // 2) // size, config.max_num_seqs * per_sequence)
    if blocks < per_sequence:
        raise EngineStartError(
            f"The KV cache has room for {blocks * config.block_size} tokens, fewer than one request of "
            f"{max_model_len}: lower --max-model-len to {blocks * config.block_size} or raise --kv-cache-memory-bytes "
            f"to {per_sequence * size}."
        )
    return blocks


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    except (OSError, StopIteration):  # not Linux: take half of what there is for free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
