"""The parameters of one layer, stacked so that each input is multiplied once, and the constants of its equations.

A tensor that the checkpoint's era lacks is None. Large matrices are [out, in] in the model's dtype; norms, biases and
the router are FP32 in every mode. `Backend` computes with them, and chooses each token's expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import Architecture, DeepConfig

QK_NORM_EPS = 1e-6  # regardless of rms_norm_eps
MAX_BETA = 2.0
MAX_VELOCITY = 10.0
BASE_EXPERT_SCORE = 10.0
HIGHWAY_SHARE = 0.1


class DeepLayer(nn.Module):
    """The parameters that layers of all eras have, and all of the TR-Hash line; a subclass adds those of mu.

    If an id uses several experts, they are columns of one MLP next to the shared expert's: `gate_up` and `down`
    have one matrix, whose columns are the shared ones, then those of each expert.
    """

    token_to_expert: Tensor | None  # int64 [vocab]; None for a dense MLP, and for the TR-Hash line
    scales: Tensor  # FP32 [1 + K], with `routes`: see `output_scales`
    routes: Tensor | None  # int64 [K, vocab], the experts of each id; None if tokens have one expert or a dense MLP

    def __init__(
        self, config: DeepConfig, arch: Architecture, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        # The rewrite and the TR-Hash line support no other activation.
        self.activation = "silu" if arch.mu_guidance or arch.routes else config.hidden_act
        self.contextual_mu = arch.contextual_mu
        self._dtype, self._device = dtype, device

        hidden = config.hidden_size
        head_dim = self.head_dim = config.head_dim
        kv_size, q_size = config.num_key_value_heads * head_dim, config.num_attention_heads * head_dim
        # The first layer of a network with dynamics has no mu from below.
        takes_mu = arch.mu_attention and (index > 0 or arch.mu_guidance)
        self.input_norm = self._small(hidden)
        self.kqv_proj = self._large(2 * kv_size + q_size, (2 if takes_mu else 1) * hidden)
        self.q_norm = self._small(head_dim) if config.use_qk_norm else None
        self.k_norm = self._small(head_dim) if config.use_qk_norm else None
        self.o_proj = self._large(hidden, q_size)
        self.post_norm = self._small(hidden)
        self._add_mu_parameters()
        self.router = self._small(config.experts, hidden) if arch.mu_router else None
        self.shared_width = arch.shared_expert_size
        one = config.use_token_routed_mlp and not arch.routes
        table = torch.empty(config.vocab_size, dtype=torch.int64, device=device)
        self.register_buffer("token_to_expert", table if one else None)
        self.register_buffer("routes", table.new_empty(arch.routes, config.vocab_size) if arch.routes else None)
        mlps, width, shared = config.experts, config.expert_size, arch.shared_expert_size
        if arch.routes:
            mlps, width, shared = 1, shared + mlps * width, 0
            self.register_buffer("scales", torch.tensor(_scales(config, arch, index), device=device), persistent=False)
        self.gate_up = self._large(mlps, 2 * width, hidden)
        self.down = self._large(mlps, hidden, width)
        self.shared_gate_up = self._large(2 * shared, hidden) if shared else None
        self.shared_down = self._large(hidden, shared) if shared else None
        self.output_gates = self._small(2) if arch.output_gates else None  # of the shared and the routed output
        modulated = arch.channel_modulation
        self.channel_scale = self._small(config.experts, config.expert_size) if modulated else None

    def output_scales(self) -> Tensor:
        """The factors of the shared output and of the outputs of an id's experts: FP32 [1 + K]."""
        if self.output_gates is None:
            return self.scales
        return self.scales * self.output_gates[[0] + [1] * (len(self.scales) - 1)]

    def _add_mu_parameters(self) -> None:
        """Add nothing: the TR-Hash line has no mu."""

    def _large(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _small(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self._device))


class DynamicsLayer(DeepLayer):
    """A layer whose controller turns the attention output into mu and velocity: every era but the 2026-03 rewrite."""

    def _add_mu_parameters(self) -> None:
        self.mu = self._small(self.config.hidden_size)
        hidden, inner = self.config.hidden_size, self.config.dynamics_controller_hidden
        self.dynamics_in = self._large(inner + (hidden if self.contextual_mu else 0), hidden)
        self.controller_v = self._large(inner, hidden)
        self.controller_bias = self._small(inner)
        self.controller_out = self._large(3 * hidden, inner)
        self.controller_out_bias = self._small(3 * hidden)


class GuidedLayer(DeepLayer):
    """A layer of the 2026-03 rewrite, which computes mu from its own output."""

    def _add_mu_parameters(self) -> None:
        self.mu = self._small(self.config.hidden_size)
        self.mu_guidance_proj = self._large(self.config.hidden_size, self.config.hidden_size)


def _scales(config: DeepConfig, arch: Architecture, index: int) -> list[float]:
    """The factors of a layer's shared output and of the output of each of an id's experts, the first one first."""

    def of_layer(base: float, first: float | None, last: float | None) -> float:
        if first is None and last is None:
            return base
        first = base if first is None else first
        last = first if last is None else last
        return first + (last - first) * index / max(1, config.num_hidden_layers - 1)

    shared = of_layer(
        config.shared_output_scale, config.shared_output_scale_first_layer, config.shared_output_scale_last_layer
    )
    routed = of_layer(
        config.routed_output_scale, config.routed_output_scale_first_layer, config.routed_output_scale_last_layer
    )
    return [shared, *(routed * weight for weight in route_weights(config, arch.routes))]


def route_weights(config: DeepConfig, routes: int) -> list[float]:
    """Return the weights of the outputs of an id's `routes` experts, the first one first; they add up to 1."""
    primary, others = config.top_k_primary_weight, routes - 1
    if not others:
        return [1.0]
    primary = 1 / routes if primary is None else min(max(primary, 0.0), 1.0)
    return [primary, *[(1 - primary) / others] * others]
