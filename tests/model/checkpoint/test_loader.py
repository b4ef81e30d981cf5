"""Checkpoint files: which ones are read, and how the others are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import (
    CONFIG,
    E,
    H,
    Tensors,
    V,
    assert_same,
    canonical,
    load,
    refusal,
    stacked,
    without,
    write,
)


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


def test_a_single_file_is_read_by_folder_or_by_path(tmp_path: Path) -> None:
    write(tmp_path, canonical(), "deep.safetensors")
    assert_same(load(tmp_path)[0], stacked(canonical()))
    write(tmp_path, canonical(seed=1), "other.safetensors")
    assert_same(load(tmp_path / "other.safetensors")[0], stacked(canonical(seed=1)))
    assert "deep.safetensors, other.safetensors: pass the path of one of them" in refusal(tmp_path)


def test_a_file_whose_data_starts_at_an_odd_byte_loads(tmp_path: Path) -> None:
    raw = (write(tmp_path, canonical()) / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    assert_same(load(tmp_path)[0], stacked(canonical()))


def test_progress_counts_every_byte_to_the_last(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _, report = load(write(tmp_path, canonical()), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)
    assert len({total for _, total in seen}) == 1


@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path, canonical()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert re.search(r"truncated or not a safetensors file \(.+\): fetch it again", refusal(tmp_path))


def test_a_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, canonical()) / "model.safetensors").write_text("<!doctype html><title>Not found</title>")
    assert "truncated or not a safetensors file" in refusal(tmp_path)


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
    assert "holds norm.weight again" in refusal(tmp_path)


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
    assert "is not a Complexity-Deep checkpoint of any known era (its tensors: transformer.wte.weight" in refusal(
        tmp_path
    )


def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    write(tmp_path, {f"model.{k}": v for k, v in canonical().items()}, config=replace(CONFIG, vocab_size=50))
    sentence = refusal(tmp_path)
    assert "model.safetensors: tensor model.embed_tokens.weight has the shape [48, 32]" in sentence
    assert "but config.json implies [50, 32]: use the config.json" in sentence
    turned = canonical()
    turned["layers.1.mlp.gate_up_proj"] = turned["layers.1.mlp.gate_up_proj"].mT
    write(tmp_path, turned)
    assert "gate_up_proj has the shape [3, 16, 32], but config.json implies [3, 32, 16]" in refusal(tmp_path)


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
    assert "tensor norm.weight is stored as F8_E4M3, which is not supported" in refusal(tmp_path)
    write(tmp_path, canonical() | {"layers.0.mlp.token_to_expert": torch.zeros(V)})
    assert "tensor layers.0.mlp.token_to_expert is stored as F32" in refusal(tmp_path)


@pytest.mark.parametrize("expert", [-1, E])
def test_routing_table_with_unknown_experts_is_refused(expert: int, tmp_path: Path) -> None:
    file = canonical()
    file["layers.1.mlp.token_to_expert"][7] = expert
    write(tmp_path, file)
    assert re.search(r"token_to_expert refers to experts -?\d to \d, but there are only 3", refusal(tmp_path))
