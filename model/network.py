"""The Complexity-Deep network, written once over flat tokens.

The tokens of all sequences of a step lie one after the other in `[T, H]`; who attends to whom is in
the attention metadata. What differs by device is behind `Backend`; what differs by era of checkpoint
is a parameter that is there or not. The residual stream, norms, velocity, the dynamics' element-wise
part and the routing are FP32 in every mode; products run in the weights' dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backend import AttentionMetadata, Backend
from .config import Architecture, CheckpointError, DeepConfig
from .layer import DeepLayer
from .sampling import SamplingBatch, sample


class LayerState(NamedTuple):
    """What one layer did, for those who watch. The layers above write over it: whoever keeps a tensor copies it.

    Attributes:
        layer: index of the layer.
        hidden: [T, H], the residual stream after the layer.
        mu: [T, H], this layer's mu; None where the era has none.
        velocity: [T, H], after this layer; None where the era has none.
        experts: int64 [T], the expert used; None for a dense MLP.
    """

    layer: int
    hidden: Tensor
    mu: Tensor | None
    velocity: Tensor | None
    experts: Tensor | None


Observer = Callable[[LayerState], None]


class DeepForCausalLM(nn.Module):
    """A Complexity-Deep language model.

    Parameters are created uninitialised; `from_pretrained` and the loader fill them.

    Args:
        config: sizes and constants.
        architecture: what the era of the checkpoint has; by default the latest.
        dtype: of the large matrices and of their products; norms, biases and routing are FP32 always.
        device: where the parameters live.

    Raises:
        CheckpointError: the family has no such network.
    """

    def __init__(
        self,
        config: DeepConfig,
        architecture: Architecture | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        arch = architecture or Architecture.latest(config)
        if config.hidden_act == "relu" and config.use_token_routed_mlp and not arch.mu_guidance:
            raise CheckpointError("hidden_act 'relu' exists for the dense MLP only (use_token_routed_mlp: false).")
        self.config = config
        self.architecture = arch
        self.ops = Backend()
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.lm_head = self.embed_tokens if arch.tied else nn.Parameter(torch.empty_like(self.embed_tokens))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device))
        self.mu_init = nn.Parameter(torch.empty(config.hidden_size, device=device)) if arch.mu_guidance else None
        self.layers = nn.ModuleList(
            DeepLayer(config, arch, index, dtype, device) for index in range(config.num_hidden_layers)
        )
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**half, persistent=False)
        self.inv_freq: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and products."""
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.norm.device

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionMetadata,
        kv_cache: Tensor | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """Run the network over the flat tokens of one step.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], of each token in its own sequence.
            attention: which tokens belong to which sequence and page.
            kv_cache: pages [layers, 2, blocks, block_size, kv_heads, D]; None for whole sequences without a cache.
            observer: called after each layer with what it did.

        Returns:
            FP32 [T, H], after the final norm; `logits` makes scores of it.
        """
        ops = self.ops
        angles = positions[:, None].float() * self.inv_freq  # [T, D/2]
        rope = angles.cos(), angles.sin()
        x = ops.embed(input_ids, self.embed_tokens)
        velocity: Tensor | None = None  # zero for every token
        mu: Tensor | None = None
        mu_below = None if self.mu_init is None else self.mu_init.expand_as(x).contiguous()
        residual_mu: Tensor | None = None
        for layer in self.layers:
            assert isinstance(layer, DeepLayer)  # nn.ModuleList forgets its type
            h = ops.attention(layer, x, mu_below, rope, kv_cache, attention)
            if layer.dynamics_in is not None:
                x, velocity, mu = ops.dynamics(layer, x, h, velocity)
            else:
                x = x + h
            x, experts = ops.routed_mlp(layer, x, input_ids, mu)
            if layer.mu_guidance_proj is not None and layer.mu is not None:
                # The 2026-03 rewrite: mu comes after the MLP and is bounded twice.
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
        return self.ops.linear(hidden, self.lm_head)

    def new_kv_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeroed pages [layers, 2, num_blocks, block_size, kv_heads, D] in `dtype` or the model's, on its device."""
        config = self.config
        shape = (config.num_hidden_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        return self.ops.new_kv_cache(shape, dtype or self.dtype, self.device)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DeepForCausalLM:
        """Load a checkpoint from a folder or a hub id, whatever its era.

        Raises:
            CheckpointError: the checkpoint cannot be found or used; one plain sentence.
        """
        from .checkpoint.hub import resolve_model
        from .checkpoint.loader import load_checkpoint

        model, _ = load_checkpoint(resolve_model(str(name_or_path)), dtype=dtype, device=torch.device(device))
        return model

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        seed: int | None = None,
        eos_token_id: int | tuple[int, ...] | None = None,
        streamer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Continue one prompt, with a KV cache of its own.

        Args:
            input_ids: int64 [T] or [1, T], the prompt; not empty.
            max_new_tokens: most tokens to add.
            temperature: 0 (or `do_sample=False`) is greedy.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set of most likely tokens with this much probability.
            repetition_penalty: divides positive and multiplies negative logits of tokens seen before.
            do_sample: False is greedy, whatever the temperature.
            seed: makes the draws repeatable.
            eos_token_id: id or ids that end the text; None takes the config's.
            streamer: called with each new token id.

        Returns:
            int64, the prompt with its continuation (ending with the end token, if one came), in the prompt's shape.

        Raises:
            ValueError: the prompt is empty or not one sequence.
        """
        flat = input_ids.flatten().to(self.device)
        if input_ids.dim() > 2 or (input_ids.shape[0] != 1 and input_ids.dim() == 2) or not len(flat):
            raise ValueError(f"input_ids must be one prompt of at least one token, got shape {list(input_ids.shape)}.")
        ends = self.config.eos_token_ids if eos_token_id is None else torch.tensor(eos_token_id).flatten().tolist()
        tokens: list[int] = flat.tolist()
        prompt_len = len(tokens)
        block_size = 16
        blocks = -(-(prompt_len + max_new_tokens) // block_size)
        cache = self.new_kv_cache(blocks, block_size)
        table = torch.arange(blocks, device=self.device)[None]
        draw = random.getrandbits(63) if seed is None else seed
        computed = 0
        while len(tokens) < prompt_len + max_new_tokens:
            at = torch.arange(computed, len(tokens), device=self.device)
            count = len(at)
            metadata = AttentionMetadata(
                query_lens=[count], seq_lens=[len(tokens)], num_decodes=int(count == 1), slot_mapping=at,
                block_tables=table,
            )  # fmt: skip
            hidden = self(torch.tensor(tokens[computed:], device=self.device), at, metadata, cache)
            computed = len(tokens)
            batch = SamplingBatch.build(
                temperature=[temperature if do_sample else 0.0], top_k=[top_k], top_p=[top_p],
                repetition_penalty=[repetition_penalty], seed=[draw], position=[computed],
                token_ids=[(tokens, prompt_len)], device=self.device,
            )  # fmt: skip
            token = int(sample(self.logits(hidden[-1:]), batch))
            tokens.append(token)
            if streamer is not None:
                streamer(token)
            if token in ends:
                break
        return torch.tensor(tokens, device=input_ids.device).reshape(*input_ids.shape[:-1], -1)
