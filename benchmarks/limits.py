"""What a step must read and multiply at least, counted from the network's own parameters."""

from __future__ import annotations

import torch

from pyllm.model import DeepForCausalLM
from pyllm.model.config import DeepConfig

MATRICES = ("_proj", "dynamics_in", "controller_v", "controller_out", "gate_up", "down")


def step_bytes(config: DeepConfig, batch: int, context: int, kept: torch.dtype = torch.bfloat16) -> float:
    """The fewest bytes that a decode step of `batch` sequences with `context` tokens each must read.

    Every matrix once: the embedding as LM head, no mu columns in layer 0, norms and router in FP32. Of E experts a
    layer reads only those that a token of the batch goes to; K for each token, spread evenly, hit
    E (1 - (1 - K/E)^batch) of them on average. Keys and values of all tokens so far, in dtype `kept`. Embedding rows,
    activations and what is written are left out: they are small, and counting less makes eta smaller.
    """
    weights = _weights(config)
    read = 1 - (1 - _used(config)) ** batch
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * kept.itemsize
    return sum(weights.values()) - 2 * _expert_weights(config) * (1 - read) + batch * context * kv


def prefill_flops(config: DeepConfig, prompts: int, length: int) -> float:
    """Multiplications and additions of `prompts` prompts: products of active weights, and causal attention."""
    weights = {name: size for name, size in _weights(config).items() if name.endswith(MATRICES)}
    matrices = sum(weights.values()) / 2
    active = matrices - _expert_weights(config) * (1 - _used(config))
    attention = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2
    head = 2 * prompts * config.vocab_size * config.hidden_size
    return prompts * length * (2 * active + attention) + head


def _expert_weights(config: DeepConfig) -> int:
    return config.num_hidden_layers * config.experts * 3 * config.hidden_size * config.expert_size


def _used(config: DeepConfig) -> float:
    """The share of a layer's experts that one token uses."""
    return (config.num_experts_per_tok or 1) / config.experts


def _weights(config: DeepConfig) -> dict[str, int]:
    """Bytes of every parameter in BF16; those of norms and the router in FP32."""
    model = DeepForCausalLM(config, dtype=torch.bfloat16, device="meta")
    return {name: parameter.numel() * parameter.element_size() for name, parameter in model.named_parameters()}
