"""A checkpoint's text files: what is odd about one is refused in one sentence, and what transformers reads is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint_files import load as load_weights
from tokenizers import Tokenizer as Library
from tokenizers import processors

from pyllm.engine.errors import RequestError
from pyllm.model import CheckpointError, DeepConfig
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.conversation import Message
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.generation.defaults import read_defaults

JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "model.safetensors.index.json",
)  # fmt: skip
TEXT_FILES = (*JSON_FILES, "chat_template.jinja")
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that has every kind of text file, each of them right."""
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "model.safetensors").rename(copy / SHARD)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": SHARD}}))
    (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    (copy / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return copy


def read_all(folder: Path) -> ChatTemplate:
    """Read the files as a server and its engine do; return the chat template."""
    DeepConfig.from_folder(folder)
    read_defaults(folder)
    load_weights(folder)
    return ChatTemplate.from_tokenizer(Tokenizer.from_folder(folder))


def refusal(folder: Path) -> str:
    with pytest.raises((CheckpointError, RequestError)) as caught:
        read_all(folder)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a device, pipe or socket where a file must be"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, pipe or socket where a file must be"),
    "folder": (Path.mkdir, "is a folder where a file must be"),
    "dangling link": (lambda path: path.symlink_to("blobs/gone"), "is a link to a file that does not exist"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read (Too many levels"),
    "empty": (Path.touch, "is empty"),
    "blank": (lambda path: path.write_text("\ufeff \n\n"), "is empty"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"\xe9": 1}'), "is not UTF-8"),
    "UTF-16": (lambda path: path.write_text("{}", encoding="utf-16"), "is not UTF-8"),
    "huge": (lambda path: os.truncate(path, 300 << 20) if path.touch() is None else None, "MiB: fetch it again"),
    "Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is only a Git LFS pointer to the file: run `git lfs pull`",
    ),
}
NOT_JSON = {
    "cut": '{"a": [1, 2',
    "deep list": '{"a": ' + "[" * 100_000,
    "deep object": '{"a": ' * 100_000,
    "list": "[1, 2]",
    "number": "1e3",
    "web page": "<!doctype html><title>Not found</title>",
    "integer of 5,000 digits": '{"a": ' + "1" * 5000 + "}",
    "two values": '{"vocab_size": 272, "vocab_size": 100}',
    "half a character": '{"chat_template": "\\ud800", "bos_token": "\\ud800"}',
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", TEXT_FILES)
def test_what_is_no_text_file_is_refused(folder: Path, name: str, kind: str) -> None:
    make, words = ODD[kind]
    replaced(folder / name, make)
    sentence = refusal(folder)
    assert str(folder / name) in sentence
    assert words in sentence


@pytest.mark.parametrize("kind", NOT_JSON)
@pytest.mark.parametrize("name", JSON_FILES)
def test_what_is_no_json_object_is_refused(folder: Path, name: str, kind: str) -> None:
    (folder / name).write_text(NOT_JSON[kind])
    sentence = refusal(folder)
    assert str(folder / name) in sentence
    assert re.search(
        r"cannot be read as (JSON|a tokenizer) \(.+\): fetch it again|does not hold a JSON object", sentence
    )


def test_a_file_that_may_not_be_read_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.json"
        path.write_text("{}")
        path.chmod(0)
        Path(name).chmod(0o755)
        user = os.geteuid()
        os.seteuid(user or 65534)  # the administrator may read every file
        try:
            with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Permission denied\): check it"):
                DeepConfig.from_folder(name)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [SHARD, "model.safetensors", "step_5.safetensors"])
def test_weights_that_are_no_file_are_refused(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink(missing_ok=True)
    if name.startswith("step"):
        (folder / "model.safetensors.index.json").unlink()
    make(folder / name)
    assert f"{folder / name} is a " in refusal(folder)


def test_weights_that_are_only_a_pointer_are_refused(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "run `git lfs pull`" in refusal(folder)


VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"vocab_size": 10**18}, "vocab_size must be a whole number between 1 and 4194304"),
    ("config.json", {"vocab_size": 1e3}, "vocab_size must be a whole number"),
    ("config.json", {"hidden_size": [[[]]]}, "hidden_size"),
    ("config.json", {"hidden_size": "9" * 10**6}, "hidden_size"),
    ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("config.json", {"num_hidden_layers": 1000}, "lacks layers.3."),
    ("config.json", {"vocab_size": 4 * 10**6}, "but config.json implies [4000000, 64]"),
    ("config.json", {"intermediate_size": 2**20}, "but config.json implies"),
    ("config.json", {"max_position_embeddings": 1}, "max_position_embeddings must be a whole number between 2 and"),
    ("config.json", {"max_position_embeddings": 10**18}, "max_position_embeddings"),
    ("config.json", {"rope_theta": 10**400}, "rope_theta must be a positive number"),
    ("config.json", {"rope_theta": 1e-300}, "rope_theta must be a positive number"),
    ("config.json", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
    ("config.json", {"dynamics_dt": float("inf")}, "dynamics_dt must be a positive number"),
    ("config.json", {"eos_token_id": [[0]]}, "eos_token_id must be ids below 272"),
    ("config.json", {"eos_token_id": 0.0}, "eos_token_id must be ids below 272"),
    ("config.json", {"bos_token_id": [2]}, "bos_token_id must be an id or null"),
    ("config.json", {"hidden_act": "relu"}, "hidden_act 'relu' exists for the dense MLP only"),
    ("config.json", {"hidden_act": ["silu"]}, "hidden_act ['silu'] is not one of"),
    ("config.json", {"mlp_type": {"a": 1}}, "mlp_type {'a': 1} belongs to another line"),
    ("config.json", {"sliding_window": 10**30}, "sliding_window"),
    ("config.json", {"chat_template": 5}, ""),
    ("generation_config.json", {"eos_token_id": [0, "x"]}, "eos_token_id must be ids below 272, but got (0, 'x')"),
    ("generation_config.json", {"eos_token_id": 10**6}, "eos_token_id must be ids below 272"),
    ("generation_config.json", {"eos_token_id": {"a": 1}}, "eos_token_id must be ids below 272"),
    ("generation_config.json", {"temperature": "hot"}, "has temperature = 'hot', but Expected `float`"),
    ("generation_config.json", {"temperature": [0.5]}, "temperature = [0.5]"),
    ("generation_config.json", {"top_p": 7}, """or pass --override-generation-config '{"top_p": null}'"""),
    ("generation_config.json", {"top_k": 1e3}, "top_k = 1000.0"),
    ("generation_config.json", {"top_p": float("nan")}, "top_p = nan"),
    ("generation_config.json", {"max_new_tokens": 10**30}, "max_new_tokens"),
    ("generation_config.json", {"do_sample": "no"}, "do_sample = 'no', but it must be true or false"),
    ("tokenizer_config.json", {"additional_special_tokens": 5}, "additional_special_tokens must be a list of tokens"),
    ("tokenizer_config.json", {"additional_special_tokens": [5]}, "additional_special_tokens must be a list of tokens"),
    ("tokenizer_config.json", {"extra_special_tokens": {"a": []}}, "extra_special_tokens must be a list of tokens"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token must be a token, but got 5"),
    ("special_tokens_map.json", {"bos_token": ["<s>"]}, "bos_token must be a token"),
    ("special_tokens_map.json", {"additional_special_tokens": "<s>"}, "must be a list of tokens"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, "id 2147483648"),
    ("tokenizer.json", {"added_tokens": [{"id": 2**31}]}, "cannot be read as a tokenizer"),
    ("tokenizer.json", {"model": 5}, "cannot be read as a tokenizer"),
    ("model.safetensors.index.json", {"weight_map": []}, "is not an index with a weight_map"),
    ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "lists 5, which is not the name"),
    ("model.safetensors.index.json", {"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "which is not the name"),
    ("model.safetensors.index.json", {"weight_map": {"a": "../" + SHARD}}, "which is not the name"),
    ("model.safetensors.index.json", {"weight_map": {"a": "a\0.safetensors"}}, "which is not the name"),
    ("model.safetensors.index.json", {"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors, which"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), VALUES, ids=lambda value: str(value)[:50])
def test_values_that_mean_nothing_are_refused(folder: Path, name: str, changes: dict[str, Any], words: str) -> None:
    if "chat_template" in changes:
        (folder / "chat_template.jinja").unlink()
        change(folder, "tokenizer_config.json", chat_template=None)
    change(folder, name, **changes)
    sentence = refusal(folder)
    assert str(folder / name) in sentence or f"{folder} lacks" in sentence or "implies" in sentence
    assert words in sentence


def test_a_post_processor_with_an_unknown_token_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    library = Library.from_file(str(path))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    library.save(str(path))
    path.write_text(path.read_text().replace('"id": "<s>",\n', '"id": "<gone>",\n', 1))
    assert "the post_processor uses ['<gone>'] without declaring it" in refusal(folder)


TEMPLATES = {
    "deep": "{{ " + "(" * 10**5,
    "deep blocks": "{% if 1 %}" * 10**5,
    "long chain": "{{ " + "not " * 10**5 + "1 }}",
    "many branches": "{% if 0 %}" + "{% elif 1 %}" * 20_000 + "{% endif %}",
    "long": "x" * 2**21,
    "open": "{% if",
    "unknown tag": "{% generations %}",
    "open generation": "{% generation %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_cannot_be_compiled_is_refused(folder: Path, kind: str) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(TEMPLATES[kind])
    assert f"The chat template of {path} is not valid Jinja (" in refusal(folder)


@pytest.mark.parametrize(
    "template", [["x"], 5, [], {}, [{"name": "default"}], {"default": 5}, [{"template": "x"}], " "]
)
def test_a_template_of_another_type_is_refused(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template=template)
    assert f"{folder / 'tokenizer_config.json'}: chat_template must be a template, or templates by name" in refusal(
        folder
    )


def test_templates_without_a_default_are_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template={"tool_use": "x", "rag": "y"})
    assert "names its chat templates 'tool_use, rag', and none is the default: pass the one" in refusal(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert ChatTemplate.from_tokenizer(tokenizer, "mine").source == "mine"


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_byte_order_mark_is_dropped(folder: Path, name: str) -> None:
    (folder / "model.safetensors").symlink_to(SHARD)
    before = read_all(folder).render([Message("user", "Hi")])
    (folder / name).write_text("\ufeff" + (folder / name).read_text())
    assert read_all(folder).render([Message("user", "Hi")]) == before


def test_oddities_that_transformers_reads_are_read(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(SHARD)
    change(folder, "config.json", initializer_range=float("nan"), note="\ud83e\udd89", eos_token_id=[0, 3])
    change(
        folder, "tokenizer_config.json", model_max_length=int(1e30), additional_special_tokens=[{"content": "<pad>"}]
    )
    change(folder, "special_tokens_map.json", pad_token=None, extra_special_tokens={"image": "<unk>"})
    path = folder / "generation_config.json"
    path.write_text('{"temperature": 0.5, "temperature": 0.5, "top_k": null}')
    read_all(folder)
    assert DeepConfig.from_folder(folder).eos_token_ids == (0, 3)


@pytest.mark.parametrize(
    ("ends", "found"), [([0, 10], (0, 10)), (10, (0, 10)), (0, (0,)), (None, (0,)), (-1, (0,)), ([], (0,))]
)
def test_end_tokens_are_those_of_both_files(folder: Path, tmp_path: Path, ends: Any, found: tuple[int, ...]) -> None:
    change(folder, "generation_config.json", eos_token_id=ends)
    assert DeepConfig.from_folder(folder).eos_token_ids == found
    assert DeepConfig.from_folder(folder, "none").eos_token_ids == (0,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert DeepConfig.from_folder(folder, str(tmp_path)).eos_token_ids == (0, 7)


def test_templates_are_found_where_transformers_finds_them(folder: Path) -> None:
    def templates() -> dict[str, str]:
        return dict(Tokenizer.from_folder(folder).chat_templates)

    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with tools")
    assert templates() == {"default": "{{ messages[0].content }}", "tool_use": "with tools"}
    (more / "tool_use.jinja").unlink()
    (folder / "chat_template.jinja").unlink()
    change(folder, "config.json", chat_template="of the model")
    change(folder, "tokenizer_config.json", chat_template={"default": "a", "tool_use": "b", "rag": "c"})
    assert templates() == {"default": "a", "tool_use": "b", "rag": "c"}
    change(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": "of the tokenizer"}])
    assert templates() == {"default": "of the tokenizer"}
    change(folder, "tokenizer_config.json", chat_template=None)
    assert templates() == {"default": "of the model"}
    (folder / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert templates() == {"default": "of the processor"}
