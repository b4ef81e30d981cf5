"""Checkpoints of every era: where each tensor goes, in which dtype, and what a missing one means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import (
    CONFIG,
    ERAS,
    H,
    Tensors,
    V,
    assert_same,
    canonical,
    contents,
    load,
    old_names,
    refusal,
    rewritten,
    stacked,
    without,
    write,
)

from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.parameters import DynamicsLayer

GOLDEN = Path(__file__).resolve().parents[3].parent / "shared" / "golden"


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("era", ERAS)
def test_each_era_lands_in_the_stacked_layout(era: str, prefix: str, tmp_path: Path) -> None:
    absent, spell = ERAS[era]
    file = without(canonical(), *absent)
    model, report = load(write(tmp_path, {prefix + key: value for key, value in spell(file).items()}))
    assert_same(model, stacked(file))
    assert report.era == era
    assert report.file_dtypes == ("F32",)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    arch = model.architecture
    assert all(isinstance(layer, DynamicsLayer) for layer in model.layers)
    assert (arch.mu_guidance, arch.shared_expert_size, arch.tied) == (False, 0, True)
    assert arch.contextual_mu == (era not in ("0.4.0", "0.4.3-0.7"))
    assert arch.mu_attention == (era in ("0.9", "0.10-0.11", "0.12-0.14"))
    assert arch.mu_highway == arch.mu_router == (era in ("0.10-0.11", "0.12-0.14"))


@pytest.mark.parametrize("spell", [old_names, lambda file: file])
def test_a_dense_mlp_loads_in_old_and_new_spelling(spell: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    config = replace(CONFIG, use_token_routed_mlp=False)
    file = canonical(config)
    model, _ = load(write(tmp_path, spell(file), config=config))
    assert_same(model, stacked(file))
    assert not model.architecture.mu_router
    assert model.architecture.mu_highway


@pytest.mark.parametrize("shared", [0, 5])
def test_the_2026_rewrite_lands_in_the_stacked_layout(shared: int, tmp_path: Path) -> None:
    file = rewritten(shared)
    model, report = load(write(tmp_path / "file", file))
    assert report.era == "2026-03"
    assert model.architecture.mu_guidance
    assert not any(isinstance(layer, DynamicsLayer) for layer in model.layers)
    assert model.architecture.shared_expert_size == shared
    found = contents(model)
    assert torch.equal(found["mu_init"], file["mu_init"].flatten())
    for n in range(CONFIG.num_hidden_layers):
        here = {k.removeprefix(f"layers.{n}."): v for k, v in file.items() if k.startswith(f"layers.{n}.")}
        rows = [
            torch.cat((here[f"self_attn.{x}_proj.weight"], here[f"self_attn.mu_to_{x}.weight"]), 1) for x in "kqv"
        ]  # the first layer has mu too
        gate_up = torch.cat((here["mlp.gate_proj_w"], here["mlp.up_proj_w"]), dim=2).mT
        assert torch.equal(found[f"layers.{n}.kqv_proj"], torch.cat(rows))
        assert torch.equal(found[f"layers.{n}.gate_up"], gate_up)
        assert torch.equal(found[f"layers.{n}.down"], here["mlp.down_proj_w"].mT)
        assert torch.equal(found[f"layers.{n}.mu"], here["mu_guidance.mu"])
        assert torch.equal(found[f"layers.{n}.mu_guidance_proj"], here["mu_guidance.mu_proj.weight"])
        if shared:
            both = torch.cat((here["mlp.shared_gate.weight"], here["mlp.shared_up.weight"]))
            assert torch.equal(found[f"layers.{n}.shared_gate_up"], both)
            assert torch.equal(found[f"layers.{n}.shared_down"], here["mlp.shared_down.weight"])
    save_checkpoint(model, tmp_path / "saved", dtype=torch.float32)
    again, _ = load(tmp_path / "saved")
    assert again.architecture == model.architecture
    assert_same(again, found)


def test_a_mu_tensor_that_one_layer_lacks_is_zero(tmp_path: Path) -> None:
    lacking = ("layers.1.self_attn.mu_to_v", "layers.1.dynamics.mu_proj", "layers.1.mlp.mu_router")
    file = canonical()
    zeroed = {k: torch.zeros_like(v) if any(part in k for part in lacking) else v for k, v in file.items()}
    model, _ = load(write(tmp_path, without(file, *lacking)))
    assert_same(model, stacked(zeroed))


def test_a_missing_table_of_experts_is_the_id_modulo_experts(tmp_path: Path) -> None:
    file = without(canonical(), "token_to_expert")
    model, _ = load(write(tmp_path, file))
    assert_same(model, stacked(file))


def test_range_routed_era_needs_its_table(tmp_path: Path) -> None:
    lacking, rename = ERAS["0.4.0"]
    write(tmp_path, without(rename(without(canonical(), *lacking)), "token_to_expert"))
    assert "token_to_expert" in refusal(tmp_path)


def test_known_buffers_are_ignored(tmp_path: Path) -> None:
    file = canonical()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).bfloat16(),
        "layers.1.self_attn.rotary_emb.cos_cached": torch.ones(4, 4),
        "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(4, 4),
        "model.layers.0.dynamics.safety_clamp.limit": torch.ones(1),
    }
    model, _ = load(write(tmp_path, file | extra))
    assert_same(model, stacked(file))


GOLDEN_ERAS = {
    "a_v013_tiny": "0.12-0.14", "b_v013_untied_gqa4": "0.12-0.14", "c_v013_dense": "0.12-0.14",
    "d_v013_noqknorm": "0.12-0.14", "e_v0101_mueverywhere": "0.10-0.11", "e_v040_experts": "0.4.0",
    "e_v043_range": "0.4.3-0.7", "e_v071_modulo": "0.4.3-0.7", "e_v080_ctxmu": "0.8", "e_v090_muattn": "0.9",
    "f_v013_bf16file": "0.12-0.14", "g_v013_fp16_noprefix": "0.12-0.14", "h_v013_sliding8": "0.12-0.14",
    "i_v013_gelu_e3": "0.12-0.14", "j_2603_muguidance": "2026-03",
}  # fmt: skip


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference checkpoints are not next to the repository")
@pytest.mark.parametrize("name", GOLDEN_ERAS)
def test_reference_checkpoints_load_and_round_trip(name: str, tmp_path: Path) -> None:
    model, report = load(GOLDEN / name)
    arch = model.architecture
    assert report.era == arch.era == GOLDEN_ERAS[name]
    assert arch.tied == (name != "b_v013_untied_gqa4")
    assert isinstance(model.layers[0], DynamicsLayer) == (name != "j_2603_muguidance")
    assert bool(arch.shared_expert_size) == arch.mu_guidance == (name == "j_2603_muguidance")
    assert arch.contextual_mu == (report.era not in ("0.4.0", "0.4.3-0.7", "2026-03"))
    assert arch.mu_highway == (report.era in ("0.10-0.11", "0.12-0.14", "2026-03"))
    assert arch.mu_router == (report.era in ("0.10-0.11", "0.12-0.14") and name != "c_v013_dense")
    assert report.file_dtypes == ({"f": "BF16", "g": "F16"}.get(name[0], "F32"),)
    save_checkpoint(model, tmp_path, dtype=torch.float32)
    again, _ = load(tmp_path)
    assert replace(again.architecture, era=arch.era) == arch
    assert_same(again, contents(model))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_round_to_nearest_and_small_ones_stay_fp32(
    stored: torch.dtype, target: torch.dtype, tmp_path: Path
) -> None:
    file = {k: v.to(stored) if v.is_floating_point() else v for k, v in canonical().items()}
    model, _ = load(write(tmp_path, file), target)
    assert_same(model, stacked(file))
    fp32 = {key.rpartition(".")[2] for key, value in contents(model).items() if value.dtype == torch.float32}
    if target == torch.bfloat16:
        assert fp32 == {"norm", "input_norm", "post_norm", "q_norm", "k_norm", "mu", "controller_bias",
                        "controller_out_bias", "router"}  # fmt: skip


def test_mixed_dtypes_are_reported(tmp_path: Path) -> None:
    file = {k: v.bfloat16() if v.dim() > 1 else v for k, v in canonical().items()}
    model, report = load(write(tmp_path, file))
    assert report.file_dtypes == ("BF16", "F32")
    assert report.bytes == sum(v.nbytes for v in file.values())
    assert_same(model, stacked(file))


def test_a_duplicate_head_is_one_parameter_and_counted_once(tmp_path: Path) -> None:
    file = canonical()
    alone, report = load(write(tmp_path / "alone", file))
    model, with_head = load(write(tmp_path / "head", file | {"lm_head.weight": file["embed_tokens.weight"]}))
    assert model.lm_head is model.embed_tokens
    assert with_head.parameters == report.parameters
    assert_same(model, contents(alone))


def test_tied_file_with_another_head_loads_as_the_reference(tmp_path: Path) -> None:
    file, head = canonical(), torch.randn(V, H)
    model, _ = load(write(tmp_path, file | {"lm_head.weight": head}))
    assert model.lm_head is model.embed_tokens
    assert torch.equal(model.lm_head, head)


def test_an_untied_head_keeps_its_own_values(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=False)
    file = canonical() | {"lm_head.weight": torch.randn(V, H)}
    model, report = load(write(tmp_path / "file", file, config=config))
    assert not model.architecture.tied
    assert_same(model, stacked(file))
    assert report.parameters == sum(p.numel() for p in model.parameters())
    save_checkpoint(model, tmp_path / "saved", dtype=torch.float32)
    assert_same(load(tmp_path / "saved")[0], contents(model))
