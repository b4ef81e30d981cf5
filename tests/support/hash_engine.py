"""Compares the engine with the equations of the TR-Hash line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.hash_reference import Tensors, hash_logits

from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import EngineRequest, SamplingParams

NEW = 12


def assert_engine_equals(
    folder: Path, config: dict[str, Any], file: Tensors, lengths: list[int], bound: float, **settings: Any
) -> torch.Tensor:
    """Prompts of these lengths at once: the log-probability of each prompt token, and greedy tokens; the last text."""
    settings = {"dtype": "float32", "device": "cpu", "quiet": True, "max_num_seqs": 8} | settings
    core = build_engine(EngineConfig(model=str(folder), **settings))
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
    return ids
