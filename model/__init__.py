"""What computes: configuration, the network, checkpoint loading and the tokenizer.

Usable alone: `from pyllm.model import DeepConfig, DeepForCausalLM`. The names are imported when first
used: the API process takes the tokenizer from here and must not load torch for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import AttentionMetadata
    from .config import Architecture, CheckpointError, DeepConfig
    from .network import DeepForCausalLM

__all__ = ["Architecture", "AttentionMetadata", "CheckpointError", "DeepConfig", "DeepForCausalLM"]

_HOMES = {
    "Architecture": ".config",
    "AttentionMetadata": ".backend",
    "CheckpointError": ".config",
    "DeepConfig": ".config",
    "DeepForCausalLM": ".network",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
