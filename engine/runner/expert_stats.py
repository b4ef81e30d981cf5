"""What the network does, seen from outside: which experts work, and what mu and velocity are for single tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...model.layer import DeepLayer
from ...model.network import DeepForCausalLM, LayerState
from ..messages import TokenDynamics

MAX_STEPS = 256
MAX_TOKENS = 65536
"""Most steps, and most tokens of them, that are kept to be counted together."""


class ExpertStats:
    """An observer of the network: counts the experts of all tokens, and looks closely at some.

    It counts where the network computes, and waits for that only when somebody wants to know.

    `on_layer`, where it is set, is called when a layer is done.
    """

    def __init__(self, model: DeepForCausalLM) -> None:
        layers = [layer for layer in model.layers if isinstance(layer, DeepLayer)]
        tables = [layer.token_to_expert for layer in layers if layer.token_to_expert is not None]
        num_experts = model.config.experts if tables else 0
        # [layers, vocab]: whose id is whose. Mu can change that only where there is a router.
        routed = any(layer.router is not None for layer in layers)
        self._own = torch.stack(tables).to(torch.uint8) if tables and routed else None
        self._offsets = torch.arange(len(layers), device=model.device)[:, None] * num_experts
        self._counts = torch.zeros(len(layers) * num_experts, dtype=torch.int64, device=model.device)
        self._reroutes = torch.zeros(len(layers), dtype=torch.int64, device=model.device)
        self._shape = len(tables), num_experts
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
        """Expect the layers of one step; `rows` int64 [R] are the tokens to look at closely."""
        self._experts, self._norms, self._rows = [], [], rows

    def __call__(self, state: LayerState) -> None:
        """Take note of one layer."""
        if self.on_layer is not None:
            self.on_layer()
        if state.experts is not None:
            self._experts.append(state.experts)
        if self._rows is not None:
            self._norms.append((_norms(state.mu, self._rows), _norms(state.velocity, self._rows)))

    def count(self) -> tuple[list[list[int]], list[int]]:
        """Return the tokens so far of each layer's experts, and each layer's rerouted tokens; empty without experts."""
        self._fold()
        tokens: list[list[int]] = self._counts.view(self._shape).tolist()
        return tokens, self._reroutes.tolist() if tokens else []

    def take(self, ids: Tensor, experts: Tensor | list[Tensor]) -> None:
        """Take the experts, int64 [layers, T] or as many [T], of a step's tokens, int64 [T], into account."""
        self._steps.append((ids, experts))
        self._num_tokens += len(ids)
        if len(self._steps) == MAX_STEPS or self._num_tokens >= MAX_TOKENS:
            self._fold()

    @torch.inference_mode()
    def _fold(self) -> None:
        """Count the steps so far; many at once cost hardly more than one."""
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

    def end(self, input_ids: Tensor) -> list[TokenDynamics]:
        """Take the step's tokens, int64 [T], into account; return what was seen of each of its `rows`."""
        if self._experts:
            self.take(input_ids, self._experts)
        if self._rows is None:
            return []
        ids = input_ids[self._rows]
        chosen = [experts[self._rows] for experts in self._experts]
        experts = torch.stack(chosen) if chosen else ids.new_zeros((0, len(ids)))  # [layers, R]
        rerouted = (
            experts != self._own[:, ids] if self._own is not None else torch.zeros_like(experts, dtype=torch.bool)
        )
        mu, velocity = (_columns([pair[side] for pair in self._norms]) for side in (0, 1))
        return [
            TokenDynamics(
                input_token_id=token_id,
                experts=experts[:, n].tolist(),
                rerouted=rerouted[:, n].tolist(),
                mu_norm=mu[n] if mu else [],
                velocity_norm=velocity[n] if velocity else [],
            )
            for n, token_id in enumerate(ids.tolist())
        ]


def _norms(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """Euclidean norms of some rows of [T, H]: FP32 [R]."""
    if values is None:
        return None
    # A GPU adds up in an order that depends on how many rows there are: so much finer, that cannot be seen.
    norms: Tensor = torch.linalg.vector_norm(values[rows], dim=-1, dtype=torch.float64).float()
    return norms


def _columns(layers: list[Tensor | None]) -> list[list[float]]:
    """From one [R] per layer to one list per row; none where the network has no such thing."""
    known = [layer for layer in layers if layer is not None]
    columns: list[list[float]] = torch.stack(known, dim=1).tolist() if known else []
    return columns
