"""Long texts are encoded in pieces: the ids are those of the whole, in linear time and little memory."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from pyllm.model.config import CheckpointError
from pyllm.model.long_text import GPT2, MAX_WINDOW, WINDOW, WORDS, IndivisibleTextError
from pyllm.model.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "model" / "demo"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizer-32k"
CORPUS = [
    "hello world, don't we'll they're",
    "déjà vu café 🎉🎉 中文",
    "aaaa abababab    x\n\n\n  w",
    "12345 678 !!! ... ''",
]
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
JOINED = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = [
    PLAIN,
    JOINED,
    pre_tokenizers.Sequence([pre_tokenizers.Digits(), JOINED]),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN]),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Punctuation(), PLAIN]),
    pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), PLAIN]),
    pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2), "removed", invert=True), JOINED]),
    *(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), JOINED]) for words in sorted(WORDS)),
]
NORMALIZERS = [
    None,
    normalizers.NFC(),
    normalizers.NFD(),
    normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
]
TOKENS = ["<call>", "<call", "aab", "中", "é", "'s", "<s>x"]
FRAGMENTS = ["a", "b", "ab", " ", "  ", "\t", "\n", "\r\n", "'", "'s", "'re", "'l", "don't", "1", "12", "!", "<call>",
             "<call", "<s>", "<s>x", "é", "e\u0301", "\u0301", "\u0323", "中", "🎉", "가", "\u1100", "\u1161", "\u00a0",
             "\u3000", "\x1c", "\x85", "hello", " world", "K", "ﬁ", "½", "ſ"]  # fmt: skip


@functools.cache
def trained() -> str:
    """The JSON of a small byte-level BPE."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = PLAIN, ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    return str(made.to_str())


def library(
    splits: pre_tokenizers.PreTokenizer = PLAIN,
    normalizer: normalizers.Normalizer | None = None,
    added: Sequence[AddedToken] = (),
) -> tokenizers.Tokenizer:
    """A small byte-level BPE."""
    made = tokenizers.Tokenizer.from_str(trained())
    made.pre_tokenizer = splits
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens([*added])
    return made


def whole(made: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of the library's own encoding of the whole text, in which special tokens are text."""
    reference = tokenizers.Tokenizer.from_str(made.to_str())
    reference.encode_special_tokens = True
    return list(reference.encode(text, add_special_tokens=False).ids)


added_tokens = st.builds(
    AddedToken, st.sampled_from(TOKENS), special=st.just(False), normalized=st.booleans(), lstrip=st.booleans(),
    rstrip=st.booleans(), single_word=st.booleans(),
)  # fmt: skip
long_texts = st.lists(
    st.tuples(st.sampled_from(FRAGMENTS), st.sampled_from([1, 1, 1, 2, 3, 7, 50, 700])), min_size=1, max_size=12
).map(lambda parts: "".join(fragment * count for fragment, count in parts))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(SPLITS), st.sampled_from(NORMALIZERS), st.lists(added_tokens, max_size=3), long_texts,
    st.integers(2, 30),
)  # fmt: skip
def test_pieces_have_the_ids_of_the_whole(
    splits: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None, added: list[AddedToken], text: str,
    times: int,
) -> None:  # fmt: skip
    made = library(splits, normalizer, added)
    text = (text * max(times, WINDOW * 2 // len(text) + 1))[: 4 * WINDOW]
    expected = whole(made, text)
    assert Tokenizer(made).encode(text) == expected


@pytest.mark.parametrize("unit", [*FRAGMENTS, "''s", "'s'ts", " a  b", "abcab", "中文,", "x" * 99 + " "])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "NFC"])
def test_a_repeated_unit_is_encoded_in_bounded_pieces(unit: str, normalizer: normalizers.Normalizer | None) -> None:
    made = library(normalizer=normalizer)
    text = unit * (8 * WINDOW // len(unit))
    pieces = list(Tokenizer(made).encode_pieces(text))
    assert [id_ for piece in pieces for id_ in piece] == whole(made, text)
    if normalizer is None or unit not in ("\u0301", "\u0323", "\u1100", "\u1161"):  # which others may compose with
        assert max(map(len, pieces)) <= 4 * WINDOW  # a character has up to four tokens


@pytest.mark.parametrize(
    "folder", [DEMO, pytest.param(SHARED, marks=pytest.mark.skipif(not SHARED.is_dir(), reason="-"))]
)
def test_published_tokenizers_read_long_texts_in_pieces(folder: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    prose = "".join(f"Line {n}: the café's 2nd dog isn't 中文, </s><tool_call>{n}  \t\n" for n in range(1000))
    for text in (prose, prose.replace(" ", ""), "a" * 20_000, "=" * 20_000, " " * 20_000 + "x", "7" * 20_000):
        pieces = list(tokenizer.encode_pieces(text))
        assert [id_ for piece in pieces for id_ in piece] == whole(made, text)
        assert len(pieces) > 2


RUNS = [" ", "a", "!", "7", "'", "\u0301", "中", "\n", "<|end", "<|end|>", " <|end|> ", "hello "]


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize(("lstrip", "rstrip"), [*itertools.product([True, False], repeat=2)])
def test_work_is_linear_with_every_flag_of_an_added_token(special: bool, lstrip: bool, rstrip: bool) -> None:
    for single_word, normalized in itertools.product([True, False], repeat=2):
        token = AddedToken(
            "<|end|>", special=special, lstrip=lstrip, rstrip=rstrip, single_word=single_word, normalized=normalized
        )
        made = library()
        made.add_special_tokens([token]) if special else made.add_tokens([token])
        tokenizer = Tokenizer(made)
        for run in RUNS:
            used = []
            for length in (4000, 16000):
                text = (run * length)[:length]
                start = time.process_time()
                tokenizer.spells_special(text)
                tokenizer.encode_prompt(tokenizer.shield(text, "\ufdd0") + "<|end|>", guard="\ufdd0")
                tokenizer.encode_prompt(text)
                used.append(time.process_time() - start)
            assert used[1] < 8 * max(used[0], 0.05), (run, token)


FLAGS = [
    dict(zip(("lstrip", "rstrip", "single_word"), f, strict=True)) for f in itertools.product([True, False], repeat=3)
]


@pytest.mark.parametrize("flags", FLAGS)
@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.sampled_from(["<|a|>", "<|a|>b", " ", "\n", "x", "_", ".", "<|", "é"]), max_size=30))
def test_special_tokens_in_prompts_are_those_of_the_library(flags: dict[str, bool], parts: list[str]) -> None:
    made = library()
    made.add_special_tokens([AddedToken("<|a|>", normalized=False, **flags), AddedToken("<|a|>b", normalized=False)])
    text = "".join(parts)
    expected = made.encode(text, add_special_tokens=False).ids
    assert Tokenizer(tokenizers.Tokenizer.from_str(made.to_str())).encode_prompt(text) == expected


@pytest.mark.parametrize("count", [2, 3000])
def test_many_tokens_cost_no_more_than_few_to_find(count: int) -> None:
    tokenizer = Tokenizer(library(added=[AddedToken(f"<|reserved_{n}|>", normalized=False) for n in range(count)]))
    start = time.process_time()
    assert not tokenizer.spells_added("<|reserved_" * 20_000)
    assert time.process_time() - start < 5


def test_what_can_only_be_read_together_is_bounded() -> None:
    tokenizer = Tokenizer(library(normalizer=normalizers.NFC()))
    with pytest.raises(IndivisibleTextError, match="more than 131072 characters in a row"):
        tokenizer.encode("\u0301" * 300_000)


DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HONEST = [
    DEEPSEEK,
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[一-龥ࠀ-一가-퟿]+",  # DeepSeek-Coder
    "[一-龥\u3040-ゟ゠-ヿ]+",  # DeepSeek-V3
    "[0-9][0-9][0-9]",  # Falcon
    r"\p{N}{1,2}",  # nanochat
    r"[^\n]+|\n",
    r"[A-Za-z_]\w*|0x[0-9a-fA-F]+|\d+\.?\d*|[=!<>]=|&&|\|\||\s+|.",  # code
    r"(?<=\p{Ll})(?=\p{Lu})",
    r"\p{Han}+|[^\p{Han}]+",
    r" ?[^\s]+|\s+",
    r"<[^>]{0,40}>",
    r"'s|'t|'re|'ve|'m|'ll|'d|\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]
SLOW = [
    r"\s*<call>", r"\s*\n", r"\s+$", r"\s+(?=\n)", r"(\s+)+x", r"(a+)+b", r"(a|aa)+$", r"a*a*a*b", r"x*y",
    r".*?foo", r"[^\n]*foo", r"\w+@\w+", r"<!--.*?-->", r"(?:\d{3},)*x", r"\d{1,3}(?=(?:\d{3})*\b)",
    r"[\p{L}\p{M}]+(?=')", r"(?:\p{Lu}\d-|\p{Lu}\d-\p{Lu}\d-)+$", r"(?<=a.*)b", r"(.*)\1x",
]  # fmt: skip


def written(folder: Path, expression: str, place: str) -> tokenizers.Tokenizer:
    """A tokenizer with an expression in its normalizer or pre-tokenizer, which is also a file in `folder`."""
    made = library()
    if place == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(expression), "x")])
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), JOINED])
    made.save(str(folder / "tokenizer.json"))
    return made


def in_both_places(expressions: list[str]) -> list[tuple[str, str]]:
    return [(e, "pre_tokenizer") for e in expressions] + [(e, "normalizer") for e in expressions[:3]]


@pytest.mark.parametrize(("expression", "place"), in_both_places(HONEST))
def test_expressions_of_other_tokenizers_are_accepted(tmp_path: Path, expression: str, place: str) -> None:
    made = written(tmp_path, expression, place)
    tokenizer = Tokenizer.from_folder(tmp_path)
    prose = "".join(f"Line {n}: 0xFF != 中文, don't\tgetName()\n\n  <b>1234567 e\u0301</b>" for n in range(500))
    for text in ("a", prose[:200], prose, " " * 10_000 + "x", "A" * 10_000 + "'"):
        assert tokenizer.encode(text) == whole(made, text)


@pytest.mark.parametrize(("expression", "place"), in_both_places(SLOW))
def test_an_expression_shown_to_be_slow_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], expression: str, place: str
) -> None:
    written(tmp_path, expression, place)
    with pytest.raises(CheckpointError, match="which takes far too long on long texts") as refused:
        Tokenizer.from_folder(tmp_path)
    assert repr(expression)[:10] in str(refused.value)
    assert not capfd.readouterr().err  # where the library panics, it writes a trace


def test_a_slow_expression_after_others_is_refused(tmp_path: Path) -> None:
    made = library()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in (r"\p{N}{1,2}", r"\s*\n")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, JOINED])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="far too long"):
        Tokenizer.from_folder(tmp_path)


def test_a_huge_expression_does_not_hold_up_the_start(tmp_path: Path) -> None:
    words = "|".join(f"{n:x}word" for n in range(20_000))
    made = written(tmp_path, rf"(?:{words})|\s+", "pre_tokenizer")
    start = time.process_time()
    assert Tokenizer.from_folder(tmp_path).encode("1word") == whole(made, "1word")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("run", RUNS)
def test_work_is_linear_with_an_unknown_expression(run: str) -> None:
    made = library(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(DEEPSEEK), "isolated"), JOINED]))
    tokenizer, used = Tokenizer(made), []
    for length in (60_000, 240_000):
        text = (run * length)[:length]
        start = time.process_time()
        ids = tokenizer.encode(text)
        used.append(time.process_time() - start)
        assert ids == whole(made, text)
    assert used[1] < 8 * max(used[0], 0.05)


def test_a_text_too_long_for_an_unknown_expression_is_refused() -> None:
    made = library(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(DEEPSEEK), "isolated"), JOINED]))
    message = (
        f"^The text has {MAX_WINDOW + 1} characters, but .* at most {MAX_WINDOW} characters at a time: shorten it.$"
    )
    with pytest.raises(IndivisibleTextError, match=message):
        Tokenizer(made).encode("a" * (MAX_WINDOW + 1))


@pytest.mark.parametrize("length", [40, 5000])
def test_a_text_on_which_the_library_panics_is_refused(length: int) -> None:
    made = library(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), JOINED]))
    tokenizer = Tokenizer(made)
    with pytest.raises(IndivisibleTextError, match="takes too many steps"):
        tokenizer.encode("a" * length + "!")
    assert tokenizer.encode("ab") == whole(made, "ab")


def test_tokens_on_which_the_library_panics_are_refused(tmp_path: Path) -> None:
    made = library(added=[AddedToken("<x>", rstrip=True), AddedToken("  ")])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="begin with white space"):
        Tokenizer.from_folder(tmp_path)


MEASURE = """
import json, sys
from pyllm.model.tokenizer import Tokenizer

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

tokenizer = Tokenizer.from_folder(sys.argv[1])
sum(map(len, tokenizer.encode_pieces("hello world, " * 5000)))
grown = []
for text in ("hello world, " * 80_000, "a" * 1_000_000, "=" * 1_000_000):
    before = peak()
    sum(map(len, tokenizer.encode_pieces(text)))
    grown.append(peak() - before)
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_text() -> None:
    root = str(Path(__file__).resolve().parents[2])
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(DEMO)], capture_output=True, text=True, check=True, cwd=root
    )
    assert max(json.loads(found.stdout)) < 4000  # KiB: at most four bytes for each byte of text
