"""The table of sizes in docs/checkpoints.md, computed from the networks themselves, on a device without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.model import DeepConfig
from pyllm.model.config import Architecture
from pyllm.model.network import DeepNetwork

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
TR_HASH: dict[str, Any] = {"mlp_type": "tr_hash_engine", "num_experts_per_tok": 2}
DENSE: dict[str, Any] = {"mlp_type": "swiglu", "use_token_routed_mlp": False}
# Name in the table, parameters as published (0: not published), width, layers, heads, those for keys and values,
# width of all routed experts together or of the dense MLP, more.
PUBLISHED: list[tuple[str, int, int, int, int, int, int, dict[str, Any]]] = [
    ("TR-Hash 100M, o200k", 99_488_960, 384, 10, 8, 2, 128,
     TR_HASH | {"shared_intermediate_size": 1520, "vocab_size": 200_019, "learn_hash_channel_modulation": True}),
    ("TR-Hash 200M", 201_194_368, 896, 16, 14, 2, 256, TR_HASH | {"shared_intermediate_size": 3072}),
    ("TR-Hash 306M", 306_486_564, 1024, 18, 16, 4, 256,
     TR_HASH | {"shared_intermediate_size": 3840, "use_shared_routed_gates": True}),
    ("TR-Hash 306M, dense", 306_486_528, 1024, 18, 16, 4, 4096, DENSE),
    ("TR-Hash 500M", 492_097_536, 1024, 24, 16, 4, 512, TR_HASH | {"shared_intermediate_size": 4864}),
    ("150M", 0, 768, 12, 12, 4, 2048, {"vocab_size": 100_000}),
    ("350M", 0, 1280, 20, 16, 4, 3456, {}),
    ("1.5B", 0, 2048, 24, 16, 8, 5632, {}),
    ("3B", 0, 2560, 32, 32, 8, 6912, {"num_experts": 8}),
    ("7B", 0, 4096, 32, 32, 8, 11008, {"num_experts": 8}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "published", "width", "layers", "heads", "kv_heads", "mlp", "more"),
    PUBLISHED,
    ids=[p[0] for p in PUBLISHED],
)
def test_row_of_the_table(
    name: str, published: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, more: dict[str, Any]
) -> None:
    config = DeepConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, **{"vocab_size": 32_000} | more,
    )  # fmt: skip
    network = DeepNetwork(config, Architecture.latest(config), dtype=torch.bfloat16, device=torch.device("meta"))
    parameters = list(network.parameters())
    total = sum(each.numel() for each in parameters)
    size = sum(each.numel() * each.element_size() for each in parameters)
    kv = 2 * layers * kv_heads * config.head_dim * 2
    cells = (
        name, f"{layers} x {width}", f"{total:,}", f"{network.active_parameters:,}", f"{size / 1e9:.2f} GB",
        f"{kv / 1024:.0f} KiB", f"{kv * 2048 / 2**20:.0f} MiB",
    )  # fmt: skip
    assert published in {0, total}
    assert f"| {' | '.join(cells)} |" in PAGE.read_text(encoding="utf-8")
