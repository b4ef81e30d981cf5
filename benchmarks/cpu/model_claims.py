"""The speed claims that the model cards of this family make of its design, measured.

    python benchmarks/cpu/model_claims.py                  # 150M shape, BF16, plain torch

- fused: keys, queries and values of x and mu as one product against six (claimed 2x); gate and up as one against two
  (claimed 1.3x)
- routing: the expert of each token by its id, alone and as the network does it with mu, against a learned top-k router
  (claimed under 0.1 ms against 5 to 10)
- forward: the whole network against the same one with a learned top-1 router, which computes as many experts (claimed
  40 ms against 50)
- shares: ids per expert (claimed exactly a quarter), and tokens of a text per expert in the demo model

Times are medians in milliseconds, ratios are claimed-slower ÷ claimed-faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.benchmarks.checkpoint import SHAPES, write_shape
from pyllm.benchmarks.cpu.in_process import median_seconds
from pyllm.benchmarks.measure import VOCAB_SIZE, report
from pyllm.model import DeepForCausalLM
from pyllm.model.backend import AttentionMetadata, Backend
from pyllm.model.checkpoint.loader import load_checkpoint
from pyllm.model.config import DeepConfig
from pyllm.model.network import LayerState
from pyllm.model.parameters import DeepLayer
from pyllm.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 30


class LearnedRouter(Backend):
    """A network whose experts are chosen by softmax and top-1 of a learned product."""

    def route(self, layer: DeepLayer, input_ids: Tensor, mu: Tensor | None) -> Tensor | None:
        """Top-1, so that as many experts are computed."""
        assert mu is not None
        assert layer.router is not None
        return learned(mu, layer.router, 1)[0]


def learned(x: Tensor, router: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The experts of each token by a learned router, and their weights: x [T, H], router [E, H]."""
    weights, experts = F.linear(x, router).softmax(dim=-1).topk(top)
    return experts.squeeze(-1), weights / weights.sum(dim=-1, keepdim=True)


def pair(slow: float, fast: float) -> dict[str, float]:
    """Two times and their ratio."""
    return {"slow_ms": round(1000 * slow, 4), "fast_ms": round(1000 * fast, 4), "ratio": round(slow / fast, 2)}


def products(config: DeepConfig, tokens: int) -> dict[str, Any]:
    """Fused products against separate ones."""
    hidden, wide = config.hidden_size, config.expert_size
    kv = config.num_key_value_heads * config.head_dim

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns).bfloat16()

    x, mu = weight(tokens, hidden), weight(tokens, hidden)
    parts = [(weight(rows, hidden), weight(rows, hidden)) for rows in (kv, hidden, kv)]
    kqv = torch.cat([torch.cat(part, dim=1) for part in parts])
    gate, up = weight(wide, hidden), weight(wide, hidden)
    gate_up = torch.cat((gate, up))
    return {
        "mu_kqv": pair(
            median_seconds(lambda: [F.linear(x, of_x) + F.linear(mu, of_mu) for of_x, of_mu in parts], REPEATS),
            median_seconds(lambda: F.linear(torch.cat((x, mu), dim=1), kqv), REPEATS),
        ),
        "gate_up": pair(
            median_seconds(lambda: (F.linear(x, gate), F.linear(x, up)), REPEATS),
            median_seconds(lambda: F.linear(x, gate_up).chunk(2, dim=1), REPEATS),
        ),
    }


def routing(model: DeepForCausalLM, tokens: int) -> dict[str, float]:
    """Milliseconds to choose the experts of `count` tokens, in one layer."""
    layer = model.layers[1]
    assert isinstance(layer, DeepLayer)
    assert layer.token_to_expert is not None
    table, router = layer.token_to_expert, layer.router
    assert router is not None
    ids, mu = torch.randint(VOCAB_SIZE, (tokens,)), torch.randn(tokens, model.config.hidden_size)
    ways = {
        "by_id": lambda: table[ids],
        "by_id_and_mu": lambda: Backend().route(layer, ids, mu),
        "learned_top_2": lambda: learned(mu, router, 2),
    }
    return {name: round(1000 * median_seconds(way, REPEATS), 4) for name, way in ways.items()}


def forward(model: DeepForCausalLM, tokens: int) -> dict[str, float]:
    """The whole network on one prompt, with a learned router and with its own."""
    ids, positions = torch.randint(VOCAB_SIZE, (tokens,)), torch.arange(tokens)
    metadata = AttentionMetadata.without_cache([tokens])
    times = []
    for ops in (LearnedRouter(), Backend()):
        model.ops = ops
        times.append(median_seconds(lambda: model(ids, positions, metadata), 5))
    return pair(*times)


def shares(text: str) -> dict[str, list[float]]:
    """Share of each expert among the ids and among the tokens of a text, in the demo model, all layers together."""
    folder = ROOT / "model" / "demo"
    model, _ = load_checkpoint(
        folder, network=DeepForCausalLM, dtype=torch.float32, device=torch.device("cpu"), progress=False
    )
    ids = Tokenizer.from_folder(folder).encode(text)[: model.config.max_position_embeddings]
    chosen: list[Tensor] = []

    def watch(state: LayerState) -> None:
        assert state.experts is not None
        chosen.append(state.experts)

    model(torch.tensor(ids), torch.arange(len(ids)), AttentionMetadata.without_cache([len(ids)]), observer=watch)
    tables = [layer.token_to_expert for layer in model.layers if isinstance(layer, DeepLayer)]

    def share(experts: Tensor) -> list[float]:
        return [round(n / experts.numel(), 4) for n in experts.bincount(minlength=model.config.experts).tolist()]

    return {
        "ids": share(torch.cat([table for table in tables if table is not None])),
        "tokens": share(torch.cat(chosen)),
    }


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="in a step")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as name:
        write_shape(Path(name), args.shape)
        model, _ = load_checkpoint(
            Path(name),
            network=DeepForCausalLM,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            load_format="dummy",
            progress=False,
        )
    results = {
        str(tokens): products(config, tokens)
        | {"routing_ms": routing(model, tokens), "forward": forward(model, tokens)}
        for tokens in args.tokens
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    report("model_claims", {"shape": args.shape, "threads": torch.get_num_threads(), "tokens": results,
                            "shares": shares(text)})  # fmt: skip


if __name__ == "__main__":
    main()
