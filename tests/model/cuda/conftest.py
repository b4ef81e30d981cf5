"""Runs Triton kernels in Triton's interpreter.

If Triton was already imported without it, to run on a GPU, the tests of this folder are skipped; run them alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

late = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if late or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from support import triton_interpreter  # noqa: F401  it patches Triton


@pytest.fixture(autouse=True)
def _few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run one after another here, and most of those that keep a GPU busy would have no keys."""
    monkeypatch.setattr("pyllm.model.cuda.backend.MAX_SPLITS", 2)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, or numbers that are no token, to show what is never written."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **how: Any) -> torch.Tensor:
            out: torch.Tensor = make(*args, **how)
            return out.fill_(float("nan") if out.is_floating_point() else 10**6)

        return made

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
