"""Observe the network: count the work of its experts, and report mu and velocity of single tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...model.network import DeepNetwork, LayerState
from ..messages import TokenDynamics

MAX_STEPS = 256
MAX_TOKENS = 65536
"""Most steps, and most tokens in them, that are collected before they are counted together."""


class ExpertStats:
    """An observer of the network, between `begin` and `end` of a step.

    It counts on the network's device, and waits for the counts only when they are asked for.
    """

    def __init__(self, model: DeepNetwork) -> None:
        layers = model.layers
        tables = [layer.token_to_expert for layer in layers if layer.token_to_expert is not None]
        self._shape = len(tables), model.config.experts if tables else 0
        # [layers, vocab], the expert of each id. Mu can choose another only if there is a router.
        routed = any(layer.router is not None for layer in layers)
        self._own = torch.stack(tables).to(torch.uint8) if tables and routed else None
        self._offsets = torch.arange(len(layers), device=model.device)[:, None] * self._shape[1]
        self._counts = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.int64, device=model.device)
        self._reroutes = torch.zeros(len(layers), dtype=torch.int64, device=model.device)
        self._steps: list[tuple[Tensor, Tensor | list[Tensor]]] = []
        self._num_tokens = 0
        self._experts: list[Tensor] = []
        self._norms: list[tuple[Tensor | None, Tensor | None]] = []
        self._rows: Tensor | None = None
        self.on_layer: Callable[[], None] | None = None

    def reset(self) -> None:
        """Count from zero."""
        self._steps.clear()
        self._num_tokens = 0
        self._counts.zero_()
        self._reroutes.zero_()

    def begin(self, rows: Tensor | None) -> None:
        """Expect the layers of one step; `rows` int64 [R] are the tokens to report."""
        self._experts, self._norms, self._rows = [], [], rows

    def __call__(self, state: LayerState) -> None:
        """Observe one layer."""
        if self.on_layer is not None:
            self.on_layer()
        if state.experts is not None:
            self._experts.append(state.experts)
        if self._rows is not None:
            self._norms.append((_norms(state.mu, self._rows), _norms(state.velocity, self._rows)))

    def end(self, input_ids: Tensor) -> list[TokenDynamics]:
        """Count the step's tokens, int64 [T]; report those of its `rows`."""
        if self._experts:
            self.add(input_ids, self._experts)
        if self._rows is None:
            return []
        ids = input_ids[self._rows]
        chosen = [experts[self._rows] for experts in self._experts]
        experts = torch.stack(chosen) if chosen else ids.new_zeros((0, len(ids)))  # [layers, R]
        own = experts if self._own is None else self._own[:, ids]
        rerouted = (experts != own).T.tolist()
        mu, velocity = (_columns([pair[side] for pair in self._norms], len(ids)) for side in (0, 1))
        return [
            TokenDynamics(
                input_token_id=token_id, experts=used, rerouted=rerouted[n], mu_norm=mu[n], velocity_norm=velocity[n]
            )
            for n, (token_id, used) in enumerate(zip(ids.tolist(), experts.T.tolist(), strict=True))
        ]

    def add(self, ids: Tensor, experts: Tensor | list[Tensor]) -> None:
        """Count a step's tokens, int64 [T], and their experts, int64 [layers, T] or a [T] per layer."""
        self._steps.append((ids, experts))
        self._num_tokens += len(ids)
        if len(self._steps) == MAX_STEPS or self._num_tokens >= MAX_TOKENS:
            self._fold()

    def count(self) -> tuple[list[list[int]], list[int]]:
        """Return the tokens so far of each layer's experts, and each layer's rerouted tokens; empty without experts."""
        self._fold()
        tokens: list[list[int]] = self._counts.view(self._shape).tolist()
        return tokens, self._reroutes.tolist() if tokens else []

    @torch.inference_mode()
    def _fold(self) -> None:
        """Count the collected steps; many at once cost hardly more than one."""
        if not self._steps:
            return
        ids = torch.cat([ids for ids, _ in self._steps])
        layers = zip(*(experts for _, experts in self._steps), strict=True)
        experts = torch.stack([torch.cat(layer) for layer in layers])  # [layers, T]
        self._steps.clear()
        self._num_tokens = 0
        places = (experts + self._offsets).flatten()
        self._counts.scatter_add_(0, places, torch.ones_like(places))
        if self._own is not None:
            self._reroutes += (experts != self._own[:, ids]).sum(dim=1)


def _norms(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """Compute Euclidean norms of some rows of [T, H]: FP32 [R]."""
    if values is None:
        return None
    # A GPU's order of summation depends on the number of rows; FP64 hides that in FP32 results.
    norms: Tensor = torch.linalg.vector_norm(values[rows], dim=-1, dtype=torch.float64).float()
    return norms


def _columns(layers: list[Tensor | None], rows: int) -> list[list[float]]:
    """Turn an [R] per layer into a list per row, empty if the network lacks the value."""
    known = [layer for layer in layers if layer is not None]
    columns: list[list[float]] = torch.stack(known, dim=1).tolist() if known else [[]] * rows
    return columns
