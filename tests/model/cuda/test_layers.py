"""Products, norms, dynamics and experts on Triton kernels against plain torch, each operation alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.checkpoints import TINY, random_model

from pyllm.model import Architecture, DeepConfig, DeepForCausalLM
from pyllm.model.backend import Backend
from pyllm.model.cuda import backend as cuda
from pyllm.model.parameters import DeepLayer

SMALL = replace(
    TINY, vocab_size=60, hidden_size=48, intermediate_size=104, num_attention_heads=2, num_key_value_heads=1,
    num_hidden_layers=2, dynamics_controller_hidden=10,
)  # fmt: skip
TOKENS = [1, 3, 5, 17, 33]
DTYPES = [torch.float32, torch.bfloat16]


def make(config: DeepConfig, dtype: torch.dtype, architecture: Architecture | None = None) -> DeepForCausalLM:
    exact = random_model(config, seed=3, architecture=architecture)
    model = DeepForCausalLM(config, exact.architecture, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    return model


def layer_of(model: DeepForCausalLM) -> DeepLayer:
    layer = model.layers[1]
    assert isinstance(layer, DeepLayer)
    return layer


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def near(ours: torch.Tensor, true: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.isfinite().all()
    assert (ours.float() - true).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-2) * true.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 19, 40])
def test_linear(tokens, dtype):
    model = make(SMALL, dtype)
    x = noise(tokens, 48)
    near(cuda.TritonBackend(model).linear(x, model.lm_head), Backend().linear(x, model.lm_head), dtype)


def test_embedding_and_norm():
    model = make(SMALL, torch.bfloat16)
    ops, ids = cuda.TritonBackend(model), torch.tensor([0, 59, 7, 7])
    assert torch.equal(ops.embed(ids, model.embed_tokens), Backend().embed(ids, model.embed_tokens))
    assert torch.equal(ops.embed(torch.tensor([-1]), model.embed_tokens), torch.zeros(1, 48))
    x = noise(3, 48) * 1e-3
    near(ops.rms_norm(x, model.norm, 1e-6), Backend().rms_norm(x, model.norm, 1e-6), torch.float32)


@pytest.mark.parametrize("contextual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_dynamics_and_highway_through_two_layers(tokens, dtype, contextual):
    latest = Architecture.latest(SMALL)
    other = replace(latest, contextual_mu=False, mu_attention=False, mu_highway=False, mu_router=False)
    model = make(SMALL, dtype, latest if contextual else other)
    layer = layer_of(model)
    x, h, again = noise(tokens, 48), noise(tokens, 48) * 3, noise(tokens, 48) * 2
    results = []
    for ops in (Backend(), cuda.TritonBackend(model)):
        stream, velocity, mu = ops.dynamics(layer, x.clone(), h, None)
        one = [t.clone() for t in (stream, velocity, mu)]
        below, residual = ops.highway(mu, None)
        one += [below.clone(), residual.clone()]
        stream, velocity, mu = ops.dynamics(layer, stream, again, velocity)
        below, residual = ops.highway(mu, residual)
        results.append([*one, stream, velocity, mu, below, residual])
    for ours, true in zip(results[1], results[0], strict=True):
        near(ours, true, dtype)


def test_velocity_and_beta_are_bounded():
    model = make(SMALL, torch.float32)
    layer = layer_of(model)
    with torch.no_grad():
        assert layer.controller_out_bias is not None
        layer.controller_out_bias.add_(60.0)
    h = noise(3, 48) * 20
    stream, velocity, _ = cuda.TritonBackend(model).dynamics(layer, noise(3, 48), h, noise(3, 48) * 9)
    expected = Backend().dynamics(layer, noise(3, 48), h, noise(3, 48) * 9)
    assert velocity.abs().max() == 10.0
    near(stream, expected[0], torch.float32)


@pytest.mark.parametrize("variant", [
    {}, {"hidden_act": "gelu", "num_experts": 3}, {"use_token_routed_mlp": False, "hidden_act": "relu"},
    {"num_experts": 8}, {"hidden_size": 40, "intermediate_size": 100},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 4, 5, 65])
def test_routed_mlp(tokens, variant):
    config = replace(SMALL, **variant)
    model = make(config, torch.float32)
    layer = layer_of(model)
    x, mu = noise(tokens, config.hidden_size), noise(tokens, config.hidden_size) * 2
    ids = torch.arange(tokens) * 7 % config.vocab_size
    expected, experts = Backend().routed_mlp(layer, x, ids, mu)
    out, ours = cuda.TritonBackend(model).routed_mlp(layer, x.clone(), ids, mu)
    near(out, expected, torch.float32)
    if experts is None:
        assert ours is None
    else:
        assert torch.equal(ours, experts)
        assert tokens < 5 or len(experts.unique()) > 1
        assert tokens < 65 or not torch.equal(experts, ids % config.num_experts), "mu moves some"


@pytest.mark.parametrize("tokens", [16, 30, 130])
def test_routed_mlp_in_bf16(tokens):
    model = make(SMALL, torch.bfloat16)
    x, ids = noise(tokens, 48), torch.arange(tokens) % 60
    mu = noise(tokens, 48) * 0.01
    expected, experts = Backend().routed_mlp(layer_of(model), x, ids, mu)
    out, ours = cuda.TritonBackend(model).routed_mlp(layer_of(model), x.clone(), ids, mu)
    assert torch.equal(ours, experts)
    near(out - x, expected - x, torch.bfloat16)


@pytest.mark.parametrize("used", [[2], [0, 3]], ids=str)
def test_experts_without_tokens_cost_nothing_and_break_nothing(used):
    """Sorted, with all tokens at one or two experts."""
    model = make(SMALL, torch.float32, replace(Architecture.latest(SMALL), mu_router=False))
    x, ids = noise(70, 48), torch.tensor(used)[torch.arange(70) * 3 // 2 % len(used)]
    expected, _ = Backend().routed_mlp(layer_of(model), x, ids, None)
    out, _ = cuda.TritonBackend(model).routed_mlp(layer_of(model), x.clone(), ids, None)
    near(out, expected, torch.float32)


@pytest.mark.parametrize("tokens", [6, 300])
def test_padding_rows_reach_no_expert(tokens, monkeypatch):
    """Three hundred: two blocks of the sort, whose second counts what the first holds."""
    model = make(replace(SMALL, hidden_size=16, intermediate_size=64), torch.float32)
    x, mu, ids = noise(tokens, 16), noise(tokens, 16), torch.arange(tokens) % 60
    ids[1::3] = -1
    monkeypatch.setattr(cuda.Blocks, "experts", lambda self, tokens: (16, 16, {"BLOCK_M": 64, "BLOCK_K": 16}))
    out, experts = cuda.TritonBackend(model).routed_mlp(layer_of(model), x.clone(), ids, mu)
    real = ids >= 0
    expected, true = Backend().routed_mlp(layer_of(model), x[real], ids[real], mu[real])
    assert experts is not None
    assert experts[~real].eq(-1).all()
    assert torch.equal(experts[real], true)
    near(out[real], expected, torch.float32)
    assert torch.equal(out[~real], x[~real])


@pytest.mark.parametrize("tokens", [3, 70])
def test_shared_expert_adds_to_the_routed_one(tokens):
    era = replace(
        Architecture.latest(SMALL), contextual_mu=False, mu_highway=False, mu_router=False,
        mu_guidance=True, shared_expert_size=24,
    )  # fmt: skip
    model = make(SMALL, torch.float32, era)
    x, ids = noise(tokens, 48), torch.arange(tokens) % 60
    expected, _ = Backend().routed_mlp(layer_of(model), x, ids, None)
    out, _ = cuda.TritonBackend(model).routed_mlp(layer_of(model), x.clone(), ids, None)
    near(out, expected, torch.float32)
