"""The model layer: configuration, network, checkpoints and tokenizer, usable without the engine.

Names are imported on first use: the API process takes the tokenizer from here and must not load torch for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import AttentionMetadata
    from .config import Architecture, DeepConfig
    from .files import CheckpointError
    from .pretrained import DeepForCausalLM

__all__ = ["Architecture", "AttentionMetadata", "CheckpointError", "DeepConfig", "DeepForCausalLM"]

_MODULES = {"AttentionMetadata": ".backend", "CheckpointError": ".files", "DeepForCausalLM": ".pretrained"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, ".config"), __name__), name)
