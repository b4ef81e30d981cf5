"""Prompts of the TR-Hash line longer than a step's budget, against the equations written a second time.

The family's own server takes the end of each part of a prompt for a generated token, so every prompt of more than 512
tokens goes wrong there. The published fixtures are shorter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hash_engine import assert_engine_equals
from support.hash_reference import CONFIG, made_file, write_file

SHAPE_200M = CONFIG | {
    "hidden_size": 896, "num_hidden_layers": 16, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 256, "shared_intermediate_size": 3072, "vocab_size": 32000, "norm_eps": 1e-6,
    "rope_theta": 10000.0, "top_k_primary_weight": 0.5, "shared_output_scale": 1.0, "routed_output_scale": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "lengths"),
    [(CONFIG, [900, 530, 40, 513]), pytest.param(SHAPE_200M, [500, 1900], marks=pytest.mark.slow)],
    ids=["a small network", "the 200M shape"],
)
def test_prompts_longer_than_a_step_equal_the_equations(config: dict, lengths: list[int], tmp_path: Path) -> None:
    file = made_file(config, "native")
    write_file(tmp_path, config, file)
    assert_engine_equals(tmp_path, config, file, lengths, 2e-5)
