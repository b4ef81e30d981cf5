"""Saved checkpoints, random weights, and the memory that loading takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import (
    CONFIG,
    ERAS,
    E,
    V,
    assert_same,
    canonical,
    contents,
    load,
    without,
    write,
)

from pyllm.model import Architecture, AttentionMetadata, DeepConfig
from pyllm.model.checkpoint.loader import save_checkpoint


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


def test_saved_model_has_published_tensor_names(tmp_path: Path) -> None:
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
def test_dummy_weights_need_only_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
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
from pyllm.model import DeepForCausalLM
from pyllm.model.checkpoint.loader import load_checkpoint

def kib(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

tiny, folder = map(Path, sys.argv[1:])
load_checkpoint(tiny, network=DeepForCausalLM, dtype=torch.bfloat16, device=torch.device("cpu"))
before = kib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
model, report = load_checkpoint(folder, network=DeepForCausalLM, dtype=torch.bfloat16, device=torch.device("cpu"))
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
