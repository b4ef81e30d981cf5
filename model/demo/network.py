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

EMBEDDING_STD = 0.06
"""Large enough for what is copied to stand out among the scores of all tokens."""
FAST, SLOW = 1 / 6, 1 / 3
"""Shares of the rotary pairs, the fastest first: those that tell neighbours apart; where those that do not begin."""


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
            elif last == "embed_tokens":
                nn.init.normal_(parameter, std=EMBEDDING_STD)
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
        if len(model.layers) > 2:
            _build_induction(model)
    return model


def _build_induction(model: DeepForCausalLM) -> None:
    """Let the network copy before it is trained: an induction head (Olsson et al., 2022) in the second and third layer.

    A head of the second layer looks at the token before and writes which one it was next to the present token; the
    heads of the third look for the token that was preceded by the present one, and predict it. Of sequences that it
    has never seen, the untrained network then repeats 95 % of the tokens. Random weights learned no such heads from
    two million tokens of nothing but copying.
    """
    shape = model.config
    hidden, size, half = shape.hidden_size, shape.head_dim, shape.head_dim // 2
    kv_heads, heads = shape.num_key_value_heads, shape.num_attention_heads
    rotation = nn.init.orthogonal_(torch.empty(hidden, hidden))
    own, before, *values = rotation.split(size)[: 2 + kv_heads]  # what is read and written: [size, hidden] each

    first, second, third = model.layers[:3]
    assert isinstance(first.mu, nn.Parameter)
    nn.init.normal_(first.mu, std=0.3)  # the only input of the second layer that is the same for all tokens
    constant = first.mu / first.mu.square().sum()
    keys, queries, read = second.kqv_proj.split([kv_heads * size, heads * size, kv_heads * size])
    fast = round(FAST * half)
    phase = -model.inv_freq[:fast]  # a query is turned back by one position, so that it meets the key before it
    key, query = torch.zeros(2, size)
    key[:fast], query[:fast], query[half : half + fast] = 1.0, phase.cos(), phase.sin()
    group = heads // kv_heads
    keys[:size] = torch.cat((torch.zeros(size, hidden), key.outer(constant)), dim=1)
    queries[: group * size] = torch.cat((torch.zeros(size, hidden), query.outer(constant)), dim=1).repeat(group, 1)
    read[:size, :hidden] = own
    second.o_proj[:, : group * size] = 0.12 / group * before.T.repeat(1, group)

    slow = torch.arange(size) % half >= SLOW * half  # the pairs that turn too little to blur what a token is
    keys, queries, read = third.kqv_proj.split([kv_heads * size, heads * size, kv_heads * size])
    nothing = torch.zeros(size, hidden)
    keys[:] = torch.cat((before * slow[:, None], nothing), dim=1).repeat(kv_heads, 1)
    queries[:] = torch.cat((own * slow[:, None], nothing), dim=1).repeat(heads, 1)
    read[:, :hidden] = torch.cat(values)
    third.o_proj[:] = 0.5 / group * torch.cat([value.T.repeat(1, group) for value in values], dim=1)
    for layer in (second, third):
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        layer.q_norm.fill_(2.0)
        layer.k_norm.fill_(2.0)
