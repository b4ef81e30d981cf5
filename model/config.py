"""The configuration of a Complexity-Deep network, and what a checkpoint's tensor names add to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import CheckpointError, folder_of, read_json, shown

ACTIVATIONS = ("silu", "swish", "gelu", "relu")
MAX_CONTEXT = 2**26
SIZES = {
    "vocab_size": (1, 2**22), "hidden_size": (1, 2**17), "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10), "num_attention_heads": (1, 2**10), "num_key_value_heads": (1, 2**10),
    "max_position_embeddings": (2, MAX_CONTEXT), "num_experts": (1, 2**10), "dynamics_controller_hidden": (1, 2**17),
}  # fmt: skip
"""The least and the most that each may be: many times what any published model has."""


def read_generation_config(folder: Path, source: str = "auto") -> tuple[dict[str, Any], Path]:
    """Return the object in a checkpoint's `generation_config.json`, empty if it has none, and the file's path.

    `source` is "auto" (the checkpoint's `folder`), another folder that must have the file, or "none" (in vLLM's words
    "vllm"). Raises `CheckpointError` for a file that is broken or missing.
    """
    path = (folder if source == "auto" else Path(source)) / "generation_config.json"
    values = None if source in ("none", "vllm") else read_json(path)
    if values is None and source not in ("auto", "none", "vllm"):
        raise CheckpointError(
            f"{path}, which --generation-config names, does not exist: pass the folder that holds it."
        )
    return values or {}, path


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepConfig:
    """`config.json` of a Complexity-Deep checkpoint, with the published names and defaults.

    Keys that do not matter for inference (initial values of the dynamics, dropout, model_type …) are dropped.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 0
    use_token_routed_mlp: bool = True
    num_experts: int = 4
    use_qk_norm: bool = True
    sliding_window: int | None = None
    dynamics_dt: float = 0.1
    dynamics_controller_hidden: int = 64

    def __post_init__(self) -> None:
        """Raise `CheckpointError` for values that no network can have."""

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise CheckpointError(message)

        for name, (low, high) in SIZES.items():
            value = getattr(self, name)
            whole = type(value) is int and low <= value <= high
            require(whole, f"{name} must be a whole number between {low} and {high}, but got {shown(value)}.")
        for name in ("rms_norm_eps", "rope_theta", "dynamics_dt"):
            value = getattr(self, name)
            number = type(value) in (int, float) and 1e-30 <= value <= 1e30
            require(number, f"{name} must be a positive number that FP32 can hold, but got {shown(value)}.")
        for name in ("tie_word_embeddings", "use_token_routed_mlp", "use_qk_norm"):
            value = getattr(self, name)
            require(type(value) is bool, f"{name} must be true or false, but got {shown(value)}.")
        size, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        even = size % heads == 0 and size // heads % 2 == 0
        require(even, f"hidden_size {size} cannot be split into {heads} heads of even size.")
        multiple = heads % kv_heads == 0
        require(multiple, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
        act, window = self.hidden_act, self.sliding_window
        require(act in ACTIVATIONS, f"hidden_act {shown(act)} is not one of {', '.join(ACTIVATIONS)}.")
        require(
            window is None or (type(window) is int and 1 <= window <= MAX_CONTEXT),
            f"sliding_window must be null or a whole number between 1 and {MAX_CONTEXT}, but got {shown(window)}.",
        )
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            require(value is None or type(value) is int, f"{name} must be an id or null, but got {shown(value)}.")
        require(
            all(type(id_) is int and 0 <= id_ < self.vocab_size for id_ in self.eos_token_ids),
            f"eos_token_id must be ids below {self.vocab_size}, but got {shown(self.eos_token_id)}.",
        )
        too_small = f"intermediate_size {self.intermediate_size} is too small for {self.num_experts} experts."
        require(self.expert_size >= 1, too_small)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepConfig:
        """Read the known keys of a parsed `config.json`; raise `CheckpointError` for another family's file."""
        mlp_type = values.get("mlp_type")
        if mlp_type not in (None, "token_routed", "dense"):
            raise CheckpointError(
                f"mlp_type {shown(mlp_type)} belongs to another line of the family and is not supported."
            )
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if known.get(name) == -1:  # some files write -1 for none
                known[name] = None
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**known)

    @classmethod
    def from_folder(cls, folder: str | Path, generation_config: str = "auto") -> DeepConfig:
        """Read `config.json` in `folder`, and the further end tokens of its `generation_config.json`.

        `generation_config` is where that file is, as for `read_generation_config`. Raises `CheckpointError` if a file
        is missing or invalid.
        """
        path = folder_of(Path(folder)) / "config.json"
        values = read_json(path)
        if values is None:
            raise CheckpointError(
                f"{folder} has no config.json: pass the folder that holds config.json and model.safetensors."
            )
        if "hidden_size" not in values or "vocab_size" not in values:
            raise CheckpointError(
                f"{path} is not the configuration of a Complexity-Deep model: it has no hidden_size and vocab_size."
            )
        generation, origin = read_generation_config(path.parent, generation_config)
        try:
            config = cls.from_dict(values)
            path = origin  # of an error from here on
            ends = cls.from_dict(values | {"eos_token_id": generation.get("eos_token_id")}).eos_token_ids
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if ends:
            config = dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys(config.eos_token_ids + ends)))
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> int:
        """Number of MLPs per layer: `num_experts`, or 1 for a dense model."""
        return self.num_experts if self.use_token_routed_mlp else 1

    @property
    def expert_size(self) -> int:
        """Width of one expert; the division may have a remainder."""
        return self.intermediate_size // self.experts

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How the network of one era differs from the others, as a checkpoint's tensor names show."""

    era: str  # its name, only for display
    contextual_mu: bool  # `mu_proj` makes mu depend on the attention output
    mu_attention: bool  # mu of the layer below feeds keys and queries
    mu_highway: bool  # mu of all layers below feeds them, and values too; files then have `mu_to_v`
    mu_router: bool  # mu may override the expert of a token's id
    mu_guidance: bool = False  # the 2026-03 rewrite: mu is computed after the MLP, without dynamics or velocity
    shared_expert_size: int = 0  # width of the expert that every token uses; 0 for none
    tied: bool = True  # the LM head is the embedding

    @classmethod
    def latest(cls, config: DeepConfig) -> Architecture:
        """Return the network of versions 0.12 to 0.14, the headline family."""
        routed, tied = config.use_token_routed_mlp, config.tie_word_embeddings
        return cls(era="0.12-0.14", contextual_mu=True, mu_attention=True, mu_highway=True, mu_router=routed, tied=tied)
