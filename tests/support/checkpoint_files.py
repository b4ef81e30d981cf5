"""Writes checkpoint files of every era with small random tensors, and compares them with loaded networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyllm.model import CheckpointError, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import LoadReport, load_checkpoint

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
# 25 does not divide by 3, so experts are 8 wide and one column of the MLP is unused.
CONFIG = DeepConfig(
    vocab_size=48, hidden_size=32, intermediate_size=25, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=3, dynamics_controller_hidden=6, max_position_embeddings=64,
)  # fmt: skip
H, KV, W, E, C, V = 32, 16, 8, 3, 6, 48


def canonical(config: DeepConfig = CONFIG, seed: int = 0) -> Tensors:
    """Random tensors of a 0.13 file, without `model.`, without a head."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    file = {"embed_tokens.weight": rand(V, H), "norm.weight": rand(H)}
    for n in range(config.num_hidden_layers):
        a, d, m = f"layers.{n}.self_attn.", f"layers.{n}.dynamics.", f"layers.{n}.mlp."
        file |= {f"layers.{n}.input_layernorm.weight": rand(H), f"layers.{n}.post_attention_layernorm.weight": rand(H)}
        for prefix in ("{}_proj", "mu_to_{}"):
            file |= {f"{a}{prefix.format(x)}.weight": rand(H if x == "q" else KV, H) for x in "qkv"}
        file |= {a + "o_proj.weight": rand(H, H), a + "q_norm.weight": rand(8), a + "k_norm.weight": rand(8)}
        file |= {d + "mu": rand(H), d + "mu_proj.weight": rand(H, H)}
        file |= {d + "controller_in.weight": rand(C, 2 * H), d + "controller_in.bias": rand(C)}
        file |= {d + "controller_out.weight": rand(3 * H, C), d + "controller_out.bias": rand(3 * H)}
        if config.use_token_routed_mlp:
            file |= {m + "gate_up_proj": rand(E, H, 2 * W), m + "down_proj": rand(E, W, H)}
            file |= {m + "mu_router.weight": rand(E, H)}
            file[m + "token_to_expert"] = torch.randint(E, (V,), generator=generator)
        else:
            wide = config.intermediate_size
            file |= {m + "gate_proj.weight": rand(wide, H), m + "up_proj.weight": rand(wide, H)}
            file[m + "down_proj.weight"] = rand(H, wide)
    return file


def rewritten(shared: int = 0) -> Tensors:
    """Random tensors of a 2026-03 file, with a shared expert of this width."""
    file = without(canonical(), "dynamics", "mu_router", "gate_up_proj", "down_proj")
    file["mu_init"] = torch.randn(1, 1, H)
    for n in range(CONFIG.num_hidden_layers):
        m, g = f"layers.{n}.mlp.", f"layers.{n}.mu_guidance."
        file |= {g + "mu": torch.randn(H), g + "mu_proj.weight": torch.randn(H, H)}
        file |= {m + "gate_proj_w": torch.randn(E, H, W), m + "up_proj_w": torch.randn(E, H, W)}
        file[m + "down_proj_w"] = torch.randn(E, W, H)
        if shared:
            file |= {m + "shared_gate.weight": torch.randn(shared, H), m + "shared_up.weight": torch.randn(shared, H)}
            file[m + "shared_down.weight"] = torch.randn(H, shared)
    return file


def stacked(file: Tensors) -> Tensors:
    """The network's parameters for a canonical file, whose missing tensors are terms that are absent."""
    top = {"embed_tokens": file["embed_tokens.weight"], "norm": file["norm.weight"]}
    top["lm_head"] = file.get("lm_head.weight", top["embed_tokens"])
    for n in range(CONFIG.num_hidden_layers):
        here = {k.removeprefix(f"layers.{n}."): v for k, v in file.items() if k.startswith(f"layers.{n}.")}
        rows = []
        for x in "kqv":
            own = here[f"self_attn.{x}_proj.weight"]
            mu = here.get(f"self_attn.mu_to_{x}.weight", torch.zeros_like(own))
            rows.append(torch.cat((own, mu), dim=1) if n and "self_attn.mu_to_k.weight" in here else own)
        inner = here["dynamics.controller_in.weight"]
        layer = {
            "input_norm": here["input_layernorm.weight"],
            "post_norm": here["post_attention_layernorm.weight"],
            "kqv_proj": torch.cat(rows),
            "q_norm": here["self_attn.q_norm.weight"],
            "k_norm": here["self_attn.k_norm.weight"],
            "o_proj": here["self_attn.o_proj.weight"],
            "mu": here["dynamics.mu"],
            "dynamics_in": torch.cat([w for w in (here.get("dynamics.mu_proj.weight"), inner[:, :H]) if w is not None]),
            "controller_v": inner[:, H:],
            "controller_bias": here["dynamics.controller_in.bias"],
            "controller_out": here["dynamics.controller_out.weight"],
            "controller_out_bias": here["dynamics.controller_out.bias"],
        }
        if "mlp.gate_up_proj" in here:
            layer |= {"gate_up": here["mlp.gate_up_proj"].mT, "down": here["mlp.down_proj"].mT}
            layer["token_to_expert"] = here.get("mlp.token_to_expert", torch.arange(V) % E)
        else:
            layer["gate_up"] = torch.cat((here["mlp.gate_proj.weight"], here["mlp.up_proj.weight"]))[None]
            layer["down"] = here["mlp.down_proj.weight"][None]
        if "mlp.mu_router.weight" in here:
            layer["router"] = here["mlp.mu_router.weight"]
        top |= {f"layers.{n}.{key}": value for key, value in layer.items()}
    return top


def without(file: Tensors, *parts: str) -> Tensors:
    return {key: value for key, value in file.items() if not any(part in key for part in parts)}


def old_names(file: Tensors) -> Tensors:
    """Controller and experts as files before 0.12 had them."""
    renamed: Tensors = {}
    for key, value in file.items():
        key = key.replace("controller_in", "controller.0").replace("controller_out", "controller.2")
        if key.endswith("gate_up_proj"):
            stem = key.removesuffix("gate_up_proj")
            renamed |= {stem + "gate_proj": value[..., :W], stem + "up_proj": value[..., W:]}
        else:
            renamed[key] = value
    return renamed


def single_experts(file: Tensors) -> Tensors:
    """Experts as the first files had them: one matrix each, [out, in]."""
    renamed: Tensors = {}
    for key, value in old_names(file).items():
        kind = key.rpartition(".")[2]
        if kind in ("gate_proj", "up_proj", "down_proj"):
            stem = key.removesuffix(kind)
            renamed |= {f"{stem}experts.{e}.{kind}.weight": value[e].mT for e in range(E)}
        else:
            renamed[key] = value
    return renamed


ERAS: dict[str, tuple[tuple[str, ...], Callable[[Tensors], Tensors]]] = {
    "0.4.0": (("mu_to_", "mu_router", "mu_proj"), single_experts),
    "0.4.3-0.7": (("mu_to_", "mu_router", "mu_proj"), old_names),
    "0.8": (("mu_to_", "mu_router"), old_names),
    "0.9": (("mu_to_v", "mu_router"), old_names),
    "0.10-0.11": ((), old_names),
    "0.12-0.14": ((), lambda file: file),
}


def write(folder: Path, file: Tensors, name: str = "model.safetensors", config: DeepConfig = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({key: value.contiguous().clone() for key, value in file.items()}, folder / name)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[DeepForCausalLM, LoadReport]:
    return load_checkpoint(folder, network=DeepForCausalLM, dtype=dtype, device=CPU, **options)


def contents(model: DeepForCausalLM) -> Tensors:
    return {
        key: value.detach()
        for key, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        if key != "inv_freq"
    }


def assert_same(model: DeepForCausalLM, expected: Tensors) -> None:
    """Equal names and values; expected values are rounded to each parameter's dtype."""
    found = contents(model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def refusal(path: Path, **options: Any) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    sentence = str(caught.value)
    folder = path if path.is_dir() else path.parent
    assert str(folder) in sentence, "it names the path"
    assert sentence.endswith(".")
    assert not re.search(r"\n|\. [A-Z]", sentence), "it is one sentence"
    return sentence
