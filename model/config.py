"""The configuration of a network of the family, with the facts that a checkpoint's tensor names add to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .files import CheckpointError, folder_of, read_json, read_text, shown

logger = logging.getLogger(__name__)

ACTIVATIONS = ("silu", "swish", "gelu", "relu")
MAX_CONTEXT = 2**26
SIZES = {
    "vocab_size": (1, 2**22), "hidden_size": (1, 2**17), "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10), "num_attention_heads": (1, 2**10), "num_key_value_heads": (1, 2**10),
    "max_position_embeddings": (2, MAX_CONTEXT), "num_experts": (1, 2**10), "dynamics_controller_hidden": (1, 2**17),
    "mup_base_width": (1, 2**17), "num_experts_per_tok": (1, 2**10), "top_k": (0, 2**22),
    "shared_intermediate_size": (1, 2**20),
}  # fmt: skip
"""The lowest and highest value of each: many times those of any published model."""
OPTIONAL_SIZES = ("num_experts", "num_experts_per_tok", "top_k", "shared_intermediate_size")
SWITCHES = (
    "tie_word_embeddings", "use_token_routed_mlp", "use_qk_norm", "use_mup_attn_scale", "use_mup_output_mult",
    "use_shared_routed_gates", "learn_hash_channel_modulation", "learn_hash_pair_gates", "lsh_routing",
)  # fmt: skip
SCALES = ("shared_output_scale", "routed_output_scale")
DEPTH_SCALES = tuple(f"{name}_{which}_layer" for name in SCALES for which in ("first", "last"))
HASH_TYPES = ("tr_hash_engine", "tr_hash_moe")
ROUTED_TYPES = ("token_routed", "sort_split", "sort_split_moe", "deterministic_moe", "complexity", *HASH_TYPES)
DENSE_TYPES = ("swiglu", "silu", "llama")
"""Names of `mlp_type`. The tensors decide which network a file has."""
DEFAULT_EXPERTS = 4
MAX_TOKENIZER_BYTES = 256 << 20  # the largest published one has 40 MB
TOKEN_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
"""The files that name a tokenizer's special tokens; the first one counts."""
DEFAULT = "the default"  # in place of a file's name, for an end token that no file names
AGENTIC_ENDS = ("<|end|>", "<|end_of_turn|>")
"""The ends of a conversation and of a turn in the agentic format; `config.json` can name only one."""


def read_generation_config(folder: Path, source: str = "auto") -> tuple[dict[str, Any], Path]:
    """Return the object in a checkpoint's `generation_config.json`, empty if it has none, and the file's path.

    `source` is "auto" (the checkpoint's `folder`), another folder that must have the file, or "none" (vLLM's word is
    "vllm"). Raises `CheckpointError` for a file that is broken or missing.
    """
    path = (folder if source == "auto" else Path(source)) / "generation_config.json"
    values = None if source in ("none", "vllm") else read_json(path)
    if values is None and source not in ("auto", "none", "vllm"):
        raise CheckpointError(
            f"{path}, which --generation-config names, does not exist: pass the folder that holds it."
        )
    return values or {}, path


@dataclass(frozen=True, kw_only=True)
class DeepConfig:
    """`config.json` of a checkpoint, with the published names and defaults.

    Keys that do not matter for inference (initial values of the dynamics, dropout, model_type …) are dropped, and so
    are those that have one supported value. Some exist only in the TR-Hash line; `checkpoint.eras` compares them with
    the file's tensors.
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
    num_experts: int | None = None  # None: `DEFAULT_EXPERTS`, or as many as the tensors show
    use_qk_norm: bool = True
    sliding_window: int | None = None
    dynamics_dt: float = 0.1
    dynamics_controller_hidden: int = 64
    use_mup_attn_scale: bool = False
    use_mup_output_mult: bool = False
    mup_base_width: int = 256
    mlp_type: str | None = None
    source_mlp_type: str | None = None  # of an export, the type from which it was made
    num_experts_per_tok: int | None = None
    top_k: int | None = (
        None  # means the same if `num_experts_per_tok` is absent; in some files it is a sampling default
    )
    top_k_primary_weight: float | None = None
    shared_intermediate_size: int | None = None
    shared_output_scale: float = 1.0
    shared_output_scale_first_layer: float | None = None
    shared_output_scale_last_layer: float | None = None
    routed_output_scale: float = 1.0
    routed_output_scale_first_layer: float | None = None
    routed_output_scale_last_layer: float | None = None
    use_shared_routed_gates: bool = False
    learn_hash_channel_modulation: bool = False
    learn_hash_pair_gates: bool = False
    lsh_routing: bool = False

    def __post_init__(self) -> None:
        """Raise `CheckpointError` for values that no network can have."""

        for name, (low, high) in SIZES.items():
            value = getattr(self, name)
            whole = (type(value) is int and low <= value <= high) or (value is None and name in OPTIONAL_SIZES)
            _require(whole, f"{name} must be a whole number between {low} and {high}, but got {shown(value)}.")
        for name in ("rms_norm_eps", "rope_theta", "dynamics_dt"):
            value = getattr(self, name)
            number = type(value) in (int, float) and 1e-30 <= value <= 1e30
            _require(number, f"{name} must be a positive number that FP32 can hold, but got {shown(value)}.")
        for name in (*SCALES, *DEPTH_SCALES, "top_k_primary_weight"):
            value = getattr(self, name)
            number = (type(value) in (int, float) and abs(value) <= 1e30) or (value is None and name not in SCALES)
            _require(number, f"{name} must be a number that FP32 can hold, but got {shown(value)}.")
        for name in SWITCHES:
            value = getattr(self, name)
            _require(type(value) is bool, f"{name} must be true or false, but got {shown(value)}.")
        size, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        even = size % heads == 0 and size // heads % 2 == 0
        _require(even, f"hidden_size {size} cannot be split into {heads} heads of even size.")
        multiple = heads % kv_heads == 0
        _require(multiple, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
        act, window = self.hidden_act, self.sliding_window
        _require(act in ACTIVATIONS, f"hidden_act {shown(act)} is not one of {', '.join(ACTIVATIONS)}.")
        _require(
            window is None or (type(window) is int and 1 <= window <= MAX_CONTEXT),
            f"sliding_window must be null or a whole number between 1 and {MAX_CONTEXT}, but got {shown(window)}.",
        )
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            _require(value is None or type(value) is int, f"{name} must be an id or null, but got {shown(value)}.")
        _require(
            all(type(id_) is int and 0 <= id_ < self.vocab_size for id_ in self.eos_token_ids),
            f"eos_token_id must be ids below {self.vocab_size}, but got {shown(self.eos_token_id)}.",
        )
        too_small = f"intermediate_size {self.intermediate_size} is too small for {self.experts} experts."
        _require(self.expert_size >= 1, too_small)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepConfig:
        """Read the known keys of a parsed `config.json`; raise `CheckpointError` for another family's file."""
        mlp_type = values.get("mlp_type")
        if mlp_type not in (None, *ROUTED_TYPES, *DENSE_TYPES):
            raise CheckpointError(
                f"mlp_type {shown(mlp_type)} belongs to another line of the family and is not supported."
            )
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        known.setdefault("use_token_routed_mlp", mlp_type not in DENSE_TYPES)
        if known.get("shared_intermediate_size", 0) is None:
            known["shared_intermediate_size"] = values.get("intermediate_size")
        known |= _shared_value("rms_norm_eps", values, values.get("norm_eps"), "norm_eps")
        rope = values.get("rope_parameters")
        inner = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        known |= _shared_value("rope_theta", values, inner, "rope_parameters.rope_theta")
        known |= {name: _ids(known[name]) for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in known}
        if (kind := values.get("attention_type")) in ("mha", "multi_head"):
            known["num_key_value_heads"] = known.get("num_attention_heads", 12)
        elif kind in ("mqa", "multi_query"):
            known["num_key_value_heads"] = 1
        config = cls(**known)
        config._refuse_others(values)
        return config

    def _refuse_others(self, values: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` for a key that means another network; warn of one without effect."""
        supported: dict[str, tuple[Any, ...]] = {
            "norm_type": ("rmsnorm", "rms", "llama"),
            "attention_type": ("gqa", "grouped_query", "mha", "multi_head", "mqa", "multi_query"),
            "is_causal": (True,),
            "active_num_experts": (self.experts,),
            "active_expert_width": (self.expert_size,),
        }
        for name, known in supported.items():
            value = values.get(name)
            _require(
                value is None or any(type(value) is type(each) and value == each for each in known),
                f"{name} {shown(value)} is not supported, only {' or '.join(map(shown, known))}.",
            )
        for name in ("rope_scaling", "rope_parameters"):
            rope = values.get(name) or {}
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
            plain = kind in ("default", None) and not set(rope) - {"rope_type", "type", "rope_theta"}
            _require(plain, f"{name} {shown(rope)} is not supported: models of this family use plain rotary positions.")
        unused = {"rope_type": (None, "standard", "default"), "rope_fraction": (None, 1)}
        if odd := [f"{name} {shown(values[name])}" for name, usual in unused.items() if values.get(name) not in usual]:
            logger.warning("config.json has %s, which has no effect, as in the family's own code", " and ".join(odd))

    @classmethod
    def from_folder(cls, folder: str | Path, generation_config: str = "auto") -> DeepConfig:
        """Read `config.json` in `folder`, and the end tokens of its other files.

        Those of `generation_config.json` are added; the tokenizer's counts if `config.json` has none, and both of the
        agentic format always count. `generation_config` is the source of the first file, as in
        `read_generation_config`. Raises `CheckpointError` if a file is missing or invalid.
        """
        return read_config(folder, generation_config)[0]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> int:
        """Number of MLPs per layer: `num_experts`, or 1 for a dense model."""
        return (self.num_experts or DEFAULT_EXPERTS) if self.use_token_routed_mlp else 1

    @cached_property
    def attention_scale(self) -> float:
        """The factor of scores before softmax."""
        return 1.0 / self.head_dim if self.use_mup_attn_scale else 1.0 / math.sqrt(self.head_dim)

    @cached_property
    def logit_divisor(self) -> float:
        """The divisor of next tokens' scores."""
        return max(1.0, self.hidden_size / self.mup_base_width) if self.use_mup_output_mult else 1.0

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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _ids(value: Any) -> Any:
    """Return the ids that a key has, as one or a tuple; some files write -1 for none."""
    return tuple(value) if isinstance(value, list) else None if value == -1 else value


def read_config(folder: str | Path, generation_config: str = "auto") -> tuple[DeepConfig, dict[int, str]]:
    """Read a checkpoint's configuration as `DeepConfig.from_folder` does, and the file of each of its end tokens."""
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
        config = DeepConfig.from_dict(values)
        found = _tokenizer_ends(path, config, values.get("eos_token_id") is not None)
        path = origin  # the file to name in an error from here on
        ends = dataclasses.replace(config, eos_token_id=_ids(generation.get("eos_token_id"))).eos_token_ids
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    found |= {id_: origin.name for id_ in ends if id_ not in found}
    if tuple(found) != config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_id=tuple(found))
    return config, found


def _tokenizer_ends(path: Path, config: DeepConfig, given: bool) -> dict[int, str]:
    """Return the ids that end a text: those of the `config.json` at `path`, if `given` there, and the tokenizer's.

    Each has the name of the file it comes from.
    """
    own = dict.fromkeys(config.eos_token_ids, path.name if given else DEFAULT)
    folder = folder_of(path.parent, "tokenizer.json")
    try:
        library = json.loads(read_text(folder / "tokenizer.json", most=MAX_TOKENIZER_BYTES) or "{}")
        ids = {token["content"]: token["id"] for token in library.get("added_tokens") or ()}
        vocabulary = dict((library.get("model") or {}).get("vocab") or {})
        names = {name: (read_json(folder / name) or {}).get("eos_token") for name in TOKEN_NAMES}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # reading the tokenizer gives the reason
        return own
    file = next((file for file, name in names.items() if name), "")
    name = names.get(file)
    text = name.get("content") if isinstance(name, Mapping) else name
    named = [] if given or not isinstance(text, str) else [ids.get(text, vocabulary.get(text))]
    agentic = [ids.get(mark) for mark in AGENTIC_ENDS]
    ends, more = (
        [id_ for id_ in found if type(id_) is int and 0 <= id_ < config.vocab_size] for found in (named, agentic)
    )
    origins = dict.fromkeys(ends, file) or own
    marks = more if len(more) == len(agentic) else []
    return origins | {id_: "tokenizer.json" for id_ in marks if id_ not in origins}


def _shared_value(name: str, values: Mapping[str, Any], other: Any, other_name: str) -> dict[str, Any]:
    """Return the value of a key that has a second name, empty if neither is there; raise if the two differ."""
    if other is None:
        return {}
    own = other if values.get(name) is None else values[name]
    _require(own == other, f"{name} {shown(own)} and {other_name} {shown(other)} mean the same, but differ.")
    return {name: other}


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
    mu: bool = True  # False: neither mu nor velocity, as in the TR-Hash line and its dense sibling
    routes: int = 0  # experts that each id uses, as columns next to the shared expert's; 0: see `token_to_expert`
    output_gates: bool = False  # learned factors of the shared and the routed output
    channel_modulation: bool = False  # the id scales the channels of its experts

    @classmethod
    def latest(cls, config: DeepConfig) -> Architecture:
        """Return the network of versions 0.12 to 0.14, or that of the TR-Hash line if the configuration names it."""
        routed, tied = config.use_token_routed_mlp, config.tie_word_embeddings
        if config.mlp_type in (*HASH_TYPES, *DENSE_TYPES):
            return cls(
                era="TR-Hash", contextual_mu=False, mu_attention=False, mu_highway=False, mu_router=False,
                mu_guidance=False, tied=tied, mu=False,
                shared_expert_size=config.shared_intermediate_size or config.intermediate_size if routed else 0,
                routes=(config.num_experts_per_tok or config.top_k or 1) if routed else 0,
                output_gates=config.use_shared_routed_gates and routed,
                channel_modulation=config.learn_hash_channel_modulation and routed,
            )  # fmt: skip
        return cls(era="0.12-0.14", contextual_mu=True, mu_attention=True, mu_highway=True, mu_router=routed, tied=tied)
