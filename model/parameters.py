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
    """The parameters that layers of all eras have; a subclass adds those that mu is computed with."""

    token_to_expert: Tensor | None  # int64 [vocab]; None for a dense MLP

    def __init__(
        self, config: DeepConfig, arch: Architecture, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.activation = "silu" if arch.mu_guidance else config.hidden_act  # the rewrite supports no other
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
        self.mu = self._small(hidden)
        self._add_mu_parameters()
        self.router = self._small(config.experts, hidden) if arch.mu_router else None
        table = torch.empty(config.vocab_size, dtype=torch.int64, device=device)
        self.register_buffer("token_to_expert", table if config.use_token_routed_mlp else None)
        self.gate_up = self._large(config.experts, 2 * config.expert_size, hidden)
        self.down = self._large(config.experts, hidden, config.expert_size)
        shared = arch.shared_expert_size
        self.shared_gate_up = self._large(2 * shared, hidden) if shared else None
        self.shared_down = self._large(hidden, shared) if shared else None

    def _add_mu_parameters(self) -> None:
        raise NotImplementedError

    def _large(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _small(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self._device))


class DynamicsLayer(DeepLayer):
    """A layer whose controller turns the attention output into mu and velocity: every era but the 2026-03 rewrite."""

    def _add_mu_parameters(self) -> None:
        hidden, inner = self.config.hidden_size, self.config.dynamics_controller_hidden
        self.dynamics_in = self._large(inner + (hidden if self.contextual_mu else 0), hidden)
        self.controller_v = self._large(inner, hidden)
        self.controller_bias = self._small(inner)
        self.controller_out = self._large(3 * hidden, inner)
        self.controller_out_bias = self._small(3 * hidden)


class GuidedLayer(DeepLayer):
    """A layer of the 2026-03 rewrite, which computes mu from its own output."""

    def _add_mu_parameters(self) -> None:
        self.mu_guidance_proj = self._large(self.config.hidden_size, self.config.hidden_size)
