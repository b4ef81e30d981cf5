"""The family's network, written once over flat tokens.

The tokens of all sequences of a step are concatenated in `[T, H]`; the attention metadata says which tokens attend to
which. `Backend` (in `backend.py`) has the operations that differ by device, and its `route` chooses experts; a layer's
class and optional parameters hold the differences between eras. The residual stream, norms, velocity, the dynamics'
element-wise part and the routing are FP32 in every mode; products run in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .backend import AttentionMetadata, Backend
from .config import Architecture, DeepConfig
from .files import CheckpointError
from .parameters import DeepLayer, DynamicsLayer, GuidedLayer


class LayerState(NamedTuple):
    """The results of one layer. The layers above overwrite the tensors, so an observer must copy what it keeps."""

    layer: int
    hidden: Tensor  # [T, H], the residual stream after the layer
    mu: Tensor | None  # [T, H]; None if the era has none
    velocity: Tensor | None  # [T, H], after the layer; None if the era has none
    experts: (
        Tensor | None
    )  # int64 [T]; None for a dense MLP, and where `DeepLayer.routes` already determines the experts


Observer = Callable[[LayerState], None]


class DeepNetwork(nn.Module):
    """A network of the family; its parameters are uninitialised until the loader fills them.

    Raises `CheckpointError` for a configuration that no network of the family has.
    """

    def __init__(
        self,
        config: DeepConfig,
        architecture: Architecture | None = None,  # the latest by default
        *,
        dtype: torch.dtype = torch.float32,  # of the large matrices and of their products
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        arch = architecture or Architecture.latest(config)
        if config.hidden_act == "relu" and config.use_token_routed_mlp and arch.mu and not arch.mu_guidance:
            raise CheckpointError("hidden_act 'relu' exists for the dense MLP only (use_token_routed_mlp: false).")
        self.config = config
        self.architecture = arch
        self.ops = Backend()
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.lm_head = self.embed_tokens if arch.tied else nn.Parameter(torch.empty_like(self.embed_tokens))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device))
        self.mu_init = nn.Parameter(torch.empty(config.hidden_size, device=device)) if arch.mu_guidance else None
        kind = GuidedLayer if arch.mu_guidance else DynamicsLayer if arch.mu else DeepLayer
        layers = (kind(config, arch, index, dtype, device) for index in range(config.num_hidden_layers))
        self.layers = cast("Sequence[DeepLayer]", nn.ModuleList(layers))
        # Arithmetic on the meta device would import sympy: a second, and 140 MiB.
        real = torch.device("cpu") if device.type == "meta" else device
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=real) / config.head_dim
        self.register_buffer("inv_freq", (1.0 / config.rope_theta**half).to(device), persistent=False)
        self.inv_freq: Tensor

    @property
    def active_parameters(self) -> int:
        """How many parameters are used to compute one token; the embedding counts once, as in the total."""
        config, arch = self.config, self.architecture
        unused = config.experts - max(1, arch.routes)
        expert = 3 * config.hidden_size * config.expert_size + (config.expert_size if arch.channel_modulation else 0)
        everything = sum(parameter.numel() for parameter in self.parameters())
        return everything - config.num_hidden_layers * unused * expert

    @property
    def sizes(self) -> str:
        """The network's sizes in words."""
        config, arch = self.config, self.architecture
        mlp = f"an MLP of width {config.expert_size}"
        if config.use_token_routed_mlp:
            used = f"{max(1, arch.routes)} of {config.experts} experts of width {config.expert_size}"
            mlp = f"a shared expert of width {arch.shared_expert_size} and {used}" if arch.shared_expert_size else used
        return (
            f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads with "
            f"{config.num_key_value_heads} for keys and values, {mlp}, a vocabulary of {config.vocab_size:,}"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def forward(
        self,
        input_ids: Tensor,  # int64 [T]
        positions: Tensor,  # int64 [T], of each token in its own sequence
        attention: AttentionMetadata,
        kv_cache: Tensor | None = None,  # [layers, 2, blocks, block_size, kv_heads, D]; None for whole sequences
        observer: Observer | None = None,  # called after each layer
    ) -> Tensor:
        """Run the network over the flat tokens of one step -> FP32 [T, H] after the final norm, for `logits`."""
        ops = self.ops
        angles = positions[:, None].float() * self.inv_freq  # [T, D/2]
        rope = angles.cos(), angles.sin()
        x = ops.embed(input_ids, self.embed_tokens)
        velocity: Tensor | None = None  # zero for every token
        mu: Tensor | None = None
        mu_below = None if self.mu_init is None else self.mu_init.expand_as(x).contiguous()
        residual_mu: Tensor | None = None
        for layer in self.layers:
            h = ops.attention(layer, x, mu_below, rope, kv_cache, attention)
            if isinstance(layer, DynamicsLayer):
                x, velocity, mu = ops.dynamics(layer, x, h, velocity)
            else:
                x = x + h
            x, experts = ops.routed_mlp(layer, x, input_ids, mu)  # experts: see `Backend.route`
            if isinstance(layer, GuidedLayer):  # mu comes after the MLP and is bounded twice
                mu = layer.mu.clamp(0.0, 2.0) + ops.linear(x, layer.mu_guidance_proj)
                mu_below = mu = mu.clamp(-2.0, 2.0)
            elif self.architecture.mu_highway and mu is not None:
                mu_below, residual_mu = ops.highway(mu, residual_mu)
            else:
                mu_below = mu
            if observer is not None:
                observer(LayerState(layer.index, x, mu, velocity, experts))
        return ops.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [N, H] -> FP32 [N, vocab]."""
        scores, divisor = self.ops.linear(hidden, self.lm_head), self.config.logit_divisor
        return scores if divisor == 1.0 else scores / divisor

    def new_kv_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeroed pages [layers, 2, num_blocks, block_size, kv_heads, D] in `dtype` or the model's, on its device."""
        config = self.config
        shape = (config.num_hidden_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        return self.ops.new_kv_cache(shape, dtype or self.dtype, self.device)
