"""Every key of `config.json` that the family knows, in files of every form: honoured, refused, or without effect.

Nothing that computes may be passed over. What the TR-Hash line computes is compared with the equations; in the files
with dynamics a key must change the scores, and `test_network.py` compares these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pytest
import torch
from support.checkpoint_files import CONFIG as DEEP
from support.checkpoint_files import canonical, load, refusal, rewritten
from support.hash_reference import CONFIG, Tensors, hash_logits, made_file, write_file

from pyllm.model import AttentionMetadata, DeepConfig
from pyllm.model.config import DENSE_TYPES, ROUTED_TYPES

HASH_FORMS = ("native", "export", "first route", "dense")
FORMS = (*HASH_FORMS, "0.12-0.14", "2026-03")
Effect = Literal["honoured", "refused", "none"]
COMPUTES: Effect = "honoured"
REFUSED: Effect = "refused"
NO_EFFECT: Effect = "none"
IN_EXPERTS = {"dense": NO_EFFECT, "0.12-0.14": REFUSED, "2026-03": REFUSED}
"""What a key means elsewhere that only experts by token id have."""
SWITCH = {"native": NO_EFFECT}
"""Of a switch for tensors that the file does not have; the newest code computes nothing with it."""
IGNORED: dict[str, Any] = {
    "use_mup_init": True, "route_hash_count": 7, "route_seed": 7, "routing_strategy": "modulo",
    "token_frequencies": [1, 2], "expert_initialization": "orthogonal", "use_cggr": "always", "use_sdpa": False,
    "use_custom_kernels": "never", "collect_moe_telemetry": True, "static_expert_capacity": True, "use_cache": False,
    "shared_expert_chunk_tokens": 3, "attention_dropout": 0.5, "initializer_range": 2.0, "hash_pair_gate_init": 9.0,
    "hash_channel_scale_init": 9.0, "shared_gate_init": 9.0, "routed_gate_init": 9.0, "lexical_gqa_rank": 99,
    "lexical_object_rank": 99, "lexical_zipf_mode": "frequency", "micro_num_experts": 9, "micro_expert_width": 9,
    "tr_mha_num_experts": 9, "tr_mha_targets": "o", "causal_state_rank": 9, "causal_stable_delta": True,
    "tie_lexical_object_embeddings": True, "lsh_bits": 4, "lsh_from_layer": 1,
    "model_type": "tr_hash_moe", "architectures": ["TrHash"], "auto_map": {}, "torch_dtype": "float16",
}  # fmt: skip
NULLS = dict.fromkeys(
    ("mlp_type", "source_mlp_type", "num_experts_per_tok", "top_k_primary_weight", "attention_type", "norm_type",
     "is_causal", "rope_scaling", "rope_parameters", "rope_type", "rope_fraction", "sliding_window",
     "active_num_experts", "active_expert_width", "shared_output_scale_first_layer", "shared_output_scale_last_layer",
     "routed_output_scale_first_layer", "routed_output_scale_last_layer", "token_frequencies", "head_dim")
)  # fmt: skip


class Key(NamedTuple):
    """One or more keys with values that matter, and their effect in each form of file."""

    values: dict[str, Any]
    effect: Effect
    elsewhere: Mapping[str, Effect] = MappingProxyType({})  # in forms where it is another
    word: str = ""  # in a refusal; the first key by default


def key(name: str, value: Any, effect: Effect, elsewhere: dict[str, Effect] | None = None, word: str = "") -> Key:
    return Key({name: value}, effect, elsewhere or {}, word)


KEYS: list[Key] = [
    key("mlp_type", "lsh_moe", REFUSED),
    key("mlp_type", "dense", REFUSED),
    key("mlp_type", ["swiglu"], REFUSED),
    key("norm_eps", 0.01, COMPUTES),
    key("rms_norm_eps", 0.01, COMPUTES),
    Key({"rms_norm_eps": 0.01, "norm_eps": 0.02}, REFUSED),
    Key({"rms_norm_eps": None, "norm_eps": 0.02}, COMPUTES),
    key("top_k", 1, REFUSED, {"first route": COMPUTES, "dense": NO_EFFECT, "0.12-0.14": NO_EFFECT,
                              "2026-03": NO_EFFECT}),
    key("top_k", 50, REFUSED, dict.fromkeys(FORMS[3:], NO_EFFECT)),  # there it is a sampling default
    key("top_k", 3, REFUSED, {"first route": COMPUTES, "dense": NO_EFFECT}),
    Key({"num_experts_per_tok": 2, "top_k": 50}, NO_EFFECT, {"0.12-0.14": REFUSED, "2026-03": REFUSED}),
    key("num_experts_per_tok", 3, REFUSED, {"first route": COMPUTES, "dense": NO_EFFECT}),
    key("top_k_primary_weight", 0.8, COMPUTES, dict.fromkeys(FORMS[3:], NO_EFFECT)),
    key("top_k_primary_weight", "half", REFUSED),
    key("source_mlp_type", "tr_hash_engine", NO_EFFECT, {"export": COMPUTES, "first route": COMPUTES}),
    *(key(f"{which}_output_scale{end}", 1.4, COMPUTES, IN_EXPERTS)
      for which in ("shared", "routed") for end in ("", "_first_layer", "_last_layer")),
    Key({"shared_output_scale_first_layer": 1.4, "shared_output_scale_last_layer": 0.3}, COMPUTES, IN_EXPERTS),
    key("routed_output_scale", None, REFUSED),
    key("shared_intermediate_size", 41, REFUSED, dict.fromkeys(FORMS[3:], NO_EFFECT)),
    key("shared_expert", False, NO_EFFECT),
    key("intermediate_size", 36, REFUSED, word="shape"),
    key("num_experts", 2, REFUSED, {"dense": NO_EFFECT}, "shape"),
    key("num_experts_per_tok", 0, REFUSED),
    key("attention_type", "delta", REFUSED),
    *(key("attention_type", kind, NO_EFFECT) for kind in ("gqa", "grouped_query")),
    *(key("attention_type", kind, REFUSED, word="k_proj") for kind in ("mha", "multi_head", "mqa", "multi_query")),
    key("num_key_value_heads", 1, REFUSED, word="k_proj"),
    key("num_attention_heads", 2, REFUSED, word="shape"),
    key("use_qk_norm", False, REFUSED, word="_norm.weight"),
    key("rope_theta", 300.0, COMPUTES),
    Key({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, COMPUTES),
    Key({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 300.0}}, REFUSED),
    key("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 300.0}}, REFUSED),
    key("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, REFUSED),
    key("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, REFUSED),
    key("rope_parameters", [], NO_EFFECT),
    key("rope_scaling", {"rope_type": "linear", "factor": 4.0}, REFUSED),
    key("rope_scaling", {"type": "dynamic"}, REFUSED),
    key("rope_scaling", {"type": "default"}, NO_EFFECT),
    key("rope_scaling", "yarn", REFUSED),
    key("rope_type", "yarn", NO_EFFECT),
    key("rope_fraction", 0.5, NO_EFFECT),
    key("use_mup_attn_scale", True, COMPUTES),
    Key({"use_mup_output_mult": True, "mup_base_width": 16}, COMPUTES),
    Key({"use_mup_output_mult": True, "mup_base_width": 256}, NO_EFFECT),
    key("mup_base_width", 16, NO_EFFECT),
    key("use_mup_attn_scale", "yes", REFUSED),
    key("sliding_window", 4, COMPUTES),
    key("norm_type", "layernorm", REFUSED),
    *(key("norm_type", kind, NO_EFFECT) for kind in ("rmsnorm", "rms", "llama")),
    key("is_causal", False, REFUSED),
    key("is_causal", True, NO_EFFECT),
    key("active_num_experts", 2, REFUSED),
    key("active_expert_width", 4, REFUSED),
    key("hidden_act", "gelu", NO_EFFECT, {"dense": COMPUTES, "0.12-0.14": COMPUTES}),
    key("hidden_act", "tanh", REFUSED),
    key("use_shared_routed_gates", True, REFUSED, SWITCH | {"dense": NO_EFFECT}),
    key("learn_hash_channel_modulation", True, REFUSED, SWITCH | {"dense": NO_EFFECT}),
    key("learn_hash_pair_gates", True, REFUSED, SWITCH),
    key("lsh_routing", True, REFUSED, SWITCH),
    key("tie_word_embeddings", False, REFUSED, word="lm_head"),
    key("vocab_size", 601, REFUSED, word="shape"),
    key("hidden_size", 64, REFUSED, word="shape"),
    key("num_hidden_layers", 4, REFUSED, word="lacks"),
    key("dynamics_dt", 0.7, NO_EFFECT, {"0.12-0.14": COMPUTES}),
    key("dynamics_controller_hidden", 7, NO_EFFECT, {"0.12-0.14": REFUSED}, "shape"),
    key("use_token_routed_mlp", False, NO_EFFECT, dict.fromkeys(FORMS[4:], REFUSED), "mlp."),
    Key({"active_num_experts": 4, "active_expert_width": 8}, NO_EFFECT, dict.fromkeys(FORMS[3:], REFUSED)),
    Key(NULLS, NO_EFFECT),
    Key(IGNORED, NO_EFFECT),
]  # fmt: skip


def forward(folder: Path) -> torch.Tensor:
    model, _ = load(folder)
    ids = some_ids(model.config.vocab_size)
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(len(ids)), AttentionMetadata.without_cache([len(ids)])))


def some_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, min(vocab_size, 48), (24,), generator=torch.Generator().manual_seed(5))


def made(form: str) -> tuple[dict[str, Any], Tensors]:
    """The configuration and tensors of a file."""
    if form in HASH_FORMS:
        config = CONFIG | {"hidden_act": "silu"}
        config |= {"mlp_type": "swiglu", "num_experts": 1} if form == "dense" else {}
        return config, made_file(config, form)
    file = canonical() if form == FORMS[4] else rewritten()
    return {name: value for name, value in DEEP.to_dict().items() if value is not None}, file


def changed(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The configuration with these keys; the other name of a changed key is gone, unless that is among them."""
    names = {"norm_eps", "rms_norm_eps"}
    dropped = names if names & values.keys() else set()
    return {name: value for name, value in config.items() if name not in dropped} | values


@pytest.mark.parametrize("form", FORMS)
def test_no_key_is_passed_over(form: str, tmp_path: Path) -> None:
    """All keys in one test, since only their configurations differ."""
    config, file = made(form)
    plain = forward(write_file(tmp_path, config, file))
    scale = plain.abs().max()
    for values, effect, elsewhere, word in KEYS:
        own, wanted = changed(config, values), elsewhere.get(form, effect)
        (tmp_path / "config.json").write_text(json.dumps(own))
        if wanted == REFUSED:
            sentence = refusal(tmp_path)
            assert (word if word in sentence else next(iter(values))) in sentence, (values, sentence)
            continue
        scores = forward(tmp_path)
        error = float((scores - plain).abs().max() / scale)
        assert error > 1e-4 if wanted == COMPUTES else error == 0, (values, error)
        if wanted == COMPUTES and form in HASH_FORMS:
            expected = hash_logits(file, equations(own), some_ids(own["vocab_size"]))
            assert (scores - expected).abs().max() <= 2e-5 * expected.abs().max(), values


def equations(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the names that the equations have."""
    eps = config.get("norm_eps") or config["rms_norm_eps"]
    theta = config["rope_theta"] or config["rope_parameters"]["rope_theta"]
    return config | {"norm_eps": eps, "rope_theta": theta}


@pytest.mark.parametrize("form", HASH_FORMS)
def test_tensors_decide_whatever_the_mlp_is_called(form: str, tmp_path: Path) -> None:
    config, file = made(form)
    expected = forward(write_file(tmp_path, config, file))
    for name in (*ROUTED_TYPES, *DENSE_TYPES):
        (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_type": name}))
        assert torch.equal(forward(tmp_path), expected), name


def test_the_keys_are_all_that_the_configuration_has() -> None:
    """A new field of `DeepConfig` needs a row."""
    tried = {name for row in KEYS for name in row.values}
    others = {"max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
    assert DeepConfig().to_dict().keys() - tried == others
