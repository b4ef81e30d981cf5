"""Settings of engines that no checkpoint is behind."""

from __future__ import annotations

from typing import Any

from pyllm.engine.config import ResolvedConfig

SMALL: dict[str, Any] = {
    "model": "mock", "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 8, "block_size": 4,
    "max_num_batched_tokens": 32, "num_kv_blocks": 64, "overlap_scheduling": False,
}  # fmt: skip


def resolved_config(**settings: Any) -> ResolvedConfig:
    """A small configuration with nothing left open; by default, prompts may fill a step."""
    values = SMALL | settings
    values["max_num_prefill_tokens"] = settings.get("max_num_prefill_tokens") or values["max_num_batched_tokens"]
    return ResolvedConfig(**values)
