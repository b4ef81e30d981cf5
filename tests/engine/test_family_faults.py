"""What the family's own servers get wrong, found by running them: each fault is a test that this engine passes.

A fault that is a change of the file or its configuration is planted in the equations: they then give what the faulty
server computes, which must not be what this engine computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from support.checkpoints import byte_tokenizer
from support.hash_engine import assert_engine_equals
from support.hash_reference import CONFIG, Tensors, hash_logits, made_file, write_file

from pyllm import LLM
from pyllm.engine.messages import SamplingParams
from pyllm.model import DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.server.generation.defaults import read_defaults

BOUND = 2e-5


@pytest.mark.parametrize(
    ("lengths", "tokens_a_step"), [([40], 39), ([40] * 8, 160), ([128] * 8, 500), ([600], 512)], ids=str
)
def test_the_end_of_a_chunk_is_no_generated_token(lengths: list[int], tokens_a_step: int, tmp_path: Path) -> None:
    """There it joined the output and shifted all positions after it, wherever a prompt was cut."""
    file = made_file(CONFIG, "native")
    write_file(tmp_path, CONFIG, file)
    assert_engine_equals(tmp_path, CONFIG, file, lengths, BOUND, max_num_batched_tokens=tokens_a_step)


def with_head_as_embedding(file: Tensors) -> Tensors:
    return file | {"embed_tokens.weight": file["lm_head.weight"]}


def with_other_experts(file: Tensors) -> Tensors:
    others = made_file(CONFIG, "native", seed=1)
    return {key: others[key] if "expert_" in key else value for key, value in file.items()}


def without_channels(file: Tensors) -> Tensors:
    return {key: value for key, value in file.items() if not key.endswith("hash_channel_scale")}


class Fault(NamedTuple):
    form: str
    config: dict[str, Any]  # what the configuration says
    misread: Mapping[str, Any] = MappingProxyType({})  # what the faulty server reads instead
    damage: Callable[[Tensors], Tensors] = dict  # what it makes of the file
    extras: bool = False  # output gates and modulated channels
    prefix: str = ""
    dtype: torch.dtype = torch.float32  # of the file


GATED = {"mlp_type": "token_routed", "use_shared_routed_gates": True, "learn_hash_channel_modulation": True}
MUP = {"use_mup_attn_scale": True, "use_mup_output_mult": True, "mup_base_width": 16}
FAULTS = {
    "no primary weight means 0.95 in engine models": Fault("native", {}, {"top_k_primary_weight": 0.95}),
    "no primary weight means 0.95 in exports of engine models": Fault(
        "export", {"source_mlp_type": "tr_hash_engine"}, {"top_k_primary_weight": 0.95}
    ),
    "scales of the first layer are ignored": Fault(
        "native", {"routed_output_scale_first_layer": 0.6}, {"routed_output_scale_first_layer": None}
    ),
    "scales of the last layer are ignored": Fault(
        "native", {"shared_output_scale_last_layer": 1.8}, {"shared_output_scale_last_layer": None}
    ),
    "gates replace the scales": Fault(
        "export", GATED, {"shared_output_scale": 1.0, "routed_output_scale": 1.0}, extras=True
    ),
    "modulated channels are dropped": Fault("export", GATED, damage=without_channels, extras=True),
    "sliding_window is ignored": Fault("native", {"sliding_window": 5}, {"sliding_window": None}),
    "muP is ignored": Fault("native", MUP, dict.fromkeys(MUP)),
    "untied heads crash, or replace the embedding": Fault(
        "native", {"tie_word_embeddings": False}, damage=with_head_as_embedding
    ),
    "with the prefix model. the experts stay random": Fault("native", {}, damage=with_other_experts, prefix="model."),
    "inv_freq is rounded in BF16": Fault("native", {}, {"rounded": torch.bfloat16}, dtype=torch.bfloat16),
    "inv_freq is rounded in FP16": Fault("native", {}, {"rounded": torch.float16}, dtype=torch.float16),
    "only two routes of a token can be loaded": Fault("native", {"num_experts": 8, "top_k": 4}),
    "one route of a token cannot be loaded": Fault("native", {"top_k": 1}),
    "no shared expert cannot be loaded": Fault("native", {"shared_intermediate_size": None}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_engine_has_not_this_fault(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    config = CONFIG | fault.config
    file = made_file(config, fault.form, extras=fault.extras)
    file = {key: value.to(fault.dtype) if value.is_floating_point() else value for key, value in file.items()}
    write_file(tmp_path, config, file, fault.prefix)
    ids = assert_engine_equals(tmp_path, config, file, [300 if fault.dtype != torch.float32 else 30], BOUND)
    if fault.misread or fault.damage is not dict:
        right, wrong = hash_logits(file, config, ids), hash_logits(fault.damage(file), config | fault.misread, ids)
        assert (wrong - right).abs().max() > 50 * BOUND * right.abs().max(), "the fault shows"


def test_saved_exports_keep_every_key_that_computes(tmp_path: Path) -> None:
    """The family's export script drops depth scales, muP and sliding_window, so that no server can be right."""
    config = CONFIG | MUP | {"sliding_window": 5, "routed_output_scale_first_layer": 0.6}
    config |= {"shared_output_scale_last_layer": 1.8, "top_k_primary_weight": 0.7}
    file = made_file(config, "native")
    write_file(tmp_path / "native", config, file)
    save_checkpoint(DeepForCausalLM.from_pretrained(tmp_path / "native"), tmp_path / "export", dtype=torch.float32)
    assert_engine_equals(tmp_path / "export", config, file, [30], BOUND)


@pytest.fixture
def agentic(tmp_path: Path) -> LLM:
    """A native file of the agentic tokenizer, whose configuration has no token ids."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|end_of_turn|>", "<|think_start|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    write_file(tmp_path, CONFIG, made_file(CONFIG, "native"))
    return LLM(str(tmp_path), dtype="float32", device="cpu", quiet=True)


def test_agentic_turns_end_at_both_marks(agentic: LLM) -> None:
    """There the end token is guessed from names, so chats do not stop at the end of a turn."""
    for mark in ("<|end_of_turn|>", "<|end|>"):
        (id_,) = agentic.tokenizer.encode_prompt(mark)
        params = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={id_: 100.0})
        (answer,) = agentic.generate([[5, 6, 7]], params)
        assert (answer.token_ids, answer.finish_reason) == ([id_], "stop")


def test_special_marks_can_be_kept_in_the_text(agentic: LLM) -> None:
    """There they vanish; how they split reasoning from answers, `test_sections.py` says."""
    (id_,) = agentic.tokenizer.encode_prompt("<|think_start|>")
    params = SamplingParams(temperature=0.0, max_tokens=2, logit_bias={id_: 100.0}, skip_special_tokens=False)
    assert agentic.generate([[5, 6, 7]], params)[0].text == "<|think_start|>" * 2


def test_identical_requests_are_computed_again(agentic: LLM) -> None:
    """There the second is answered from a cache of answers, which samples the same text again."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    texts = [tuple(answer.token_ids) for _ in range(2) for answer in agentic.generate([[5, 6, 7]] * 2, params)]
    assert len(set(texts)) == 4


def test_sampling_defaults_are_neutral(tmp_path: Path) -> None:
    """There they are temperature 0.8, top_k 50, top_p 0.9 and a repetition penalty of 1.1."""
    defaults = SamplingParams(**read_defaults(tmp_path)[0])
    neutral = (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p, defaults.repetition_penalty)
    assert neutral == (1.0, 0, 1.0, 0.0, 1.0)
