"""How near a network's scores are to the true ones."""

from __future__ import annotations

import torch
from torch import Tensor


class Closeness:
    """Collects rows of logits [T, V] of several texts, next to the expected ones."""

    def __init__(self) -> None:
        self._divergence: list[Tensor] = []
        self._agree: list[Tensor] = []

    def add(self, expected: Tensor, logits: Tensor) -> None:
        true, ours = expected.log_softmax(-1), logits.log_softmax(-1)
        self._divergence.append((true.exp() * (true - ours)).sum(-1))
        self._agree.append(true.argmax(-1) == ours.argmax(-1))

    def check(self, budget: float, share: float = 0.92) -> None:
        """The mean divergence (Kullback-Leibler) is within `budget`, and `share` of the likeliest tokens are right."""
        assert torch.cat(self._divergence).mean() <= budget
        assert torch.cat(self._agree).float().mean() >= share
