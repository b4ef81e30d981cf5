"""Prompts of the TR-Hash line longer than a step's budget, against the equations written a second time.

The family's own server takes the end of each part of a prompt for a generated token, so every prompt of more than 512
tokens goes wrong there. The published fixtures are shorter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.hash_reference import CONFIG, hash_logits, made_file, write_file

from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import EngineRequest, SamplingParams

SHAPE_200M = CONFIG | {
    "hidden_size": 896, "num_hidden_layers": 16, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 256, "shared_intermediate_size": 3072, "vocab_size": 32000, "norm_eps": 1e-6,
    "rope_theta": 10000.0, "top_k_primary_weight": 0.5, "shared_output_scale": 1.0, "routed_output_scale": 2.0,
}  # fmt: skip
NEW = 12


def check(folder: Path, config: dict[str, Any], lengths: list[int], bound: float) -> None:
    """All prompts at once: the log-probability of each prompt token, and greedy tokens."""
    file = made_file(config, "native")
    write_file(folder, config, file)
    core = build_engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", quiet=True, max_num_seqs=8))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, config["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0)
    for n, prompt in enumerate(prompts):
        core.add_request(EngineRequest(request_id=str(n), prompt_token_ids=prompt, params=params))
    tokens: list[list[int]] = [[] for _ in prompts]
    read: list[list[float]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step().outputs:
            tokens[int(output.request_id)] += output.token_ids
            read[int(output.request_id)] += [entry.logprob for entry in output.prompt_logprobs]
    for prompt, answer, logprobs in zip(prompts, tokens, read, strict=True):
        ids = torch.tensor(prompt + answer)
        true = hash_logits(file, config, ids)
        expected = true[:-1].log_softmax(-1).gather(1, ids[1:, None])[: len(prompt) - 1, 0]
        assert (torch.tensor(logprobs) - expected).abs().max() <= bound * true.abs().max()
        assert answer == true[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_prompts_longer_than_a_step_equal_the_equations(tmp_path: Path) -> None:
    check(tmp_path, CONFIG, [900, 530, 40, 513], 2e-5)


@pytest.mark.slow
def test_long_prompts_at_the_200m_shape(tmp_path: Path) -> None:
    check(tmp_path, SHAPE_200M, [500, 1900], 2e-5)
