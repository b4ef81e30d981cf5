"""Every published checkpoint format: how `detect` recognises it, and where each tensor goes in the network.

Reading and writing both follow `ERAS`, so a new era is one entry (and a line in `detect` if its network differs).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..config import Architecture, DeepConfig
from ..files import CheckpointError
from ..network import DeepNetwork


class Place(NamedTuple):
    """Where a file's tensor, or a part of its columns, goes in the network."""

    parameter: str  # its name in the network, without `layers.N.`
    block: tuple[str, ...] = ()  # the block it fills along each of the first dimensions, see `_blocks`
    transposed: bool = False  # the file has [in, out], the network [out, in]
    leading: int = 0  # dimensions of size 1 that the file has in front


Places = tuple[Place, ...]  # side by side along the columns of the file's tensor


class Era(NamedTuple):
    """A checkpoint format."""

    name: str
    marker: str  # a tensor name that tells it from every era below it in `ERAS`
    layer: Mapping[str, Places]
    experts: Mapping[str, Places]
    routes_by_modulo: bool = True  # a file without `token_to_expert` means id mod num_experts; if False, it is refused


TOP: dict[str, Places] = {
    "embed_tokens.weight": (Place("embed_tokens"),),
    "norm.weight": (Place("norm"),),
    "lm_head.weight": (Place("lm_head"),),
    "mu_init": (Place("mu_init", leading=2),),
}
BLOCK: dict[str, Places] = {
    "input_layernorm.weight": (Place("input_norm"),),
    "self_attn.k_proj.weight": (Place("kqv_proj", ("k", "x")),),
    "self_attn.q_proj.weight": (Place("kqv_proj", ("q", "x")),),
    "self_attn.v_proj.weight": (Place("kqv_proj", ("v", "x")),),
    "self_attn.mu_to_k.weight": (Place("kqv_proj", ("k", "mu")),),
    "self_attn.mu_to_q.weight": (Place("kqv_proj", ("q", "mu")),),
    "self_attn.mu_to_v.weight": (Place("kqv_proj", ("v", "mu")),),
    "self_attn.k_norm.weight": (Place("k_norm"),),
    "self_attn.q_norm.weight": (Place("q_norm"),),
    "self_attn.o_proj.weight": (Place("o_proj"),),
    "post_attention_layernorm.weight": (Place("post_norm"),),
    "mlp.mu_router.weight": (Place("router"),),
    "mlp.token_to_expert": (Place("token_to_expert"),),
}


def _dynamics(first: str, second: str) -> dict[str, Places]:
    return BLOCK | {
        "dynamics.mu": (Place("mu"),),
        "dynamics.mu_proj.weight": (Place("dynamics_in", ("mu_proj",)),),
        f"dynamics.{first}.weight": (Place("dynamics_in", ("controller", "x")), Place("controller_v")),
        f"dynamics.{first}.bias": (Place("controller_bias"),),
        f"dynamics.{second}.weight": (Place("controller_out"),),
        f"dynamics.{second}.bias": (Place("controller_out_bias"),),
    }


CONTROLLER_0_2 = _dynamics("controller.0", "controller.2")
CONTROLLER_IN_OUT = _dynamics("controller_in", "controller_out")
MU_GUIDANCE = BLOCK | {
    "mu_guidance.mu": (Place("mu"),),
    "mu_guidance.mu_proj.weight": (Place("mu_guidance_proj"),),
    "mlp.shared_gate.weight": (Place("shared_gate_up", ("shared_gate",)),),
    "mlp.shared_up.weight": (Place("shared_gate_up", ("shared_up",)),),
    "mlp.shared_down.weight": (Place("shared_down"),),
}


def _experts(kind: str, block: str, suffix: str = "", *, transposed: bool = False) -> dict[str, Places]:
    """Return the three matrices of a SwiGLU MLP under their names in the file."""
    return {
        f"mlp.{kind}gate_proj{suffix}": (Place("gate_up", (block, "gate"), transposed),),
        f"mlp.{kind}up_proj{suffix}": (Place("gate_up", (block, "up"), transposed),),
        f"mlp.{kind}down_proj{suffix}": (Place("down", (block,), transposed),),
    }


DENSE = _experts("", "first", ".weight")  # of every era, with use_token_routed_mlp: false
ONE_BY_ONE = _experts("experts.{e}.", "expert", ".weight")
SEPARATE = _experts("", "experts", transposed=True)
FUSED: dict[str, Places] = {
    "mlp.gate_up_proj": (Place("gate_up", transposed=True),),
    "mlp.down_proj": (Place("down", transposed=True),),
}
LATEST = Era("0.12-0.14", "dynamics.controller_in.weight", CONTROLLER_IN_OUT, FUSED)
REWRITE = Era("2026-03", "mu_guidance.mu", MU_GUIDANCE, _experts("", "experts", "_w", transposed=True))
# Most specific first: `detect` takes the first whose marker the file has (0.4.0 also has the marker of 0.4.3-0.7).
ERAS = (
    REWRITE,
    LATEST,
    Era("0.10-0.11", "self_attn.mu_to_v.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.9", "self_attn.mu_to_k.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.8", "dynamics.mu_proj.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.4.0", "mlp.experts.{e}.gate_proj.weight", CONTROLLER_0_2, ONE_BY_ONE, routes_by_modulo=False),
    Era("0.4.3-0.7", "dynamics.controller.0.weight", CONTROLLER_0_2, SEPARATE),
)
# Tensors that a file may lack: the term is then zero, and a token's expert is its id mod the number of experts.
OPTIONAL = re.compile(r"mu_init|.*\.(mu_to_[qkv]\.weight|mu_proj\.weight|mu_router\.weight|token_to_expert)")
# Tensors that are computed instead of read: BF16 files hold rounded ones.
BUFFER = re.compile(r"(.*\.)?(inv_freq|cos_cached|sin_cached|dynamics\.safety_clamp\..+)")


class Part(NamedTuple):
    """A view of one layer's tensor in the network."""

    target: Tensor
    width: int
    transposed: bool


class Entry(NamedTuple):
    """A tensor that the network expects in a file: its shape there and its parts, from left to right."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def detect(shapes: Mapping[str, tuple[int, ...]], config: DeepConfig, path: Path) -> tuple[Era, Architecture]:
    """Recognise a network's era and architecture by its tensor names (without `model.`), or raise `CheckpointError`."""
    names = {re.sub(r"experts\.\d+", "experts.{e}", re.sub(r"^layers\.\d+\.", "", key)) for key in shapes}
    if any("topk_token_to_expert" in name for name in names):
        raise CheckpointError(
            f"{path} routes a token to several experts (topk_token_to_expert), as another line of the family does: "
            "pass a checkpoint of the Complexity-Deep line."
        )
    era = next((era for era in ERAS if era.marker in names), None)
    if era is None:
        raise CheckpointError(
            f"{path} belongs to no known era of Complexity-Deep, with tensors such as "
            f"{shortened(sorted(shapes)) or 'none'}: pass a checkpoint of this family."
        )
    shared = next(
        (min(sum(shape[:1]), 2**20) for key, shape in shapes.items() if key.endswith("shared_gate.weight")), 0
    )
    return era, Architecture(
        era=era.name,
        contextual_mu="dynamics.mu_proj.weight" in names,
        mu_attention=any("self_attn.mu_to_" in name for name in names),
        mu_highway="self_attn.mu_to_v.weight" in names,
        mu_router=config.use_token_routed_mlp and "mlp.mu_router.weight" in names,
        mu_guidance=era is REWRITE,
        shared_expert_size=shared,
        tied=config.tie_word_embeddings,
    )


def shortened(names: list[str]) -> str:
    """Join the first three names, and count the others."""
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _blocks(config: DeepConfig, arch: Architecture) -> dict[str, slice]:
    """Name the blocks of rows, columns and experts in the stacked parameters."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    q, wide, shared = config.num_attention_heads * config.head_dim, config.expert_size, arch.shared_expert_size
    mu_rows = hidden if arch.contextual_mu else 0
    return {
        "k": slice(0, kv), "q": slice(kv, kv + q), "v": slice(kv + q, 2 * kv + q),
        "x": slice(0, hidden), "mu": slice(hidden, 2 * hidden),
        "mu_proj": slice(0, mu_rows), "controller": slice(mu_rows, mu_rows + config.dynamics_controller_hidden),
        "experts": slice(0, config.experts), "gate": slice(0, wide), "up": slice(wide, 2 * wide),
        "shared_gate": slice(0, shared), "shared_up": slice(shared, 2 * shared),
    }  # fmt: skip


def plan(era: Era, model: DeepNetwork) -> dict[str, Entry]:
    """List every tensor name (without `model.`) that the era has for this network, and where the tensor goes."""
    config, arch = model.config, model.architecture
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    blocks = _blocks(config, arch)

    def entry(prefix: str, places: Places, expert: int = 0) -> Entry | None:
        shape: list[int] = []
        parts: list[Part] = []
        for place in places:
            tensor = tensors.get(prefix + place.parameter)
            named = [blocks[name] for name in place.block if name in blocks]
            if tensor is None or any(block.start == block.stop for block in named):
                return None  # not in this network
            view = tensor.detach()[tuple(blocks.get(name, expert) for name in place.block)]
            # Sizes come from the blocks, since the first layer's parameter has no columns for mu.
            size = [block.stop - block.start for block in named] + list(tensor.shape[len(place.block) :])
            if place.transposed:
                size[-2:] = size[:-3:-1]
            parts.append(Part(view, size[-1], place.transposed))
            shape = [1] * place.leading + size[:-1] + [sum(part.width for part in parts)]
        return Entry(tuple(shape), tuple(parts))

    found = {key: entry("", places) for key, places in TOP.items()}
    names = {**era.layer, **(era.experts if config.use_token_routed_mlp else DENSE)}
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        for key, places in names.items():
            if "mu_to_" not in key or arch.mu_attention:
                for expert in range(config.experts if "{e}" in key else 1):
                    found[prefix + key.format(e=expert)] = entry(prefix, places, expert)
    return {key: value for key, value in found.items() if value is not None}
