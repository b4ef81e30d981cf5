"""The demo model's network as it is trained: its starting values, and how its routers learn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyllm.model import DeepConfig, DeepForCausalLM
from pyllm.model.backend import Backend
from pyllm.model.demo.data import CONTEXT, SEED, VOCAB
from pyllm.model.parameters import BASE_EXPERT_SCORE, DeepLayer

REROUTED = 0.04
"""The share of tokens that each layer's mu is drawn to send to another expert than their id's."""
SOFTNESS = 4.0
"""Divides the routers' scores where they get a gradient: undivided, the id's expert would get all of it."""


def config(hidden: int = 192, layers: int = 6, width: int = 768) -> DeepConfig:
    """The shape of the demo model."""
    return DeepConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip


class TrainingBackend(Backend):
    """Plain torch, in which the choice of an expert has a gradient, and a penalty while mu changes too few choices."""

    def __init__(self) -> None:
        self.penalties: list[Tensor] = []
        self.rerouted: list[float] = []

    def routed_mlp(
        self, layer: DeepLayer, x: Tensor, input_ids: Tensor, mu: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As in the parent; the values are the same, but the chosen expert's share of the scores gets a gradient."""
        mixed, experts = super().routed_mlp(layer, x, input_ids, mu)
        assert experts is not None
        assert mu is not None
        assert layer.router is not None
        assert layer.token_to_expert is not None
        own = F.one_hot(layer.token_to_expert[input_ids], len(layer.router)).bool()
        scores = F.linear(mu, layer.router)
        margins = scores.masked_fill(own, -math.inf).amax(-1) - scores[own] - BASE_EXPERT_SCORE
        self.rerouted.append((margins > 0).float().mean().item())
        eager = margins.topk(max(1, int(REROUTED * len(margins)))).values
        self.penalties.append(F.relu(1.0 - eager).mean())
        share = ((scores + BASE_EXPERT_SCORE * own) / SOFTNESS).softmax(-1).gather(1, experts[:, None])
        return x + (mixed - x) * (1 + share - share.detach()), experts


def new_model(shape: DeepConfig) -> DeepForCausalLM:
    """The network with its starting values."""
    torch.manual_seed(SEED)
    model = DeepForCausalLM(shape)
    hidden = shape.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.split(".")[-1]
            if "norm" in last:
                parameter.fill_(1.0)
            elif last in ("mu", "controller_bias"):
                parameter.zero_()
            elif last == "controller_out_bias":  # alpha 0.9, beta 0.1, gate 0.5
                starts = (math.log(9.0), math.log(math.expm1(0.1)), 0.0)
                parameter.copy_(torch.tensor(starts).repeat_interleave(hidden))
            else:
                deep = math.sqrt(2 * shape.num_hidden_layers) if last in ("o_proj", "down") else 1.0
                nn.init.normal_(parameter, std=0.02 / deep)
                if last == "kqv_proj":
                    parameter[:, hidden:].mul_(0.2)
                elif last == "controller_out":
                    parameter.mul_(0.2)
        for layer in model.layers:
            assert isinstance(layer.token_to_expert, Tensor)
            layer.token_to_expert.copy_(torch.arange(shape.vocab_size) % shape.experts)
    return model
