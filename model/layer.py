"""One layer's parameters, stacked so that each input is multiplied once.

What an era of checkpoints does not have is None. Large matrices are in the model's dtype, [out, in];
norms, biases and the router are FP32 in every mode.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import Architecture, DeepConfig


class DeepLayer(nn.Module):
    """The parameters of one layer; its equations are `DeepForCausalLM.forward` and the operations in `Backend`."""

    token_to_expert: Tensor | None

    def __init__(
        self, config: DeepConfig, arch: Architecture, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_size, q_size = config.num_key_value_heads * head_dim, config.num_attention_heads * head_dim
        self.config = config
        self.index = index
        self.activation = "silu" if arch.mu_guidance else config.hidden_act  # the rewrite knows no other

        def big(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        def small(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        # The first layer of a network with dynamics has no mu from below.
        takes_mu = arch.mu_attention and (index > 0 or arch.mu_guidance)
        self.input_norm = small(hidden)
        self.kqv_proj = big(2 * kv_size + q_size, (2 if takes_mu else 1) * hidden)
        self.q_norm = small(head_dim) if config.use_qk_norm else None
        self.k_norm = small(head_dim) if config.use_qk_norm else None
        self.o_proj = big(hidden, q_size)
        self.post_norm = small(hidden)

        inner = config.dynamics_controller_hidden
        self.contextual_mu = arch.contextual_mu
        self.mu = small(hidden) if arch.dynamics or arch.mu_guidance else None
        self.dynamics_in = big(inner + (hidden if arch.contextual_mu else 0), hidden) if arch.dynamics else None
        self.controller_v = big(inner, hidden) if arch.dynamics else None
        self.controller_bias = small(inner) if arch.dynamics else None
        self.controller_out = big(3 * hidden, inner) if arch.dynamics else None
        self.controller_out_bias = small(3 * hidden) if arch.dynamics else None
        self.mu_guidance_proj = big(hidden, hidden) if arch.mu_guidance else None

        self.router = small(config.experts, hidden) if arch.mu_router else None
        table = torch.empty(config.vocab_size, dtype=torch.int64, device=device)
        self.register_buffer("token_to_expert", table if config.use_token_routed_mlp else None)
        self.gate_up = big(config.experts, 2 * config.expert_size, hidden)
        self.down = big(config.experts, hidden, config.expert_size)
        shared = arch.shared_expert_size
        self.shared_gate_up = big(2 * shared, hidden) if shared else None
        self.shared_down = big(hidden, shared) if shared else None
