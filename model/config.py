"""The configuration of a Complexity-Deep network, and what a checkpoint's tensor names add to it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVATIONS = ("silu", "swish", "gelu", "relu")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "num_experts", "dynamics_controller_hidden",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the path and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a checkpoint; raise `CheckpointError` if it is broken."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: fetch it again.")
    return values


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

        for name in SIZES:
            value = getattr(self, name)
            require(type(value) is int and value >= 1, f"{name} must be a positive whole number, but got {value!r}.")
        for name in ("rms_norm_eps", "rope_theta", "dynamics_dt"):
            value = getattr(self, name)
            number = type(value) in (int, float) and 0 < value < math.inf
            require(number, f"{name} must be a positive number, but got {value!r}.")
        for name in ("tie_word_embeddings", "use_token_routed_mlp", "use_qk_norm"):
            value = getattr(self, name)
            require(type(value) is bool, f"{name} must be true or false, but got {value!r}.")
        size, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        even = size % heads == 0 and size // heads % 2 == 0
        require(even, f"hidden_size {size} cannot be split into {heads} heads of even size.")
        multiple = heads % kv_heads == 0
        require(multiple, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
        act, window = self.hidden_act, self.sliding_window
        require(act in ACTIVATIONS, f"hidden_act {act!r} is not one of {', '.join(ACTIVATIONS)}.")
        require(
            window is None or (type(window) is int and window >= 1),
            f"sliding_window must be null or a whole number of at least 1, but got {window!r}.",
        )
        require(
            all(type(id_) is int and 0 <= id_ < self.vocab_size for id_ in self.eos_token_ids),
            f"eos_token_id must be ids below {self.vocab_size}, but got {self.eos_token_id!r}.",
        )
        too_small = f"intermediate_size {self.intermediate_size} is too small for {self.num_experts} experts."
        require(self.expert_size >= 1, too_small)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeepConfig:
        """Read the known keys of a parsed `config.json`; raise `CheckpointError` for another family's file."""
        mlp_type = values.get("mlp_type")
        if mlp_type not in (None, "token_routed", "dense"):
            raise CheckpointError(f"mlp_type {mlp_type!r} belongs to another line of the family and is not supported.")
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if known.get(name) == -1:  # some files write -1 for none
                known[name] = None
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**known)

    @classmethod
    def from_folder(cls, folder: str | Path) -> DeepConfig:
        """Read `config.json` in `folder`; raise `CheckpointError` if it is missing or invalid."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no config.json: pass the folder that holds config.json and model.safetensors."
            )
        values = read_json(path)
        if "hidden_size" not in values or "vocab_size" not in values:
            raise CheckpointError(
                f"{path} is not the configuration of a Complexity-Deep model: it has no hidden_size and vocab_size."
            )
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

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
