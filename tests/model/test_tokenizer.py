"""The tokenizer: what counts as special, exact bytes, and decoding piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

from pyllm.model.config import CheckpointError, DeepConfig
from pyllm.model.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
SPECIAL = ["</s>", "<pad>", "<s>", "<unk>"]
OLD_SPECIAL = ["<|endoftext|>", "<|pad|>", "<|startoftext|>"]
CORPUS = ["hello world, hello there", "the cat and the dog say hello", "déjà vu, naïve café", "🎉🎉 party 🎉"]


def byte_level(special: list[str], *, wrap: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE; with `wrap` its post-processor puts `<s>` and `</s>` around every text."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    if wrap:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 0)]
        )
    return library


WRAPPED = Tokenizer(byte_level(SPECIAL, wrap=True), names={"bos_token": "<s>", "eos_token": "</s>"})

SaveFolder = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> SaveFolder:
    def write(library: tokenizers.Tokenizer, **files: Any) -> Path:
        library.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_plain_text_gets_no_special_token_around_it() -> None:
    ids = WRAPPED.encode("hello world")
    assert not set(ids) & WRAPPED.special_ids
    assert WRAPPED.decode(ids) == "hello world"


def test_bos_is_added_on_request_and_eos_never() -> None:
    assert WRAPPED.encode("hello", add_bos=True) == [2, *WRAPPED.encode("hello")]


def test_special_tokens_spelled_in_plain_text_stay_text() -> None:
    ids = WRAPPED.encode("a </s> b <s>")
    assert not set(ids) & WRAPPED.special_ids
    assert WRAPPED.decode(ids) == "a </s> b <s>"


def test_special_tokens_in_a_prompt_parse_as_in_the_library() -> None:
    library = byte_level(SPECIAL, wrap=True)
    for text in ("<s>hello</s><s> world", "<s><s>", "<", "", "café</s>", "</s", "x<pad>y"):
        assert WRAPPED.encode_prompt(text) == library.encode(text, add_special_tokens=False).ids


def test_special_tokens_that_swallow_spaces_do_so_in_prompts() -> None:
    library = byte_level(SPECIAL)
    library.add_special_tokens([tokenizers.AddedToken("<|end|>", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(library.to_str()))
    text = "hello  <|end|> \n world"
    assert tokenizer.encode_prompt(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == "helloworld"


@given(st.lists(st.sampled_from([*"<s>/pad|é🎉 \n", "</s>", "<s>", "hello"])))
def test_shielded_text_round_trips_without_special_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    shielded = WRAPPED.shield(text, "\ufdd0")
    assert not WRAPPED.spells_special(shielded)
    assert WRAPPED.encode_prompt(shielded, guard="\ufdd0") == WRAPPED.encode(text)


def test_overlapping_and_short_special_tokens_are_shielded() -> None:
    tokenizer = Tokenizer(byte_level(["aXa", "🎈"]))
    text = "aXaXa aXaXaXa 🎈🎈 b"
    ids = tokenizer.encode_prompt(tokenizer.shield(text, "\ufdd0") + "🎈", guard="\ufdd0")
    assert ids == [*tokenizer.encode(text), 1]
    assert not set(ids[:-1]) & tokenizer.special_ids


def test_adds_bos_follows_the_post_processor() -> None:
    assert WRAPPED.adds_bos
    assert not Tokenizer(byte_level(SPECIAL), names={"bos_token": "<s>"}).adds_bos


def test_truncation_and_padding_settings_of_the_file_are_ignored() -> None:
    library = byte_level(SPECIAL)
    library.enable_truncation(2)
    library.enable_padding(length=50)
    tokenizer = Tokenizer(library)
    assert tokenizer.decode(tokenizer.encode("hello world, hello there"), False) == "hello world, hello there"


def test_lone_surrogates_become_replacement_characters() -> None:
    assert WRAPPED.decode(WRAPPED.encode("a\ud800b\ud83c\udf89")) == "a\ufffdb🎉"


UNNORMALISED = Tokenizer(
    tokenizers.Tokenizer.from_str(json.dumps(json.loads(byte_level(SPECIAL).to_str()) | {"normalizer": None}))
)


@given(st.text())
def test_bytes_of_tokens_are_the_bytes_of_the_text(text: str) -> None:
    assert b"".join(map(UNNORMALISED.token_bytes, UNNORMALISED.encode(text))) == text.encode()


def test_special_tokens_give_their_spelling_also_outside_ascii() -> None:
    tokenizer = Tokenizer(byte_level(["<｜fin é｜>"]))
    assert tokenizer.token_text(0) == "<｜fin é｜>"
    assert tokenizer.decode([0], skip_special_tokens=False) == "<｜fin é｜>"
    assert tokenizer.decode([0]) == ""


def test_ids_outside_the_vocabulary_decode_to_nothing() -> None:
    beyond = WRAPPED.vocab_size
    assert WRAPPED.decode([beyond, *WRAPPED.encode("hello"), beyond + 1000]) == "hello"
    assert WRAPPED.token_bytes(beyond) == b""
    assert WRAPPED.decode_stream().step(beyond) == ""


@given(st.lists(st.integers(0, 320)), st.booleans())
@example([173, 258], True)  # the first two bytes of a surrogate
@example([173, 258, 33], False)
def test_stream_of_any_ids_equals_the_whole_decoding(ids: list[int], skip: bool) -> None:
    """Random ids are mostly broken UTF-8; the stream must neither raise nor stall nor differ."""
    stream = WRAPPED.decode_stream(skip)
    streamed = "".join(map(stream.step, ids))
    whole = WRAPPED.decode(ids, skip)
    assert whole.startswith(streamed)
    assert whole.removeprefix(streamed) in ("", "\ufffd")
    assert whole == streamed + stream.finish()


LIBRARY = byte_level(SPECIAL)


@given(st.lists(st.integers(0, 299)), st.booleans())
def test_decoding_agrees_with_the_library(ids: list[int], skip: bool) -> None:
    assert WRAPPED.decode(ids, skip) == LIBRARY.decode(ids, skip_special_tokens=skip)


def test_stream_never_gives_half_a_character() -> None:
    tokenizer = Tokenizer(byte_level(SPECIAL))
    ids = [id_ for byte in "né🦉!".encode() for id_ in range(tokenizer.vocab_size)
           if tokenizer.token_bytes(id_) == bytes([byte]) and id_ not in tokenizer.special_ids]  # fmt: skip
    stream = tokenizer.decode_stream()
    assert [stream.step(id_) for id_ in ids] == ["n", "", "é", "", "", "", "🦉", "!"]


def test_stream_continues_at_once_after_broken_bytes() -> None:
    broken = next(id_ for id_ in range(300) if WRAPPED.token_bytes(id_) == b"\xff")
    stream = WRAPPED.decode_stream()
    assert [stream.step(id_) for id_ in (broken, broken, WRAPPED.encode("h")[0])] == ["\ufffd", "\ufffd", "h"]


def test_folder_names_decide_special_tokens(save: SaveFolder) -> None:
    folder = save(
        byte_level(SPECIAL),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": None},
        special_tokens_map={"eos_token": "</s>", "bos_token": "<pad>", "pad_token": "<pad>"},
        config={"eos_token_id": 3, "hidden_size": 64, "vocab_size": 300},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0, 1)
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_tokenizer_without_names_uses_the_config_ids(save: SaveFolder) -> None:
    folder = save(byte_level(OLD_SPECIAL))
    assert Tokenizer.from_folder(folder).bos_token_id is None
    (folder / "config.json").write_text(json.dumps(DeepConfig().to_dict()))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 1], "bos_token_id": 2}))
    assert (Tokenizer.from_folder(folder).eos_token_id, Tokenizer.from_folder(folder).bos_token_id) == (0, 2)


def test_default_ids_do_not_turn_letters_into_special_tokens(save: SaveFolder) -> None:
    tokenizer = Tokenizer.from_folder(save(byte_level([]), config=DeepConfig().to_dict()))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_ids) == (None, None, frozenset())


def test_token_called_special_by_the_configuration_is_one(save: SaveFolder) -> None:
    library = byte_level(SPECIAL)
    library.add_tokens(["<|im_end|>"])
    folder = save(library, tokenizer_config={"additional_special_tokens": ["<|im_end|>", "<|unheard-of|>"]})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode_prompt("<|im_end|>") == [300]
    assert tokenizer.decode([300]) == ""
    assert 300 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.vocab_size == 301


def test_chat_template_is_looked_up_in_order(save: SaveFolder) -> None:
    folder = save(byte_level(SPECIAL))
    assert Tokenizer.from_folder(folder).chat_templates == {}
    (folder / "config.json").write_text(json.dumps({"chat_template": "model"}))
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "model"}
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "settings"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_folder(folder).chat_templates == {"tool_use": "tools", "default": "settings"}
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "own file"}


def test_unusable_tokenizer_is_refused_in_one_sentence(tmp_path: Path, save: SaveFolder) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        Tokenizer.from_folder(save(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))))
    folder = save(byte_level(SPECIAL))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(folder)


def test_meaningless_tokenizer_settings_are_ignored(save: SaveFolder) -> None:
    folder = save(byte_level(SPECIAL))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": -1, "bos_token_id": 2**70, "eos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"0": "</s>"}}))
    assert Tokenizer.from_folder(folder).eos_token_id == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the fixtures next to the repository")
def test_published_32k_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(SHARED / "tokenizer-32k")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0, 1)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.adds_bos
    assert tokenizer.vocab_size == 32000
    text = "Bonjour, ça va ? </s> 你好 🎉 <s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    library = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizer-32k" / "tokenizer.json"))
    assert tokenizer.encode_prompt(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the fixtures next to the repository")
def test_later_checkpoint_without_post_processor_adds_no_bos() -> None:
    folder = SHARED / "golden" / "j_2603_muguidance"
    assert not Tokenizer.from_folder(folder).adds_bos


def test_a_long_text_has_the_ids_of_its_parts():
    part = "hello world, the cat and the dog </s>\n"
    text = part * 400
    assert len(text) > 10_000
    assert WRAPPED.encode(text) == WRAPPED.encode(part) * 400
    assert WRAPPED.encode(text, add_bos=True) == [WRAPPED.bos_token_id, *WRAPPED.encode(text)]


def test_shielded_text_spells_no_format_mark():
    library = byte_level(SPECIAL)
    library.add_tokens([tokenizers.AddedToken("<call>", normalized=False, special=False)])
    tokenizer = Tokenizer(library)
    mark = library.token_to_id("<call>")
    foreign, guard = "one <call> two</s><call>", "\ufdd0"
    assert tokenizer.spells_added(foreign)
    assert mark in tokenizer.encode_prompt(foreign)
    ids = tokenizer.encode_prompt(f"<call>{tokenizer.shield(foreign, guard)}</s>", guard=guard)
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<call>{foreign}</s>"
    assert [n for n, id_ in enumerate(ids) if id_ in (mark, library.token_to_id("</s>"))] == [0, len(ids) - 1]
