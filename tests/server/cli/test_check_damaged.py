"""`pyllm check` on damaged folders of the TR-Hash line: one sentence that names the file, for every kind of damage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import byte_tokenizer
from support.hash_reference import CONFIG, Tensors, made_file, write_file
from support.serving import run_command

from pyllm.engine.errors import EngineStartError
from pyllm.model.files import CheckpointError
from pyllm.server.chat.template import ChatTemplateError
from pyllm.server.cli.check import check
from pyllm.server.flags import CheckConfig, ConfigError

Damage = Callable[[Path], Any]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
FILE = "model.safetensors"
INDEX = FILE + ".index.json"
PACK = "token_pack_002_9B"


def write_model(folder: Path, form: str = "native", prefix: str = "", **changes: Any) -> Path:
    config = CONFIG | changes
    write_file(folder, config, made_file(config, form), prefix)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def text(name: str, content: str | bytes) -> Damage:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def gone(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, size: int) -> Damage:
    """Keep so many bytes, or drop so many if negative."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def keys(**values: Any) -> Damage:
    """Change config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def tensors(change: Callable[[Tensors], Any]) -> Damage:
    """Change the tensors in place."""

    def damage(folder: Path) -> None:
        file = load_file(folder / FILE)
        change(file)
        save_file(file, folder / FILE)

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change the tensors whose names end so."""
    return tensors(lambda file: file.update({k: change(v).contiguous() for k, v in file.items() if k.endswith(name)}))


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change what the weights' header says."""

    def damage(folder: Path) -> None:
        data = (folder / FILE).read_bytes()
        size = int.from_bytes(data[:8], "little")
        listed = json.loads(data[8 : 8 + size])
        change(listed)
        head = json.dumps(listed).encode()
        (folder / FILE).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])

    return damage


def packs(*damages: Damage) -> Damage:
    """Make it the newest of two checkpoints, and damage that."""

    def damage(folder: Path) -> None:
        names = [path.name for path in folder.iterdir()]
        for pack in ("token_pack_001_4B", PACK):
            (folder / pack).mkdir()
            for name in names:
                (folder / pack / name).write_bytes((folder / name).read_bytes())
        gone(*names)(folder)
        for each in damages:
            each(folder / PACK)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def wrong(value: float) -> Damage:
    return tensor("embed_tokens.weight", lambda weight: weight.index_fill(0, torch.tensor([7]), value))


DAMAGES: dict[str, Damage] = {
    "no config": gone("config.json"),
    "config is a pointer": text("config.json", POINTER),
    "config is empty": text("config.json", ""),
    "config is cut": cut("config.json", 40),
    "config is a list": text("config.json", "[]"),
    "config of another family": text("config.json", '{"model_type": "bert", "hidden_size": 8, "vocab_size": 9}'),
    "config is not UTF-8": text("config.json", b"\xff\xfe{}"),
    "a config without layers": keys(num_hidden_layers=0),
    "a config of strings": keys(hidden_size="48"),
    "a config of other sizes": keys(hidden_size=64, num_attention_heads=4),
    "more layers than the file": keys(num_hidden_layers=5),
    "fewer layers than the file": keys(num_hidden_layers=2),
    "a larger vocabulary than the file": keys(vocab_size=700),
    "more routes than the tables": keys(top_k=3),
    "more experts than the file": keys(num_experts=8),
    "wider experts than the file": keys(intermediate_size=64),
    "an unknown mlp_type": keys(mlp_type="lsh"),
    "a sliding window of nothing": keys(sliding_window=0),
    "another end token than ids": keys(eos_token_id=600),
    "no tokenizer": gone("tokenizer.json"),
    "the tokenizer is a pointer": text("tokenizer.json", POINTER),
    "the tokenizer is cut": cut("tokenizer.json", 1000),
    "the tokenizer is empty": text("tokenizer.json", "{}"),
    "the tokenizer is not byte-level": text(
        "tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    ),
    "tokenizer_config is a pointer": text("tokenizer_config.json", POINTER),
    "tokenizer_config is cut": text("tokenizer_config.json", '{"eos_'),
    "an end token of the wrong type": text("tokenizer_config.json", '{"eos_token": 5}'),
    "special_tokens_map is cut": text("special_tokens_map.json", "{"),
    "generation_config is a pointer": text("generation_config.json", POINTER),
    "generation_config with an end token that does not exist": text("generation_config.json", '{"eos_token_id": 9999}'),
    "a template with a syntax error": text("chat_template.jinja", "{% for m in messages %}"),
    "a template that is a pointer": text("chat_template.jinja", POINTER),
    "a template that is empty": text("chat_template.jinja", ""),
    "no weights": gone(FILE),
    "the weights are a pointer": text(FILE, POINTER),
    "the weights are empty": text(FILE, ""),
    "the weights are a folder": both(gone(FILE), lambda folder: (folder / FILE).mkdir()),
    "the weights are a pipe": both(gone(FILE), lambda folder: os.mkfifo(folder / FILE)),
    "the weights are a broken link": both(gone(FILE), lambda folder: (folder / FILE).symlink_to("nowhere")),
    "the weights are cut in their header": cut(FILE, 100),
    "the weights lack the last byte": cut(FILE, -1),
    "the weights are cut in half": cut(FILE, 60_000),
    "the weights are a pickle": both(gone(FILE), text("pytorch_model.bin", b"PK")),
    "two files of weights": both(gone(FILE), text("a.safetensors", "a"), text("b.safetensors", "b")),
    "an absent shard": both(gone(FILE), text(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}')),
    "an index without a map": both(gone(FILE), text(INDEX, "{}")),
    "an index of odd names": both(gone(FILE), text(INDEX, '{"weight_map": {"a": "../model.safetensors"}}')),
    "a header that is too long": text(FILE, (2**62).to_bytes(8, "little") + b"{}"),
    "a header that is no JSON": text(FILE, (4).to_bytes(8, "little") + b"{{{{"),
    "a header of other shapes": header(lambda listed: listed["norm.weight"].update(shape=[49])),
    "a header of unknown dtypes": header(lambda listed: listed["norm.weight"].update(dtype="F99")),
    "a header with overlapping tensors": header(lambda listed: listed["norm.weight"].update(data_offsets=[0, 192])),
    "a tensor twice, with and without prefix": tensors(lambda f: f.update({"model.norm.weight": f["norm.weight"] * 2})),
    "a missing tensor": tensors(lambda file: file.pop("layers.1.self_attn.k_proj.weight")),
    "a missing shared expert in one layer": tensors(lambda file: file.pop("layers.1.mlp.engine.shared_up.weight")),
    "an unexpected tensor": tensors(lambda file: file.update({"layers.0.mlp.engine.router": torch.ones(4)})),
    "no table": tensors(lambda file: file.pop("layers.2.mlp.engine.route_table")),
    "no table at all": tensors(lambda f: [f.pop(key) for key in list(f) if key.endswith("route_table")]),
    "tables of another length": tensor("route_table", lambda table: table[:, :500]),
    "tables of one route": tensor("route_table", lambda table: table[:1]),
    "tables of no route": tensor("route_table", lambda table: table[:0]),
    "tables of one dimension": tensor("route_table", lambda table: table[0]),
    "tables of floats": tensor("route_table", lambda table: table.float()),
    "tables of too large experts": tensor("route_table", lambda table: table + 1),
    "tables of negative experts": tensor("route_table", lambda table: table - 1),
    "experts of size zero": tensor("expert_gate", lambda weight: weight[:, :, :0]),
    "no experts": tensor("expert_gate", lambda weight: weight[:0]),
    "experts of one dimension": tensor("expert_gate", lambda weight: weight.flatten()),
    "experts the other way round": tensor("expert_down", lambda weight: weight.mT),
    "a shared expert of size zero": tensor("shared_gate.weight", lambda weight: weight[:0]),
    "an embedding of size zero": tensor("embed_tokens.weight", lambda weight: weight[:0]),
    "norms of size zero": tensor("layernorm.weight", lambda weight: weight[:0]),
    "keys of size zero": tensor("k_proj.weight", lambda weight: weight[:0]),
    "keys of three dimensions": tensor("k_proj.weight", lambda weight: weight[None]),
    "weights of integers": tensor("k_proj.weight", lambda weight: weight.to(torch.int8)),
    "weights of doubles": tensor("k_proj.weight", torch.Tensor.double),
    "weights of booleans": tensor("norm.weight", torch.Tensor.bool),
    "weights in FP8": tensor("k_proj.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
    "a weight that is NaN": wrong(float("nan")),
    "a weight that is infinite": wrong(float("inf")),
    "untied, without a head": keys(tie_word_embeddings=False),
    "a newest pack without weights": packs(gone(FILE)),
    "a newest pack without anything": packs(gone(FILE, "config.json", "tokenizer.json", "tokenizer_config.json")),
    "a newest pack whose weights are a pointer": packs(text(FILE, POINTER)),
    "a newest pack without a config": packs(gone("config.json")),
    "a newest pack without a tokenizer": packs(gone("tokenizer.json")),
    "a newest pack whose weights are cut": packs(cut(FILE, 60_000)),
}  # fmt: skip


NAMED = {  # what the sentence must name in addition to the path
    "tables of floats": "as F32, which is not supported: save it as I64, since it lists experts.",
    "weights of doubles": "as F64, which is not supported: save it as F32, F16 or BF16.",
    "no table": "lacks layers.2.mlp.engine.route_table",
    "tables of another length": "route_table has the shape [2, 500], but config.json implies [2, 600]",
    "a weight that is NaN": "embed_tokens.weight holds NaN, infinite or too large values",
    "the weights are a pointer": "is only a Git LFS pointer",
    "no tokenizer": "has no tokenizer.json",
    "a newest pack whose weights are cut": f"{PACK}/{FILE} is truncated",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_in_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "model")
    DAMAGES[name](folder)
    with pytest.raises((CheckpointError, ChatTemplateError, ConfigError, EngineStartError)) as caught:
        check(CheckConfig(model=str(folder), dtype="float32", device="cpu"))
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert NAMED.get(name, "") in sentence
    assert re.search(r"[.'}]$", sentence)
    assert not re.search(r"\n|\. [A-Z]|Traceback", sentence)
    assert "Verdict" not in capsys.readouterr().out


def test_files_next_to_packs_are_no_checkpoints(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    packs()(folder)
    (folder / "token_pack_003_10B.json").write_text("{}")
    assert check(CheckConfig(model=str(folder), dtype="float32", device="cpu")) == 0


def test_the_command_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    wrong(float("nan"))(folder)
    done = run_command("check", str(folder))
    assert done.returncode == 2
    assert re.fullmatch(r"pyllm: .*embed_tokens\.weight holds NaN.*\.\n", done.stderr)
    assert "Traceback" not in done.stdout
