"""The configuration of a Complexity-Deep network, and what its checkpoint's keys add to it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVATIONS = ("silu", "swish", "gelu", "relu")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one plain sentence with the path and the mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepConfig:
    """`config.json` of a Complexity-Deep checkpoint.

    Field names and defaults are those of the published files; keys that do not matter at inference
    (initial values of the dynamics, dropout, model_type …) are neither needed nor kept.
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
        """Raise `CheckpointError` where the sizes cannot make a network."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "num_experts",
                     "dynamics_controller_hidden"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} must be a positive whole number, got {value!r}.")
        for name in ("rms_norm_eps", "rope_theta", "dynamics_dt"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise CheckpointError(f"{name} must be a positive number, got {value!r}.")
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads of even size."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}.")
        for name in ("tie_word_embeddings", "use_token_routed_mlp", "use_qk_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, got {value!r}.")
        window = self.sliding_window
        if window is not None and (type(window) is not int or window < 1):
            raise CheckpointError(f"sliding_window must be null or a whole number of at least 1, got {window!r}.")
        if not all(type(id_) is int and 0 <= id_ < self.vocab_size for id_ in self.eos_token_ids):
            raise CheckpointError(f"eos_token_id must be ids below {self.vocab_size}, got {self.eos_token_id!r}.")
        if self.expert_size < 1:
            raise CheckpointError(
                f"intermediate_size {self.intermediate_size} is too small for {self.num_experts} experts."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeepConfig:
        """Take the known keys of a parsed `config.json`; raise `CheckpointError` for another family's file."""
        mlp_type = values.get("mlp_type")
        if mlp_type not in (None, "token_routed", "dense"):
            raise CheckpointError(f"mlp_type {mlp_type!r} belongs to another line of the family: not supported.")
        known = {f.name for f in dataclasses.fields(cls)}
        taken = {key: value for key, value in values.items() if key in known}
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if taken.get(name) == -1:  # some files say so for "none"
                taken[name] = None
        if isinstance(taken.get("eos_token_id"), list):
            taken["eos_token_id"] = tuple(taken["eos_token_id"])
        return cls(**taken)

    @classmethod
    def from_folder(cls, folder: str | Path) -> DeepConfig:
        """Read `config.json` in `folder`; raise `CheckpointError` if it is missing or unusable."""
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no config.json: pass the folder that holds config.json and model.safetensors."
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it again.") from None
        if not isinstance(values, dict) or "hidden_size" not in values or "vocab_size" not in values:
            raise CheckpointError(
                f"{path} is not the configuration of a Complexity-Deep model: it has no hidden_size and vocab_size."
            )
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to `config.json`."""
        return dataclasses.asdict(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> int:
        """Number of MLPs per layer: `num_experts`, or 1 for a dense model."""
        return self.num_experts if self.use_token_routed_mlp else 1

    @property
    def expert_size(self) -> int:
        """Width of one expert: `intermediate_size // experts`, which need not divide evenly."""
        return self.intermediate_size // self.experts

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a checkpoint's keys say of its network; eras differ in these and in nothing else.

    Attributes:
        era: name of the era, for people.
        dynamics: the INL dynamics (controller, velocity) are present.
        contextual_mu: `mu_proj` makes mu depend on the attention output.
        mu_attention: mu of the layer below feeds keys and queries.
        mu_highway: mu of all layers below feeds them (`mu_to_v` is the sign), and feeds values too.
        mu_router: mu may override the expert of a token's id.
        mu_guidance: the 2026-03 rewrite: no dynamics, mu computed after the MLP.
        shared_expert_size: width of the expert that every token passes; 0 for none.
        tied: the LM head is the embedding.
    """

    era: str
    dynamics: bool
    contextual_mu: bool
    mu_attention: bool
    mu_highway: bool
    mu_router: bool
    mu_guidance: bool = False
    shared_expert_size: int = 0
    tied: bool = True

    @classmethod
    def latest(cls, config: DeepConfig) -> Architecture:
        """The network of versions 0.12 to 0.14, the headline family."""
        return cls(
            era="0.12-0.14",
            dynamics=True,
            contextual_mu=True,
            mu_attention=True,
            mu_highway=True,
            mu_router=config.use_token_routed_mlp,
            tied=config.tie_word_embeddings,
        )
