"""`pyllm check`: what it reports of each published fixture, and that it finds faults, refusals and bad weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint

from pyllm.engine.errors import EngineStartError
from pyllm.model import DeepForCausalLM, backend
from pyllm.model.files import CheckpointError
from pyllm.server.cli.check import check
from pyllm.server.flags import CheckConfig

FORMS = {
    "t_native": "TR-Hash native", "t_hf": "TR-Hash native", "t_export": "TR-Hash export",
    "t_dense": "TR-Hash dense sibling", "e_v0101": "0.10-0.11", "e_v040": "0.4.0", "e_v043": "0.4.3-0.7",
    "e_v071": "0.4.3-0.7", "e_v080": "0.8", "e_v090": "0.9", "j_2603": "2026-03",
}  # fmt: skip


def report(capsys: pytest.CaptureFixture[str], folder: Path, **flags: Any) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON object."""
    code = check(CheckConfig(model=str(folder), json=True, **flags))
    return code, json.loads(capsys.readouterr().out)


def test_every_fixture_is_described_and_passes(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys, golden)
    assert (code, found["verdict"]) == (0, "passed"), found["self_test"]
    assert all(each["passed"] for each in found["self_test"]["checks"])
    assert len(found["self_test"]["texts"]) == 3
    network, config = found["network"], json.loads((golden / "config.json").read_text(encoding="utf-8"))
    assert network["form"] == next(
        (form for start, form in FORMS.items() if golden.name.startswith(start)), "0.12-0.14"
    )
    assert network["line"] == ("TR-Hash" if golden.name.startswith("t_") else "Complexity-Deep")
    model = DeepForCausalLM.from_pretrained(golden)
    assert network["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert network["active_parameters"] == model.active_parameters
    assert network["context"] == config["max_position_embeddings"]
    # What stops a text: the file's own ids, else the tokenizer's.
    agentic, file = "agentic" in golden.name, "config.json" if "eos_token_id" in config else "tokenizer_config.json"
    stops = [(each["id"], each["file"]) for each in found["tokens"]["stop"]]
    assert stops == ([(1, "tokenizer_config.json"), (7, "tokenizer.json")] if agentic else [(0, file)])
    assert found["stop_rules"]["ids"] == list(model.config.eos_token_ids)
    assert found["tokens"]["bos"]["text"] == ("<|begin|>" if agentic else "<s>")
    assert found["tokens"]["model_vocabulary"] == config["vocab_size"]
    chat = found["chat"]
    assert Path(chat["template"]).name == ("chat_template.jinja" if golden.name[0] == "t" else "tokenizer_config.json")
    assert "What is 2 + 2?" in chat["rendered"]
    assert chat["ids"]
    # Keys and values of FP32 for one sequence of full length.
    cache = config["num_hidden_layers"] * 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert found["memory"]["cache_bytes_per_token"] == cache * (1 if network["dtype"] == "float32" else 0.5)
    whole = next(row for row in found["memory"]["needed"] if row["context"] == 256 and row["sequences"] == 1)
    assert whole["bytes"] == found["memory"]["weights_bytes"] + 256 * found["memory"]["cache_bytes_per_token"]


def ruin_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_decode_attention", lambda q, *_: torch.zeros_like(q))


def ruin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk sees itself only."""
    attend = backend._attend
    monkeypatch.setattr(
        backend, "_attend", lambda q, k, v, config: attend(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], config)
    )


def ruin_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of several sequences reads the pages of the first."""
    attention = backend._paged_attention

    def paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, step: Any, config: Any) -> Any:
        out = attention(q, k, v, cache, step, config)
        return out if len(step.seq_lens) == 1 else out.flip(0)

    monkeypatch.setattr(backend, "_paged_attention", paged)


@pytest.mark.parametrize(
    ("ruin", "failed"),
    [
        (ruin_decodes, {"cached = cache-free", "greedy, alone", "greedy, batched"}),
        (ruin_chunks, {"chunked = whole", "batched = alone", "greedy, batched"}),
        (ruin_batches, {"batched = alone", "greedy, batched"}),
    ],
)
def test_a_fault_of_the_engine_fails(ruin, failed, tiny_checkpoint, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    ruin(monkeypatch)
    code, found = report(capsys, tiny_checkpoint, dtype="float32", device="cpu")
    assert (code, found["verdict"]) == (1, "failed")
    assert {each["name"] for each in found["self_test"]["checks"] if not each["passed"]} == failed


def with_weights(folder: Path, value: float) -> Path:
    """A checkpoint whose last norm is `value` everywhere."""
    write_checkpoint(folder, seed=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("norm.weight") and "layers" not in key)
    save_file(tensors | {key: torch.full_like(tensors[key], value)}, file)
    return folder


def test_scores_that_are_not_finite_fail(tmp_path, capsys) -> None:
    code, found = report(capsys, with_weights(tmp_path / "model", 3e38), dtype="float32", device="cpu")
    assert code == 1
    assert {"no NaN", "cached = cache-free"} <= {
        each["name"] for each in found["self_test"]["checks"] if not each["passed"]
    }


def test_weights_are_read_by_the_self_test_only(tmp_path, capsys) -> None:
    folder = with_weights(tmp_path / "model", float("nan"))
    code, found = report(capsys, folder, skip_self_test=True)
    assert (code, found["verdict"]) == (0, "not tested")
    assert "self_test" not in found
    with pytest.raises(EngineStartError, match="holds NaN"):
        check(CheckConfig(model=str(folder), json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "refused"
    assert "holds NaN" in found["reason"]
    assert found["network"]["form"] == "0.12-0.14"


def test_a_tokenizer_with_more_ids_than_the_model_fails(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, seed=3)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    plain = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [plain | {"id": id_, "content": f"<{id_}>"} for id_ in range(first, size + 1)]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    code, found = report(capsys, folder)
    assert code == 1
    assert [each["name"] for each in found["self_test"]["checks"] if not each["passed"]] == ["tokenizer fits"]


@pytest.mark.parametrize(
    ("changes", "generation", "stops"),
    [
        ({"eos_token_id": [0, 3]}, None, [(0, "config.json"), (3, "config.json")]),
        ({"eos_token_id": 0}, {"eos_token_id": [3, 0]}, [(0, "config.json"), (3, "generation_config.json")]),
        ({"eos_token_id": None}, None, [(0, "tokenizer_config.json")]),
    ],
)
def test_the_file_of_each_stop_id_is_named(changes, generation, stops, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, seed=3)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    _, found = report(capsys, folder, skip_self_test=True)
    assert [(each["id"], each["file"]) for each in found["tokens"]["stop"]] == stops


def test_a_template_without_a_place_for_system_messages_is_said(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, seed=3)
    source = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    _, found = report(capsys, folder, skip_self_test=True)
    assert "no place for a system message" in found["chat"]["note"]
    assert found["chat"]["rendered"].startswith("user: What is 2 + 2?")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('No') }}", encoding="utf-8")
    _, found = report(capsys, folder, skip_self_test=True)
    assert found["chat"]["note"].startswith("without one: The model's chat template refuses these messages: No.")
    assert found["chat"]["ids"] == []


def test_the_text_has_every_section_and_no_control_characters(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, seed=3)
    (folder / "chat_template.jinja").write_text("\x1b[2J{{ messages[-1].content }}", encoding="utf-8")
    assert check(CheckConfig(model=str(folder), chat_template=None, skip_self_test=True)) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line[:1].isupper()] == [
        "Network", "Tokens", "Chat", "Stop rules", "Memory",
        "Verdict: not tested. The files are read; their weights were not tested.",
    ]  # fmt: skip
    assert "\x1b" not in text


def test_another_family_is_refused_in_one_sentence(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    save_file({"embeddings.word": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, EngineStartError)) as refusal:
        check(CheckConfig(model=str(tmp_path), json=True))
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["reason"]) == ("refused", str(refusal.value))
    assert "\n" not in found["reason"]
