"""Sampling defaults of a checkpoint, and the flags that replace them."""

from __future__ import annotations

import json

import pytest

from pyllm.server.flags import ConfigError
from pyllm.server.generation.defaults import read_defaults


def test_the_file_gives_values_of_the_right_type_only(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 1, "top_k": 50.0, "top_p": true, "min_p": "0.5", "max_new_tokens": 2.5}')
    defaults, _ = read_defaults(tmp_path)
    assert defaults.pop("top_k", 50) == 50
    assert defaults == {"temperature": 1.0}
    assert type(defaults["temperature"]) is float
    file.write_text('{"top_k": true, "max_new_tokens": false, "top_p": NaN, "temperature": 1e999}')
    assert read_defaults(tmp_path)[0] == {}


def test_the_file_gives_defaults_without_unusable_values(tmp_path, caplog):
    assert read_defaults(tmp_path)[0] == {}
    file = tmp_path / "generation_config.json"
    file.write_text(
        '{"temperature": 0.7, "top_k": 50, "top_p": 7, "max_new_tokens": 9, "min_p": "x", "eos_token_id": 0}'
    )
    assert read_defaults(tmp_path)[0] == {"temperature": 0.7, "top_k": 50, "max_tokens": 9}
    assert "top_p" in caplog.text
    for text in ("[]", "{", "\xff"):
        file.write_text(text, encoding="latin-1")
        assert read_defaults(tmp_path)[0] == {}
        with pytest.raises(ConfigError, match="cannot be read: it is not a JSON object"):
            read_defaults(tmp_path, str(tmp_path))


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
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
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
