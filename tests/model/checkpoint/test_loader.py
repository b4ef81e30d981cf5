"""Checkpoints of every era: what lands where, what is refused and how, and how much memory it takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyllm.model.checkpoint.loader import LoadReport, load_checkpoint, save_checkpoint
from pyllm.model.config import Architecture, CheckpointError, DeepConfig
from pyllm.model.network import AttentionMetadata, DeepForCausalLM

Tensors = dict[str, Tensor]
GOLDEN = Path(__file__).resolve().parents[3].parent / "shared" / "golden"
CPU = torch.device("cpu")
# 25 does not divide by 3, so experts are 8 wide and one column of the MLP is nobody's.
CONFIG = DeepConfig(
    vocab_size=48, hidden_size=32, intermediate_size=25, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=3, dynamics_controller_hidden=6, max_position_embeddings=64,
)  # fmt: skip
H, KV, W, E, C, V = 32, 16, 8, 3, 6, 48


def canonical(config: DeepConfig = CONFIG, seed: int = 0) -> Tensors:
    """Random tensors of a 0.13 file, without `model.`, without a head."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    file = {"embed_tokens.weight": rand(V, H), "norm.weight": rand(H)}
    for n in range(config.num_hidden_layers):
        a, d, m = f"layers.{n}.self_attn.", f"layers.{n}.dynamics.", f"layers.{n}.mlp."
        file |= {f"layers.{n}.input_layernorm.weight": rand(H), f"layers.{n}.post_attention_layernorm.weight": rand(H)}
        for prefix in ("{}_proj", "mu_to_{}"):
            file |= {f"{a}{prefix.format(x)}.weight": rand(H if x == "q" else KV, H) for x in "qkv"}
        file |= {a + "o_proj.weight": rand(H, H), a + "q_norm.weight": rand(8), a + "k_norm.weight": rand(8)}
        file |= {d + "mu": rand(H), d + "mu_proj.weight": rand(H, H)}
        file |= {d + "controller_in.weight": rand(C, 2 * H), d + "controller_in.bias": rand(C)}
        file |= {d + "controller_out.weight": rand(3 * H, C), d + "controller_out.bias": rand(3 * H)}
        if config.use_token_routed_mlp:
            file |= {m + "gate_up_proj": rand(E, H, 2 * W), m + "down_proj": rand(E, W, H)}
            file |= {m + "mu_router.weight": rand(E, H)}
            file[m + "token_to_expert"] = torch.randint(E, (V,), generator=generator)
        else:
            wide = config.intermediate_size
            file |= {m + "gate_proj.weight": rand(wide, H), m + "up_proj.weight": rand(wide, H)}
            file[m + "down_proj.weight"] = rand(H, wide)
    return file


def stacked(file: Tensors) -> Tensors:
    """The network's parameters for a canonical file, whose missing tensors are terms that are absent."""
    top = {"embed_tokens": file["embed_tokens.weight"], "norm": file["norm.weight"]}
    top["lm_head"] = file.get("lm_head.weight", top["embed_tokens"])
    for n in range(CONFIG.num_hidden_layers):
        here = {k.removeprefix(f"layers.{n}."): v for k, v in file.items() if k.startswith(f"layers.{n}.")}
        rows = []
        for x in "kqv":
            own = here[f"self_attn.{x}_proj.weight"]
            mu = here.get(f"self_attn.mu_to_{x}.weight", torch.zeros_like(own))
            rows.append(torch.cat((own, mu), dim=1) if n and "self_attn.mu_to_k.weight" in here else own)
        inner = here["dynamics.controller_in.weight"]
        layer = {
            "input_norm": here["input_layernorm.weight"],
            "post_norm": here["post_attention_layernorm.weight"],
            "kqv_proj": torch.cat(rows),
            "q_norm": here["self_attn.q_norm.weight"],
            "k_norm": here["self_attn.k_norm.weight"],
            "o_proj": here["self_attn.o_proj.weight"],
            "mu": here["dynamics.mu"],
            "dynamics_in": torch.cat([w for w in (here.get("dynamics.mu_proj.weight"), inner[:, :H]) if w is not None]),
            "controller_v": inner[:, H:],
            "controller_bias": here["dynamics.controller_in.bias"],
            "controller_out": here["dynamics.controller_out.weight"],
            "controller_out_bias": here["dynamics.controller_out.bias"],
        }
        if "mlp.gate_up_proj" in here:
            layer |= {"gate_up": here["mlp.gate_up_proj"].mT, "down": here["mlp.down_proj"].mT}
            layer["token_to_expert"] = here.get("mlp.token_to_expert", torch.arange(V) % E)
        else:
            layer["gate_up"] = torch.cat((here["mlp.gate_proj.weight"], here["mlp.up_proj.weight"]))[None]
            layer["down"] = here["mlp.down_proj.weight"][None]
        if "mlp.mu_router.weight" in here:
            layer["router"] = here["mlp.mu_router.weight"]
        top |= {f"layers.{n}.{key}": value for key, value in layer.items()}
    return top


def without(file: Tensors, *parts: str) -> Tensors:
    return {key: value for key, value in file.items() if not any(part in key for part in parts)}


def old_names(file: Tensors) -> Tensors:
    """Controller and experts as files before 0.12 had them."""
    renamed: Tensors = {}
    for key, value in file.items():
        key = key.replace("controller_in", "controller.0").replace("controller_out", "controller.2")
        if key.endswith("gate_up_proj"):
            stem = key.removesuffix("gate_up_proj")
            renamed |= {stem + "gate_proj": value[..., :W], stem + "up_proj": value[..., W:]}
        else:
            renamed[key] = value
    return renamed


def single_experts(file: Tensors) -> Tensors:
    """Experts as the first files had them: one matrix each, [out, in]."""
    renamed: Tensors = {}
    for key, value in old_names(file).items():
        kind = key.rpartition(".")[2]
        if kind in ("gate_proj", "up_proj", "down_proj"):
            stem = key.removesuffix(kind)
            renamed |= {f"{stem}experts.{e}.{kind}.weight": value[e].mT for e in range(E)}
        else:
            renamed[key] = value
    return renamed


ERAS: dict[str, tuple[tuple[str, ...], Callable[[Tensors], Tensors]]] = {
    "0.4.0": (("mu_to_", "mu_router", "mu_proj"), single_experts),
    "0.4.3-0.7": (("mu_to_", "mu_router", "mu_proj"), old_names),
    "0.8": (("mu_to_", "mu_router"), old_names),
    "0.9": (("mu_to_v", "mu_router"), old_names),
    "0.10-0.11": ((), old_names),
    "0.12-0.14": ((), lambda file: file),
}


def write(folder: Path, file: Tensors, name: str = "model.safetensors", config: DeepConfig = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({key: value.contiguous().clone() for key, value in file.items()}, folder / name)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[DeepForCausalLM, LoadReport]:
    return load_checkpoint(folder, dtype=dtype, device=CPU, **options)


def contents(model: DeepForCausalLM) -> Tensors:
    return {
        key: value.detach()
        for key, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        if key != "inv_freq"
    }


def assert_same(model: DeepForCausalLM, expected: Tensors) -> None:
    """Equal names and values; expected values are rounded to each parameter's dtype."""
    found = contents(model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def refusal(path: Path, **options: Any) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    sentence = str(caught.value)
    folder = path if path.is_dir() else path.parent
    assert str(folder) in sentence, "it names the path"
    assert sentence.endswith(".")
    assert not re.search(r"\n|\. [A-Z]", sentence), "it is one sentence"
    return sentence


# ---- Eras -------------------------------------------------------------------------------------------------------


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
    assert (arch.dynamics, arch.mu_guidance, arch.shared_expert_size, arch.tied) == (True, False, 0, True)
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
    file = without(canonical(), "dynamics", "mu_router", "gate_up_proj", "down_proj")
    file["mu_init"] = torch.randn(1, 1, H)
    for n in range(CONFIG.num_hidden_layers):
        m, g = f"layers.{n}.mlp.", f"layers.{n}.mu_guidance."
        file |= {g + "mu": torch.randn(H), g + "mu_proj.weight": torch.randn(H, H)}
        file |= {m + "gate_proj_w": torch.randn(E, H, W), m + "up_proj_w": torch.randn(E, H, W)}
        file[m + "down_proj_w"] = torch.randn(E, W, H)
        if shared:
            file |= {m + "shared_gate.weight": torch.randn(shared, H), m + "shared_up.weight": torch.randn(shared, H)}
            file[m + "shared_down.weight"] = torch.randn(H, shared)
    model, report = load(write(tmp_path / "file", file))
    assert report.era == "2026-03"
    assert model.architecture.mu_guidance
    assert not model.architecture.dynamics
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


def test_the_first_era_routed_by_range_so_its_files_must_have_the_table(tmp_path: Path) -> None:
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


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference checkpoints are not beside the repository")
@pytest.mark.parametrize("name", GOLDEN_ERAS)
def test_reference_checkpoints_load_and_round_trip(name: str, tmp_path: Path) -> None:
    model, report = load(GOLDEN / name)
    arch = model.architecture
    assert report.era == arch.era == GOLDEN_ERAS[name]
    assert arch.tied == (name != "b_v013_untied_gqa4")
    assert arch.dynamics == (name != "j_2603_muguidance")
    assert bool(arch.shared_expert_size) == arch.mu_guidance == (name == "j_2603_muguidance")
    assert arch.contextual_mu == (report.era not in ("0.4.0", "0.4.3-0.7", "2026-03"))
    assert arch.mu_highway == (report.era in ("0.10-0.11", "0.12-0.14", "2026-03"))
    assert arch.mu_router == (report.era in ("0.10-0.11", "0.12-0.14") and name != "c_v013_dense")
    assert report.file_dtypes == ({"f": "BF16", "g": "F16"}.get(name[0], "F32"),)
    save_checkpoint(model, tmp_path, dtype=torch.float32)
    again, _ = load(tmp_path)
    assert replace(again.architecture, era=arch.era) == arch
    assert_same(again, contents(model))


# ---- Dtypes and heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_rounded_to_nearest_and_small_tensors_stay_fp32(
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


def test_a_differing_head_in_a_tied_file_is_both_as_in_the_reference(tmp_path: Path) -> None:
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


# ---- Files ------------------------------------------------------------------------------------------------------


def shard(folder: Path, file: Tensors) -> Path:
    names = sorted(file)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in shards.items():
        write(folder, {key: file[key] for key in keys}, name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_make_one_model(tmp_path: Path) -> None:
    file = canonical()
    assert_same(load(shard(tmp_path, file))[0], stacked(file))


def test_the_highest_step_is_taken_by_number(tmp_path: Path) -> None:
    for step in (900, 1000, 50):
        write(tmp_path, canonical(seed=step), f"step_{step}.safetensors")
    assert_same(load(tmp_path)[0], stacked(canonical(seed=1000)))


def test_a_single_file_of_any_name_is_taken_and_so_is_a_path_to_it(tmp_path: Path) -> None:
    write(tmp_path, canonical(), "deep.safetensors")
    assert_same(load(tmp_path)[0], stacked(canonical()))
    write(tmp_path, canonical(seed=1), "other.safetensors")
    assert_same(load(tmp_path / "other.safetensors")[0], stacked(canonical(seed=1)))
    assert "deep.safetensors, other.safetensors: pass the path of the one" in refusal(tmp_path)


def test_a_file_whose_data_starts_at_an_odd_byte_loads(tmp_path: Path) -> None:
    raw = (write(tmp_path, canonical()) / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    assert_same(load(tmp_path)[0], stacked(canonical()))


# ---- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path, canonical()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert re.search(r"truncated or no safetensors file \(.+\): fetch it again", refusal(tmp_path))


def test_a_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, canonical()) / "model.safetensors").write_text("<!doctype html><title>Not found</title>")
    assert "truncated or no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pt", "final.pth"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(name: str, tmp_path: Path) -> None:
    file = canonical()
    write(tmp_path, file)
    (tmp_path / "model.safetensors").unlink()
    file["lm_head.weight"] = file["embed_tokens.weight"]  # shared memory, as trainers save it
    torch.save(file, tmp_path / name)
    sentence = refusal(tmp_path)
    assert refusal(tmp_path / name) == sentence
    assert sentence.startswith(f"{tmp_path / name} is a pickle")
    line = re.search(r"python -c '(.+)'\.$", sentence)
    assert line is not None
    subprocess.run([sys.executable, "-c", line[1]], check=True)
    assert_same(load(tmp_path)[0], stacked(file))


def test_folders_without_weights_or_config_are_refused(tmp_path: Path) -> None:
    assert "does not exist: pass the folder" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)
    write(tmp_path, canonical())
    (tmp_path / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refusal(tmp_path)
    assert "is not a .safetensors file" in refusal(tmp_path / "config.json")


def test_incomplete_shards_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, canonical())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors, which" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "is not an index with a weight_map: fetch it again" in refusal(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    file = canonical()
    write(tmp_path, file | {"model.norm.weight": file["norm.weight"]})
    assert "holds norm.weight a second time" in refusal(tmp_path)


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, without(canonical(), "layers.1.self_attn.o_proj"))
    assert "lacks layers.1.self_attn.o_proj.weight: fetch it again" in refusal(tmp_path)
    write(tmp_path, without(canonical(), "layers.1."))
    assert re.search(r"lacks layers\.1\.\S+, layers\.1\.\S+, layers\.1\.\S+ and \d+ more: ", refusal(tmp_path))


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    write(tmp_path, canonical(), config=replace(CONFIG, tie_word_embeddings=False))
    assert "lacks lm_head.weight: fetch it again, or set tie_word_embeddings to true" in refusal(tmp_path)


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, canonical() | {"model.layers.0.dynamics.phase.weight": torch.ones(2)})
    assert "(model.layers.0.dynamics.phase.weight): use the config.json" in refusal(tmp_path)
    write(tmp_path, canonical(), config=replace(CONFIG, num_hidden_layers=1))
    assert re.search(r"\(layers\.1\.\S+, layers\.1\.\S+, layers\.1\.\S+ and \d+ more\)", refusal(tmp_path))


def test_other_lines_of_the_family_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, canonical() | {"layers.0.mlp.topk_token_to_expert": torch.zeros(V, 2, dtype=torch.int64)})
    assert "topk_token_to_expert" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"mlp_type": "i64_routed"}))
    assert "mlp_type 'i64_routed' belongs to another line" in refusal(tmp_path)
    write(tmp_path, {"transformer.wte.weight": torch.ones(V, H)})
    assert "no known era of Complexity-Deep, with tensors such as transformer.wte.weight" in refusal(tmp_path)


def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    write(tmp_path, {f"model.{k}": v for k, v in canonical().items()}, config=replace(CONFIG, vocab_size=50))
    sentence = refusal(tmp_path)
    assert "model.safetensors: tensor model.embed_tokens.weight has the shape [48, 32]" in sentence
    assert "where config.json asks for [50, 32]: use the config.json" in sentence
    turned = canonical()
    turned["layers.1.mlp.gate_up_proj"] = turned["layers.1.mlp.gate_up_proj"].mT
    write(tmp_path, turned)
    assert "gate_up_proj has the shape [3, 16, 32] where config.json asks for [3, 32, 16]" in refusal(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["layers.1.mlp.down_proj", "norm.weight", "layers.0.dynamics.controller_in.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(bad: float, key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = canonical()
    file[key] = file[key].to(dtype)
    file[key].view(-1)[-1] = bad
    write(tmp_path, file)
    assert f"tensor {key} holds NaN, infinite or too large values" in refusal(tmp_path, dtype=torch.bfloat16)


def test_other_number_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path, canonical() | {"norm.weight": torch.ones(H).to(torch.float8_e4m3fn)})
    assert "tensor norm.weight is stored as F8_E4M3, which is not read" in refusal(tmp_path)
    write(tmp_path, canonical() | {"layers.0.mlp.token_to_expert": torch.zeros(V)})
    assert "tensor layers.0.mlp.token_to_expert is stored as F32" in refusal(tmp_path)


@pytest.mark.parametrize("expert", [-1, E])
def test_a_table_that_names_experts_that_are_not_there_is_refused(expert: int, tmp_path: Path) -> None:
    file = canonical()
    file["layers.1.mlp.token_to_expert"][7] = expert
    write(tmp_path, file)
    assert re.search(r"token_to_expert names experts from -?\d to \d where there are 3", refusal(tmp_path))


# ---- Saving, random weights, memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("era", ERAS)
def test_saving_and_loading_gives_the_same_bits(era: str, dtype: torch.dtype, tmp_path: Path) -> None:
    absent, spell = ERAS[era]
    model, _ = load(write(tmp_path / "file", spell(without(canonical(), *absent))), dtype)
    save_checkpoint(model, tmp_path / "saved", dtype=dtype)
    again, report = load(tmp_path / "saved", dtype)
    assert report.era == "0.12-0.14"
    assert again.config == model.config
    assert replace(again.architecture, era=era) == model.architecture
    assert_same(again, contents(model))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert all(key.startswith("model.") for key in saved)


def test_a_saved_trained_model_has_the_names_of_the_published_files(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path / "file", canonical()))
    save_checkpoint(model, tmp_path / "saved", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {f"model.{key}" for key in canonical()}
    assert saved["model.layers.0.mlp.gate_up_proj"].dtype == torch.bfloat16
    assert saved["model.layers.0.mlp.token_to_expert"].dtype == torch.int64
    assert saved["model.norm.weight"].dtype == torch.float32
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1, "weights are as readable as the configuration"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_need_only_the_config_and_stay_finite_at_depth(dtype: torch.dtype, tmp_path: Path) -> None:
    config = replace(CONFIG, num_hidden_layers=40)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model, report = load(tmp_path, dtype, load_format="dummy", seed=3)
    assert model.architecture == Architecture.latest(config)
    assert report.era == "dummy 0.12-0.14"
    assert report.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.arange(V)
    with torch.no_grad():
        logits = model.logits(model(ids, ids, AttentionMetadata.without_cache([V])))
    assert logits.isfinite().all()
    assert logits.std() > 0.01, "tokens differ"
    assert torch.equal(contents(model)["layers.39.token_to_expert"], ids % E)
    assert_same(load(tmp_path, dtype, load_format="dummy", seed=3)[0], contents(model))
    other = contents(load(tmp_path, dtype, load_format="dummy", seed=4)[0])
    assert not torch.equal(other["embed_tokens"], model.embed_tokens)


def test_loading_writes_nothing_to_a_log_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(write(tmp_path, canonical()), progress=True)
    assert capfd.readouterr() == ("", "")


MEASURE = """
import sys, torch
from pathlib import Path
from pyllm.model.checkpoint.loader import load_checkpoint

def kib(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

tiny, folder = map(Path, sys.argv[1:])
load_checkpoint(tiny, dtype=torch.bfloat16, device=torch.device("cpu"))
before = kib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model, report = load_checkpoint(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
layer = sum(t.nbytes for t in [*model.layers[0].parameters(), *model.layers[0].buffers()])
print(report.bytes, held, layer, 1024 * (kib("VmHWM:") - before))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_loading_needs_the_model_and_no_more_than_one_layer(tmp_path: Path) -> None:
    """Counted is all that is resident, anonymous memory and mapped pages of the file alike (VmHWM)."""
    config = DeepConfig(vocab_size=20000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                        num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    model, _ = load(folder, load_format="dummy")
    save_checkpoint(model, folder, dtype=torch.float32)
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(write(tmp_path / "tiny", canonical())), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    (folder / "model.safetensors").unlink()
    read, held, layer, peak = map(int, done.stdout.split())
    assert read > 180e6, "the file is large, and FP32"
    assert held < 0.6 * read
    assert held * 0.9 < peak <= held + layer, f"peak {peak / 1e6:.1f} MB, model {held / 1e6:.1f} MB"
