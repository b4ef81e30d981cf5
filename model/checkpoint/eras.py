"""Every published checkpoint format: how `detect` recognises it, and where each tensor goes in the network.

Reading and writing both follow `ERAS`, so a new era is one entry (and a line in `detect` if its network differs).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..config import DEPTH_SCALES, SCALES, Architecture, DeepConfig
from ..files import CheckpointError, folder_of, shown
from ..network import DeepNetwork


class Place(NamedTuple):
    """Where a file's tensor, or a part of its columns, goes in the network."""

    parameter: str  # its name in the network, without `layers.N.`
    block: tuple[str, ...] = ()  # the block it fills along each of the first dimensions, see `_blocks`
    transposed: bool = False  # the file has [in, out], the network [out, in]
    leading: int = 0  # how many leading dimensions of size 1 the file has; -1 if it stores one element as a scalar
    # The dimension along which the network concatenates the experts; the file stacks them in a leading dimension.
    side_by_side: int | None = None


Places = tuple[Place, ...]  # side by side along the columns of the file's tensor


class Era(NamedTuple):
    """A checkpoint format."""

    name: str
    marker: str  # a tensor name that no era below it in `ERAS` has
    layer: Mapping[str, Places]
    experts: Mapping[str, Places]
    routes_by_modulo: bool = True  # without `token_to_expert`, id mod num_experts; False: refuse such a file
    derived: tuple[str, ...] = ()  # tensors of a layer that follow from others, so that they are not read


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
SHARED: dict[str, Places] = {
    "mlp.shared_gate.weight": (Place("shared_gate_up", ("shared_gate",)),),
    "mlp.shared_up.weight": (Place("shared_gate_up", ("shared_up",)),),
    "mlp.shared_down.weight": (Place("shared_down"),),
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
    **SHARED,
}


def _experts(kind: str, block: str, suffix: str = "", *, transposed: bool = False) -> dict[str, Places]:
    """Return the three matrices of a SwiGLU MLP under their names in the file."""
    return {
        f"mlp.{kind}gate_proj{suffix}": (Place("gate_up", (block, "gate"), transposed),),
        f"mlp.{kind}up_proj{suffix}": (Place("gate_up", (block, "up"), transposed),),
        f"mlp.{kind}down_proj{suffix}": (Place("down", (block,), transposed),),
    }


DENSE = _experts("", "first", ".weight")  # in every era, with use_token_routed_mlp: false
ONE_BY_ONE = _experts("experts.{e}.", "expert", ".weight")
SEPARATE = _experts("", "experts", transposed=True)
FUSED: dict[str, Places] = {
    "mlp.gate_up_proj": (Place("gate_up", transposed=True),),
    "mlp.down_proj": (Place("down", transposed=True),),
}


def _next_to_shared(kind: str, expert: str) -> dict[str, Places]:
    """Return the MLPs of the TR-Hash line: the columns of the shared expert, then those of each small expert."""
    return {
        f"mlp.{kind}shared_gate.weight": (Place("gate_up", ("first", "shared_gate")),),
        f"mlp.{kind}shared_up.weight": (Place("gate_up", ("first", "shared_up")),),
        f"mlp.{kind}shared_down.weight": (Place("down", ("first", "all", "shared_gate")),),
        f"mlp.{expert.format('gate')}": (Place("gate_up", ("first", "gate"), True, side_by_side=0),),
        f"mlp.{expert.format('up')}": (Place("gate_up", ("first", "up"), True, side_by_side=0),),
        f"mlp.{expert.format('down')}": (Place("down", ("first", "all", "gate"), True, side_by_side=1),),
    }


EXPORT_LAYER = BLOCK | {
    "mlp.shared_output_gate": (Place("output_gates", ("shared_output",), leading=-1),),
    "mlp.routed_output_gate": (Place("output_gates", ("routed_output",), leading=-1),),
    "mlp.hash_channel_scale": (Place("channel_scale"),),
}
EXPORT_EXPERTS = _next_to_shared("", "{}_proj_w")
EXPORT_DERIVED = (
    "mlp.pair_hash_route_codes", "mlp.pair_hash_expert_pairs", "mlp.last_shared_rms", "mlp.last_routed_rms",
    "mlp.expert_counts",
)  # fmt: skip
NATIVE = Era(
    "TR-Hash native", "mlp.engine.expert_gate", BLOCK | {"mlp.engine.route_table": (Place("routes"),)},
    _next_to_shared("engine.", "engine.expert_{}"),
    derived=("mlp.engine.fused_route_codes", "mlp.engine.fused_expert_pairs"),
)  # fmt: skip
EXPORT = Era(
    "TR-Hash export", "mlp.topk_token_to_expert", EXPORT_LAYER | {"mlp.topk_token_to_expert": (Place("routes"),)},
    EXPORT_EXPERTS, derived=(*EXPORT_DERIVED, "mlp.token_to_expert"),
)  # fmt: skip
FIRST_ROUTE = Era(
    "TR-Hash export", "mlp.gate_proj_w", EXPORT_LAYER | {"mlp.token_to_expert": (Place("routes", ("first",)),)},
    EXPORT_EXPERTS, routes_by_modulo=False, derived=EXPORT_DERIVED,
)  # fmt: skip
SIBLING = Era("TR-Hash dense sibling", "mlp.gate_proj.weight", BLOCK, DENSE)
LATEST = Era("0.12-0.14", "dynamics.controller_in.weight", CONTROLLER_IN_OUT, FUSED)
REWRITE = Era("2026-03", "mu_guidance.mu", MU_GUIDANCE, _experts("", "experts", "_w", transposed=True))
# Most specific first: `detect` chooses the first whose marker the file has (0.4.0 also has the marker of 0.4.3-0.7).
ERAS = (
    REWRITE,
    LATEST,
    Era("0.10-0.11", "self_attn.mu_to_v.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.9", "self_attn.mu_to_k.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.8", "dynamics.mu_proj.weight", CONTROLLER_0_2, SEPARATE),
    Era("0.4.0", "mlp.experts.{e}.gate_proj.weight", CONTROLLER_0_2, ONE_BY_ONE, routes_by_modulo=False),
    Era("0.4.3-0.7", "dynamics.controller.0.weight", CONTROLLER_0_2, SEPARATE),
    NATIVE,
    EXPORT,
    FIRST_ROUTE,
    SIBLING,
)
HASH_ERAS = (NATIVE, EXPORT, FIRST_ROUTE)
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


def detect(
    shapes: Mapping[str, tuple[int, ...]], config: DeepConfig, path: Path
) -> tuple[Era, Architecture, DeepConfig]:
    """Recognise a network's era and architecture by its tensor names (without `model.`), or raise `CheckpointError`.

    Also returns the configuration, with the settings that the tensors decide.
    """
    names = {re.sub(r"experts\.\d+", "experts.{e}", re.sub(r"^layers\.\d+\.", "", key)) for key in shapes}
    era = next((era for era in ERAS if era.marker in names), None)
    if era is None:
        raise CheckpointError(
            f"{path} is not a Complexity-Deep checkpoint of any known era (its tensors: "
            f"{shortened(sorted(shapes)) or 'none'}): pass a checkpoint of this family."
        )
    shared = next(
        (min(sum(shape[:1]), 2**20) for key, shape in shapes.items() if key.endswith("shared_gate.weight")), 0
    )
    try:
        config = _decided(config, era, shapes, names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder_of(path) / 'config.json'}: {error}") from None
    return (
        era,
        Architecture(
            era=era.name,
            contextual_mu="dynamics.mu_proj.weight" in names,
            mu_attention=any("self_attn.mu_to_" in name for name in names),
            mu_highway="self_attn.mu_to_v.weight" in names,
            mu_router=config.use_token_routed_mlp and "mlp.mu_router.weight" in names,
            mu_guidance=era is REWRITE,
            shared_expert_size=shared,
            tied=config.tie_word_embeddings,
            mu=era not in (*HASH_ERAS, SIBLING),
            routes=(config.num_experts_per_tok or 1) if era in HASH_ERAS else 0,
            output_gates=any(name.endswith("_output_gate") for name in names),
            channel_modulation="mlp.hash_channel_scale" in names,
        ),
        config,
    )


def _decided(config: DeepConfig, era: Era, shapes: Mapping[str, tuple[int, ...]], names: set[str]) -> DeepConfig:
    """Return the configuration with the settings that tensors decide; raise `CheckpointError` if they contradict it."""
    gates, modulated, dense = "mlp.shared_output_gate" in names, "mlp.hash_channel_scale" in names, era is SIBLING
    if era is not NATIVE:  # whose own code ignores these settings, so that its files may have any of them
        for name, known in (
            ("use_shared_routed_gates", gates or dense), ("learn_hash_channel_modulation", modulated or dense),
            ("learn_hash_pair_gates", False), ("lsh_routing", False),
        ):  # fmt: skip
            if getattr(config, name) and not known:
                raise CheckpointError(
                    _conflict(config, name, "the file has no such tensors, or they are not supported")
                )
    if dense:
        return dataclasses.replace(config, use_token_routed_mlp=False)
    if era in HASH_ERAS:
        config = dataclasses.replace(
            config, use_token_routed_mlp=True, use_shared_routed_gates=gates, learn_hash_channel_modulation=modulated,
            learn_hash_pair_gates=False, lsh_routing=False,
        )  # fmt: skip
        return _hash_sizes(config, era, shapes)
    odd = [name for name in (*SCALES, *DEPTH_SCALES) if getattr(config, name) not in (None, 1)]
    if config.use_token_routed_mlp:
        odd += ["num_experts_per_tok"] if (config.num_experts_per_tok or 1) > 1 else []
        odd += ["top_k"] if 1 < (config.top_k or 1) <= config.experts else []  # a larger one is a sampling default
    if odd:
        raise CheckpointError(_conflict(config, odd[0], f"networks of era {era.name} do not support it"))
    return config


def _hash_sizes(config: DeepConfig, era: Era, shapes: Mapping[str, tuple[int, ...]]) -> DeepConfig:
    """Return the configuration of the TR-Hash line with sizes from tensors, after comparing them with its own."""

    def shape(*ends: str) -> tuple[int, ...]:
        return next((shape for key, shape in shapes.items() if key.endswith(ends)), ())

    experts, _, width = (*shape(".engine.expert_gate", ".gate_proj_w"), 0, 0, 0)[:3]
    shared = sum(shape("shared_gate.weight")[:1])
    given = "top_k" if config.num_experts_per_tok is None else "num_experts_per_tok"
    wanted = getattr(config, given) or None
    routes = sum(shape(".route_table", ".topk_token_to_expert")[:1]) or wanted or 1
    conflicts = {
        "num_experts": config.num_experts not in (None, experts) and f"the file has {experts} experts",
        "intermediate_size": config.intermediate_size != experts * width
        and f"the file's {experts} experts have a width of {width} each",
        given: (wanted not in (None, routes) and f"the file's tables have {routes} experts for each token")
        or (not 1 <= routes <= experts and f"the file has {experts} experts"),
        "shared_intermediate_size": shared
        and config.shared_intermediate_size not in (None, shared)
        and f"the file's shared expert has a width of {shared}",
    }  # fmt: skip
    for name, conflict in conflicts.items():
        if conflict:
            raise CheckpointError(_conflict(config, name, conflict))
    primary = config.top_k_primary_weight
    if primary is None:  # the default of the code that wrote the file
        engine = era is NATIVE or config.source_mlp_type == "tr_hash_engine"
        primary = 1 / routes if engine else 0.95
    return dataclasses.replace(
        config, num_experts=experts, num_experts_per_tok=routes, top_k=None, top_k_primary_weight=primary,
        shared_intermediate_size=shared or None,
    )  # fmt: skip


def _conflict(config: DeepConfig, name: str, found: str) -> str:
    return f"{name} is {shown(getattr(config, name))}, but {found}: use the config.json that was saved with the file."


def shortened(names: list[str]) -> str:
    """Join the first three names, and count the others."""
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_derived(key: str, era: Era) -> bool:
    """Return whether a file's tensor follows from others, so that it need not be read."""
    return BUFFER.fullmatch(key) is not None or re.sub(r"^layers\.\d+\.", "", key) in era.derived


def _blocks(config: DeepConfig, arch: Architecture) -> dict[str, slice]:
    """Name the blocks of rows, columns and experts in the stacked parameters."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    q, wide, shared = config.num_attention_heads * config.head_dim, config.expert_size, arch.shared_expert_size
    mu_rows = hidden if arch.contextual_mu else 0
    gate, up = slice(0, wide), slice(wide, 2 * wide)
    shared_up = slice(shared, 2 * shared)
    if arch.routes:
        half = shared + config.experts * wide
        gate, up, shared_up = slice(shared, half), slice(half + shared, 2 * half), slice(half, half + shared)
    return {
        "k": slice(0, kv), "q": slice(kv, kv + q), "v": slice(kv + q, 2 * kv + q),
        "x": slice(0, hidden), "mu": slice(hidden, 2 * hidden),
        "mu_proj": slice(0, mu_rows), "controller": slice(mu_rows, mu_rows + config.dynamics_controller_hidden),
        "experts": slice(0, config.experts), "gate": gate, "up": up, "all": slice(0, hidden),
        "shared_gate": slice(0, shared), "shared_up": shared_up,
        "shared_output": slice(0, 1), "routed_output": slice(1, 2),
    }  # fmt: skip


def plan(era: Era, model: DeepNetwork) -> dict[str, Entry]:
    """List every tensor name (without `model.`) of the era's files for this network, and where the tensor goes."""
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
            if place.side_by_side is not None:
                view = view.unflatten(place.side_by_side, (config.experts, -1)).movedim(place.side_by_side, 0)
                size = list(view.shape)
            if place.transposed:
                size[-2:] = size[:-3:-1]
            parts.append(Part(view, size[-1], place.transposed))
            shape = [1] * place.leading + size[:-1] + [sum(part.width for part in parts)]
            if place.leading < 0:
                shape.clear()
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
