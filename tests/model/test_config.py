"""What a `config.json` may say, and how the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import TINY

from pyllm.model import Architecture, CheckpointError, DeepConfig, DeepForCausalLM

SIZES = TINY.to_dict()


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"sliding_window": "x"}, "sliding_window"),
        ({"sliding_window": 2.5}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": SIZES["vocab_size"]}, "eos_token_id"),
        ({"eos_token_id": [0, -2]}, "eos_token_id"),
        ({"num_experts": 500}, "experts"),
        ({"mlp_type": "mixture"}, "mlp_type"),
    ],
    ids=str,
)
def test_impossible_config_value_names_its_path(tmp_path: Path, changed, word):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changed))
    with pytest.raises(CheckpointError) as refused:
        DeepConfig.from_folder(tmp_path)
    message = str(refused.value)
    assert word in message
    assert str(tmp_path / "config.json") in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("content", [None, "{", "[]", '{"vocab_size": 5}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        DeepConfig.from_folder(tmp_path)


def test_minus_one_stands_for_no_special_token():
    config = DeepConfig.from_dict(SIZES | {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": -1})
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (None, None, ())


def test_several_end_tokens_and_unknown_keys_are_fine():
    config = DeepConfig.from_dict(SIZES | {"eos_token_id": [0, 3], "dynamics_alpha": 0.9, "model_type": "anything"})
    assert config.eos_token_ids == (0, 3)


def test_relu_is_only_for_dense_networks():
    config = DeepConfig.from_dict(SIZES | {"hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="relu"):
        DeepForCausalLM(config)
    rewrite = Architecture(
        era="2026-03", contextual_mu=False, mu_attention=True, mu_highway=False, mu_router=False,
        mu_guidance=True,
    )  # fmt: skip
    assert DeepForCausalLM(config, rewrite).architecture is rewrite
