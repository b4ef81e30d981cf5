"""What the network does, seen from outside: which experts work, and what mu and velocity are for single tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.layer import DeepLayer
from ..model.network import DeepForCausalLM, LayerState
from .messages import TokenDynamics

Ints = npt.NDArray[np.int64]
MAX_STEPS = 256
"""Steps whose tokens are kept to be counted together."""


class Watcher:
    """An observer of the network: counts the experts of all tokens, and looks closely at some.

    Attributes (as of the last `count`):
        expert_tokens: int64 [layers, experts], tokens that each expert has computed; [layers, 0] without experts.
        reroutes: int64 [layers], tokens for which mu chose another expert than their id's.
    """

    def __init__(self, model: DeepForCausalLM) -> None:
        layers = [layer for layer in model.layers if isinstance(layer, DeepLayer)]
        tables = [layer.token_to_expert for layer in layers if layer.token_to_expert is not None]
        num_experts = model.config.experts if tables else 0
        # [layers, vocab]: whose id is whose. Mu can change that only where there is a router.
        own = torch.stack(tables).to(torch.uint8).cpu().numpy() if tables else None
        self._own = own if any(layer.router is not None for layer in layers) else None
        self._offsets = np.arange(len(layers))[:, None] * num_experts
        self.expert_tokens: Ints = np.zeros((len(layers), num_experts), np.int64)
        self.reroutes: Ints = np.zeros(len(layers), np.int64)
        self._steps: list[tuple[Tensor, list[Tensor]]] = []
        self._experts: list[Tensor] = []
        self._norms: list[tuple[Tensor | None, Tensor | None]] = []
        self._rows: Tensor | None = None

    def reset(self) -> None:
        """Count from zero."""
        self.count()
        self.expert_tokens[:] = 0
        self.reroutes[:] = 0

    def begin(self, rows: Tensor | None) -> None:
        """Expect the layers of one step; `rows` int64 [R] are the tokens to look at closely."""
        self._experts, self._norms, self._rows = [], [], rows

    def __call__(self, state: LayerState) -> None:
        """Take note of one layer."""
        if state.experts is not None:
            self._experts.append(state.experts)
        if self._rows is not None:
            self._norms.append((_norms(state.mu, self._rows), _norms(state.velocity, self._rows)))

    def count(self) -> None:
        """Bring the counts up to date; many steps at once cost hardly more than one."""
        if not self._steps:
            return
        ids = torch.cat([ids for ids, _ in self._steps]).cpu().numpy()
        layers = zip(*(experts for _, experts in self._steps), strict=True)
        experts = torch.stack([torch.cat(layer) for layer in layers]).cpu().numpy()  # [layers, T]
        self._steps.clear()
        counts = np.bincount((experts + self._offsets).ravel(), minlength=self.expert_tokens.size)
        self.expert_tokens += counts.reshape(self.expert_tokens.shape)
        if self._own is not None:
            self.reroutes += (experts != self._own[:, ids]).sum(axis=1)

    def end(self, input_ids: Tensor) -> list[TokenDynamics]:
        """Take the step's tokens, int64 [T], into account; return what was seen of each of its `rows`."""
        if self._experts:
            self._steps.append((input_ids, self._experts))
            if len(self._steps) == MAX_STEPS:
                self.count()
        if self._rows is None:
            return []
        ids = input_ids[self._rows].cpu().numpy()
        chosen = [tensor[self._rows].cpu().numpy() for tensor in self._experts]
        experts = np.stack(chosen) if chosen else np.zeros((0, len(ids)), np.int64)  # [layers, R]
        rerouted = experts != self._own[:, ids] if self._own is not None else np.zeros(experts.shape, np.bool_)
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
    return None if values is None else torch.linalg.vector_norm(values[rows], dim=-1)


def _columns(layers: list[Tensor | None]) -> list[list[float]]:
    """From one [R] per layer to one list per row; none where the network has no such thing."""
    known = [layer for layer in layers if layer is not None]
    columns: list[list[float]] = torch.stack(known, dim=1).tolist() if known else []
    return columns
