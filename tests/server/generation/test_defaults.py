"""Sampling defaults of a checkpoint, and the flags that replace them."""

from __future__ import annotations

import json

import pytest

from pyllm.model import CheckpointError
from pyllm.server.flags import ConfigError
from pyllm.server.generation.defaults import read_defaults


def test_the_file_gives_values_in_their_fields_types(tmp_path):
    assert read_defaults(tmp_path)[0] == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 1, "top_k": 50, "top_p": null, "max_new_tokens": 9, "eos_token_id": 0}')
    defaults, _ = read_defaults(tmp_path)
    assert defaults == {"temperature": 1.0, "top_k": 50, "max_tokens": 9}
    assert type(defaults["temperature"]) is float


@pytest.mark.parametrize(
    "value", ['{"top_p": 7}', '{"top_k": 50.5}', '{"top_p": true}', '{"min_p": "0.5"}', '{"top_p": NaN}']
)
def test_an_unusable_value_of_the_file_is_refused(tmp_path, value):
    file = tmp_path / "generation_config.json"
    file.write_text(value)
    (key,) = json.loads(value)
    with pytest.raises(CheckpointError) as caught:
        read_defaults(tmp_path)
    assert str(caught.value).startswith(f"{file} has {key} = ")
    assert str(caught.value).endswith(f"""or pass --override-generation-config '{{"{key}": null}}'.""")
    assert read_defaults(tmp_path, override={key: None})[0] == {}


@pytest.mark.parametrize("text", ["[]", "{", "\xff"])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    for source in ("auto", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"generation_config\.json .+: fetch it again"):
            read_defaults(tmp_path, source)
    assert read_defaults(tmp_path, "none")[0] == {}


def test_without_sampling_answers_are_greedy(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": false}')
    values, said = read_defaults(tmp_path)
    assert values == {"temperature": 0.0}
    assert said == "temperature = 0.0 from the checkpoint's generation_config.json; else OpenAI's"
    file.write_text('{"do_sample": false, "temperature": 0.9, "top_p": 0.6}')
    assert read_defaults(tmp_path)[0] == {"temperature": 0.0, "top_p": 0.6}
    assert read_defaults(tmp_path, override={"temperature": 0.5})[0] == {"temperature": 0.5, "top_p": 0.6}
    file.write_text('{"do_sample": true}')
    assert read_defaults(tmp_path)[0] == {}


def test_keys_without_effect_are_named_in_the_log(tmp_path, caplog):
    file = tmp_path / "generation_config.json"
    file.write_text('{"num_beams": 4, "typical_p": 1.0, "min_length": 0, "bad_words_ids": [[1]], "max_length": 20}')
    read_defaults(tmp_path)
    assert f"{file} sets bad_words_ids, num_beams, which have no effect here." in caplog.text


def test_the_flags_choose_the_file_of_defaults_and_win_over_it(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, text in ((own, '{"temperature": 0.7, "top_k": 50}'), (other, '{"min_p": 0.1}')):
        folder.mkdir()
        (folder / "generation_config.json").write_text(text)
    assert read_defaults(own, "none") == read_defaults(own, "vllm") == ({}, "OpenAI's")
    values, said = read_defaults(own, str(other))
    assert values == {"min_p": 0.1}
    assert said == f"min_p = 0.1 from {other}'s generation_config.json; else OpenAI's"
    override = '{"top_k": null, "temperature": 0, "max_new_tokens": 7}'
    values, said = read_defaults(own, "auto", json.loads(override))
    assert values == {"temperature": 0.0, "max_tokens": 7}
    assert said == "temperature = 0.0, max_new_tokens = 7 from --override-generation-config; else OpenAI's"
    assert read_defaults(tmp_path, "auto", {"top_p": 0.5})[0] == {"top_p": 0.5}
    with pytest.raises(CheckpointError, match="which --generation-config names, does not exist"):
        read_defaults(own, str(tmp_path))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ('{"temprature": 1}', "'temprature', which is unknown; did you mean temperature?"),
        ('{"zzz": 1}', "known keys: temperature, top_p"),
        ('{"temperature": 3}', "temperature must be between 0 and 2, but got 3"),
        ('{"temperature": NaN}', "temperature must be between 0 and 2"),
        ('{"temperature": "hot"}', "Expected `float`, got `str`"),
        ('{"max_new_tokens": 0}', "max_new_tokens must be at least 1"),
        ('{"top_k": 1.5}', "Expected `int`"),
    ],
)
def test_an_unusable_override_is_refused_in_one_sentence(tmp_path, override, sentence):
    with pytest.raises(ConfigError) as caught:
        read_defaults(tmp_path, "auto", json.loads(override))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
