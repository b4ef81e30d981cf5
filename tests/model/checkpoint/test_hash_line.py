"""The TR-Hash line: files of every form against the equations written a second time, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import load, refusal
from support.hash_reference import CONFIG, Tensors, hash_logits, made_file, write_file

from pyllm.model import AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint

VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {  # form, changes, with gates and modulated channels
    "native": ("native", {}, False),
    "native, four of eight": ("native", {"num_experts": 8, "top_k": 4, "top_k_primary_weight": 0.4}, False),
    "native, two weights": ("native", {"top_k_primary_weight": 0.7}, False),
    "native, a weight above 1": ("native", {"top_k_primary_weight": 1.5}, False),
    "native, no shared expert": ("native", {"shared_intermediate_size": None}, False),
    "native, one expert": ("native", {"top_k": 1}, False),
    "native, untied, no QK-norm": ("native", {"tie_word_embeddings": False, "use_qk_norm": False}, False),
    "export": ("export", {}, False),
    "export of an engine": ("export", {"source_mlp_type": "tr_hash_engine"}, False),
    "export, gates, channels": ("export", {"mlp_type": "token_routed", "use_shared_routed_gates": True}, True),
    "export, five experts, three of them": ("export", {"num_experts": 5, "intermediate_size": 40, "top_k": 3}, False),
    "first route": ("first route", {"num_experts_per_tok": 2, "top_k": 50}, False),
    "first route, four": ("first route", {"top_k": 4}, True),
    "dense": ("dense", {"mlp_type": "swiglu", "num_experts": 1}, False),
    "dense, called routed": ("dense", {"num_experts": 1}, False),
}  # fmt: skip


def forward(model: DeepForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(len(ids)), AttentionMetadata.without_cache([len(ids)])))


def some_ids(count: int = 24) -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (count,), generator=torch.Generator().manual_seed(5))


def assert_equals_reference(folder: Path, config: dict[str, Any], file: Tensors) -> None:
    expected = hash_logits(file, config, some_ids())
    logits = forward(DeepForCausalLM.from_pretrained(folder), some_ids())
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_equals_the_equations_and_round_trips(name: str, tmp_path: Path) -> None:
    form, changes, extras = VARIANTS[name]
    config = CONFIG | changes
    file = made_file(config, form, extras=extras)
    if config["shared_intermediate_size"] is None:
        config["shared_expert"] = False
    write_file(tmp_path / "file", config, file, prefix="model." * extras)
    assert_equals_reference(tmp_path / "file", config, file)
    model = DeepForCausalLM.from_pretrained(tmp_path / "file")
    save_checkpoint(model, tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(
        forward(DeepForCausalLM.from_pretrained(tmp_path / "saved"), some_ids()), forward(model, some_ids())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_inv_freq_is_not_used(dtype: torch.dtype, tmp_path: Path) -> None:
    file = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in made_file(CONFIG, "native").items()
    }
    write_file(tmp_path, CONFIG, file)
    assert_equals_reference(tmp_path, CONFIG, file)


@pytest.mark.parametrize("kind", ["mha", "multi_head", "mqa", "multi_query"])
def test_attention_type_overrules_the_number_of_kv_heads(kind: str, tmp_path: Path) -> None:
    true = CONFIG | {"num_key_value_heads": 4 if kind.startswith(("mha", "multi_head")) else 1}
    file = made_file(true, "native")
    write_file(tmp_path, CONFIG | {"attention_type": kind}, file)
    assert_equals_reference(tmp_path, true, file)


def test_rope_keys_without_effect_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_file(tmp_path, CONFIG | {"rope_type": "yarn", "rope_fraction": 0.5}, made_file(CONFIG, "native"))
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "config.json has rope_type 'yarn' and rope_fraction 0.5, which has no effect, as in the family's own code"
    ]


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("native", lambda f: f.pop("layers.1.mlp.engine.route_table"), "lacks layers.1.mlp.engine.route_table"),
        ("export", lambda f: f.pop("layers.1.mlp.topk_token_to_expert"), "lacks layers.1.mlp.topk_token_to_expert"),
        ("first route", lambda f: f.pop("layers.1.mlp.token_to_expert"), "lacks layers.1.mlp.token_to_expert"),
        ("native", lambda f: f["layers.2.mlp.engine.route_table"].fill_(4), "refers to experts 4 to 4"),
        ("native", lambda f: f.update({"layers.0.mlp.engine.route_table": torch.zeros(2, 599).long()}), "[2, 599]"),
        ("export", lambda f: f.update({"layers.0.mlp.hash_pair_gate_logits": torch.ones(6)}), "hash_pair_gate_logits"),
        ("native", lambda f: f.update({"layers.0.mlp.engine.lsh_planes": torch.ones(6)}), "lsh_planes"),
        ("native", lambda f: f.update({"norm.bias": torch.ones(48)}), "norm.bias"),
        ("export", lambda f: f.update({"token_scale": torch.ones(600)}), "token_scale"),
        ("native", lambda f: f.update({"layers.0.mlp.engine.micro_gate": torch.ones(4)}), "micro_gate"),
        ("dense", lambda f: f.update({"layers.0.mlp.object_gate": torch.ones(4)}), "object_gate"),
        ("export", lambda f: f.update({"layers.0.mlp.shared_output_gate": torch.tensor(1.0)}), "_output_gate"),
    ],
)
def test_files_that_no_such_network_has_are_refused(form: str, change: Any, words: str, tmp_path: Path) -> None:
    config = CONFIG | ({"mlp_type": "swiglu", "num_experts": 1} if form == "dense" else {})
    file = made_file(config, form)
    change(file)
    write_file(tmp_path, config, file)
    assert words in refusal(tmp_path)


def test_derived_tensors_are_not_read(tmp_path: Path) -> None:
    file = made_file(CONFIG, "export")
    derived: Tensors = {
        "layers.0.mlp.last_shared_rms": torch.tensor(float("nan")),
        "layers.0.mlp.expert_counts": torch.ones(4),
    }
    derived["layers.1.mlp.pair_hash_route_codes"] = torch.zeros(600, dtype=torch.uint8)
    derived["layers.1.mlp.pair_hash_expert_pairs"] = torch.zeros(6, 2, dtype=torch.int32)
    derived["layers.1.mlp.last_routed_rms"] = torch.tensor(1.0)
    write_file(tmp_path, CONFIG, file | derived)
    assert_equals_reference(tmp_path, CONFIG, file)


@pytest.mark.parametrize("inside", [False, True])
def test_the_newest_of_many_checkpoints_is_taken(inside: bool, tmp_path: Path) -> None:
    files = {n: made_file(CONFIG, "native", seed=n) for n in (9, 10, 11)}
    for n, file in files.items():
        pack = write_file(tmp_path / f"token_pack_{n:03}_{n}B", CONFIG, file)
        if not inside:
            (pack / "config.json").rename(tmp_path / "config.json")
    assert_equals_reference(tmp_path, CONFIG, files[11])


def test_sizes_and_active_parameters_are_named(tmp_path: Path) -> None:
    model, report = load(write_file(tmp_path, CONFIG, made_file(CONFIG, "native")))
    assert report.era == "TR-Hash native"
    assert report.parameters - model.active_parameters == 3 * 2 * 3 * 48 * 8  # layers, experts, matrices of H x W
    assert model.sizes == (
        "3 layers of width 48, 4 heads with 2 for keys and values, a shared expert of width 40 and 2 of 4 experts of "
        "width 8, a vocabulary of 600"
    )


TOKENS = {"</s>": 0, "<pad>": 1, "<s>": 2, "<|end|>": 3, "<|end_of_turn|>": 4}
NAMES = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("tokens", "names", "config", "ends"),
    [
        (TOKENS, {"tokenizer_config.json": {"eos_token": "<s>"}}, {"eos_token_id": 7}, (7,)),
        (TOKENS, {"tokenizer_config.json": {"eos_token": "<s>"}}, {}, (2,)),
        (TOKENS, {"special_tokens_map.json": {"eos_token": {"content": "<pad>"}}}, {}, (1,)),
        (TOKENS, {"special_tokens_map.json": NAMES, "tokenizer_config.json": {"eos_token": "<s>"}}, {}, (2,)),
        (TOKENS, {"tokenizer_config.json": {"eos_token": "<s>"}}, {"eos_token_id": None}, (2,)),
        (TOKENS, {"tokenizer_config.json": {"eos_token": "<s>"}}, {"eos_token_id": -1}, ()),
        (TOKENS, {}, {}, (0,)),
        (TOKENS, {"tokenizer_config.json": {"eos_token": "absent"}}, {}, (0,)),
    ],
    ids=str,
)
def test_the_end_token_is_the_configs_or_else_the_tokenizers(tokens, names, config, ends, tmp_path: Path) -> None:
    plain = {text: id_ for text, id_ in tokens.items() if not text.startswith("<|")}
    assert ends_of(tmp_path, plain, names, config) == ends


def ends_of(folder: Path, tokens: dict[str, int], names: Any, config: Any) -> tuple[int, ...]:
    added = [{"content": text, "id": id_, "special": True} for text, id_ in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {}}}))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name, content in names.items():
        (folder / name).write_text(json.dumps(content))
    return DeepConfig.from_folder(folder).eos_token_ids


@pytest.mark.parametrize(
    ("config", "ends"), [({}, (3, 4)), ({"eos_token_id": 3}, (3, 4)), ({"eos_token_id": 0}, (0, 3, 4))]
)
def test_agentic_models_stop_at_both_ends(config: Any, ends: tuple[int, ...], tmp_path: Path) -> None:
    assert ends_of(tmp_path, TOKENS, {"tokenizer_config.json": {"eos_token": "<|end|>"}}, config) == ends


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"added_tokens": 5}',
        '{"added_tokens": [3]}',
        '{"model": []}',
        '{"model": {"vocab": [5]}}',
        '{"added_tokens": [{"content": "<|end|>", "id": [7]}, {"content": "<|end_of_turn|>", "id": 10000}]}',
    ],
)
def test_a_broken_tokenizer_is_left_to_its_own_refusal(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text(content)
    assert DeepConfig.from_folder(tmp_path).eos_token_ids == (0,)
