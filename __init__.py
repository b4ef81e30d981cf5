"""PyLLM: an OpenAI-compatible inference server with continuous batching for Complexity-Deep models.

The names below are imported when first used, so that `import pyllm` and `pyllm --help` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.llm import LLM
    from .engine.messages import SamplingParams
    from .model.config import DeepConfig
    from .model.pretrained import DeepForCausalLM

__all__ = ["LLM", "DeepConfig", "DeepForCausalLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "DeepConfig": ".model.config",
    "DeepForCausalLM": ".model.pretrained",
    "LLM": ".engine.llm",
    "SamplingParams": ".engine.messages",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
