"""The TR-Hash line once more: made files of every form, and their logits by the equations, without our layers.

The forward pass shares no code with the product. It reads a file's tensors by their published names, takes one whole
text without a cache, and computes expert by expert.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": 600, "max_position_embeddings": 2048, "mlp_type": "tr_hash_engine",
    "num_experts": 4, "shared_intermediate_size": 40, "top_k": 2, "norm_eps": 3e-4, "rope_theta": 5000.0,
    "tie_word_embeddings": True, "use_qk_norm": True, "top_k_primary_weight": None,
    "shared_output_scale": 0.9, "routed_output_scale": 1.7,
}  # fmt: skip
FORMS = ("native", "export", "first route", "dense")


def made_file(config: dict[str, Any], form: str, seed: int = 0, extras: bool = False) -> Tensors:
    """Random tensors of a file; with `extras` an export has output gates and channel scales."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * gain / math.sqrt(shape[-1])

    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    vocab, experts, size = config["vocab_size"], config["num_experts"], hidden // heads
    wide, shared = config["intermediate_size"] // experts, config["shared_intermediate_size"] or 0

    def norm(n: int) -> Tensor:
        return 1.0 + 0.2 * torch.randn(n, generator=generator)

    file = {"embed_tokens.weight": rand(vocab, hidden, gain=4.0), "norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        file["lm_head.weight"] = rand(vocab, hidden)
    for n in range(config["num_hidden_layers"]):
        layer: Tensors = {"input_layernorm.weight": norm(hidden), "post_attention_layernorm.weight": norm(hidden)}
        for name, rows in (("q", heads * size), ("k", kv * size), ("v", kv * size)):
            layer[f"self_attn.{name}_proj.weight"] = rand(rows, hidden, gain=2.0)
        layer["self_attn.o_proj.weight"] = rand(hidden, heads * size, gain=2.0)
        layer["self_attn.rotary_emb.inv_freq"] = torch.full((size // 2,), 9.0)
        if config["use_qk_norm"]:
            layer |= {f"self_attn.{name}_norm.weight": norm(size) for name in "qk"}
        if form == "dense":
            layer |= {
                f"mlp.{n}_proj.weight": rand(config["intermediate_size"], hidden, gain=2.0) for n in ("gate", "up")
            }
            layer["mlp.down_proj.weight"] = rand(hidden, config["intermediate_size"], gain=2.0)
        else:
            layer |= _experts(rand, form, config["top_k"], vocab, hidden, shared, experts, wide, generator)
            if extras:
                layer |= {
                    "mlp.shared_output_gate": torch.tensor(0.7 + 0.1 * n),
                    "mlp.routed_output_gate": torch.tensor(1.3),
                }
                layer["mlp.hash_channel_scale"] = rand(experts, wide, gain=2.0)
        file |= {f"layers.{n}.{key}": value for key, value in layer.items()}
    return file


def _experts(
    rand: Any, form: str, k: int, vocab: int, hidden: int, shared: int, experts: int, wide: int, generator: Any
) -> Tensors:
    stem = "mlp.engine." if form == "native" else "mlp."
    layer: Tensors = {}
    if shared:
        layer = {f"{stem}shared_{name}.weight": rand(shared, hidden, gain=2.0) for name in ("gate", "up")}
        layer[f"{stem}shared_down.weight"] = rand(hidden, shared, gain=2.0)
    for name in ("gate", "up", "down"):
        full = f"mlp.engine.expert_{name}" if form == "native" else f"mlp.{name}_proj_w"
        turned = rand(experts, hidden, wide, gain=2.0) if name == "down" else rand(experts, wide, hidden, gain=2.0)
        layer[full] = turned.mT.contiguous()
    table = torch.rand(vocab, experts, generator=generator).argsort(1)[:, :k].T.contiguous()
    if form == "native":
        layer["mlp.engine.route_table"] = table
        layer["mlp.engine.fused_route_codes"] = torch.zeros(0, dtype=torch.uint8)
        layer["mlp.engine.fused_expert_pairs"] = torch.zeros(0, 2, dtype=torch.int32)
    else:
        layer["mlp.token_to_expert"] = table[0].clone()
        if form == "export":
            layer["mlp.topk_token_to_expert"] = table
    return layer


def write_file(folder: Path, config: dict[str, Any], file: Tensors, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + key: value for key, value in file.items()}, folder / "model.safetensors")
    return folder


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _attention(config: dict[str, Any], p: Tensors, a: Tensor) -> Tensor:
    length, size = len(a), config["hidden_size"] // config["num_attention_heads"]
    q, k, v = ((a @ p[f"self_attn.{name}_proj.weight"].T).view(length, -1, size) for name in "qkv")
    if "self_attn.q_norm.weight" in p:
        q, k = (_rms(x, p[f"self_attn.{name}_norm.weight"], 1e-6) for x, name in ((q, "q"), (k, "k")))
    frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    frequencies = frequencies.to(config.get("rounded", torch.float32)).float()  # as another server has them
    turns = torch.polar(torch.ones(length, size // 2), torch.arange(length)[:, None] * frequencies)

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : size // 2].contiguous(), x[..., size // 2 :].contiguous()) * turns[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    q, k = rotate(q), rotate(k)
    at = torch.arange(length)
    hidden_keys = at[None] > at[:, None]
    if config.get("sliding_window"):
        hidden_keys |= at[None] <= at[:, None] - config["sliding_window"]
    heads = []
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, kv].T / (size if config.get("use_mup_attn_scale") else math.sqrt(size))
        heads.append(scores.masked_fill(hidden_keys, -torch.inf).softmax(-1) @ v[:, kv])
    return torch.cat(heads, dim=-1) @ p["self_attn.o_proj.weight"].T


def _scale(config: dict[str, Any], name: str, layer: int) -> float:
    base = config.get(f"{name}_output_scale", 1.0)
    first, last = (config.get(f"{name}_output_scale_{end}_layer") for end in ("first", "last"))
    if first is None and last is None:
        return base
    first = base if first is None else first
    last = first if last is None else last
    return first + (last - first) * layer / (config["num_hidden_layers"] - 1)


def _sign(id_: int, expert: int, channel: int, layer: int) -> int:
    h = id_ * 0x9E3779B1 + expert * 0x85EBCA77 + channel * 0xC2B2AE3D + 0xA511E9B3 + layer * 0x63D83595
    h %= 2**32
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    return 1 if h % 2 else -1


def _mlp(config: dict[str, Any], p: Tensors, layer: int, b: Tensor, ids: Tensor) -> Tensor:
    if "mlp.gate_proj.weight" in p:
        gate, up = b @ p["mlp.gate_proj.weight"].T, b @ p["mlp.up_proj.weight"].T
        act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}.get(config.get("hidden_act", "silu"), _silu)
        return (act(gate) * up) @ p["mlp.down_proj.weight"].T
    native = "mlp.engine.expert_gate" in p
    gates, ups, downs = (
        p[f"mlp.engine.expert_{name}" if native else f"mlp.{name}_proj_w"] for name in ("gate", "up", "down")
    )
    stem, experts = "mlp.engine." if native else "mlp.", len(gates)
    k = config.get("num_experts_per_tok") or config.get("top_k") or 1
    if native:
        table = p["mlp.engine.route_table"]
    else:
        cyclic = torch.stack([(p["mlp.token_to_expert"] + i) % experts for i in range(k)])
        table = p.get("mlp.topk_token_to_expert", cyclic)
    primary = config.get("top_k_primary_weight")
    if primary is None:
        primary = 1 / k if native or config.get("source_mlp_type") == "tr_hash_engine" else 0.95
    primary = min(max(primary, 0.0), 1.0) if k > 1 else 1.0
    routed = torch.zeros_like(b)
    for row, id_ in enumerate(ids.tolist()):
        for place in range(k):
            e = int(table[place, id_])
            inner = _silu(b[row] @ gates[e]) * (b[row] @ ups[e])
            if "mlp.hash_channel_scale" in p:
                signs = torch.tensor([_sign(id_, e, c, layer) for c in range(len(inner))])
                inner = inner * (1 + signs * p["mlp.hash_channel_scale"][e])
            routed[row] += (primary if place == 0 else (1 - primary) / (k - 1)) * (inner @ downs[e])
    out = _scale(config, "routed", layer) * p.get("mlp.routed_output_gate", torch.tensor(1.0)) * routed
    if f"{stem}shared_gate.weight" in p:
        inner = _silu(b @ p[f"{stem}shared_gate.weight"].T) * (b @ p[f"{stem}shared_up.weight"].T)
        shared = inner @ p[f"{stem}shared_down.weight"].T
        out = out + _scale(config, "shared", layer) * p.get("mlp.shared_output_gate", torch.tensor(1.0)) * shared
    return out


def hash_logits(file: Tensors, config: dict[str, Any], ids: Tensor) -> Tensor:
    """FP32 [T, vocab] of one text."""
    eps = config["norm_eps"]
    x = file["embed_tokens.weight"].float()[ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        p = {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}
        p = {key: value.float() if value.is_floating_point() else value for key, value in p.items()}
        x = x + _attention(config, p, _rms(x, p["input_layernorm.weight"], eps))
        x = x + _mlp(config, p, layer, _rms(x, p["post_attention_layernorm.weight"], eps), ids)
    logits = (
        _rms(x, file["norm.weight"].float(), eps) @ file.get("lm_head.weight", file["embed_tokens.weight"]).float().T
    )
    if config.get("use_mup_output_mult"):
        logits = logits / max(1.0, config["hidden_size"] / config["mup_base_width"])
    return logits
