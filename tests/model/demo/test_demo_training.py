"""What the demo model is trained on, and how: nothing that is held back, and the same again after a restart."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from pyllm.benchmarks.demo.checkers import is_right, read_questions
from pyllm.model import AttentionMetadata, DeepForCausalLM
from pyllm.model.backend import Backend
from pyllm.model.demo import parallel
from pyllm.model.demo.corpus import Corpus
from pyllm.model.demo.data import Data
from pyllm.model.demo.items import COUNTRIES, LANGUAGES, WORDS, is_held_out, pair_is_held_out
from pyllm.model.demo.network import TrainingBackend, config, new_model
from pyllm.model.demo.phrasing import Sample
from pyllm.model.demo.train import COPIES, Trainer, copies

DEMO = Path(__file__).resolve().parents[3] / "model" / "demo"
CHATS = 4000


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def chats(corpus: Corpus) -> list[Sample]:
    rng = Random(5)
    return [corpus.conversation(rng) for _ in range(CHATS)]


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(DEMO / "tokenizer.json", rows_per_block=120)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    """Five words in a row, or the whole of a shorter text."""
    found = words(text)
    return {tuple(found[at : at + 5]) for at in range(max(1, len(found) - 4))}


def texts(chats: list[Sample]) -> list[str]:
    return [message["content"] for chat in chats for message in chat.messages if message["content"]]


def test_training_shares_no_five_words_with_the_questions(corpus: Corpus, chats: list[Sample]) -> None:
    rng = Random(6)
    trained = texts(chats) + [line for _ in range(300) for line in corpus.drill(rng).split("\n")]
    held = set().union(*(runs(question["question"]) for question in read_questions()))
    assert not [text for text in trained if runs(text) & held]


def test_held_out_items_are_never_in_training(corpus: Corpus, chats: list[Sample]) -> None:
    rng = Random(7)
    drills = [corpus.drill(rng) for _ in range(300)]
    trained = {word for text in texts(chats) + drills for word in words(text)}
    spelled = {text.rstrip(".").replace("-", "") for text in texts(chats) if re.fullmatch(r"(\w-)*\w\.", text)}
    held = {word for language in LANGUAGES for word in WORDS[language] if is_held_out("word", word)}
    held |= {words(c.capital[language])[-1] for c in COUNTRIES if c.held_out for language in LANGUAGES}
    assert len(held) > 80
    assert not held & (trained | spelled)
    sums = [
        tuple(map(int, pair)) for text in texts(chats) + drills for pair in re.findall(r"(\d+) [+-] (\d+) = \d+", text)
    ]
    asked = [pair for pair in sums if max(pair) > 19]  # smaller ones are also what other sums are worked out with
    assert len(asked) > 500
    assert not [pair for pair in asked if pair_is_held_out(*pair)]


def test_every_kind_is_drawn_in_both_languages(corpus: Corpus) -> None:
    rng = Random(8)
    for kind in corpus.kinds:
        for language in LANGUAGES:
            assert len({str(corpus.draw(rng, kind, f"{language} {language}").messages) for _ in range(40)}) > 2


@pytest.mark.parametrize(
    ("kind", "pattern", "check"),
    [("sums", r"= (\d+)\.$", "number"), ("spelling", r"(.*)\.", "spelling"), ("counting", r"(.*)\.", "sequence")],
)
def test_the_trained_answers_would_count_as_right(corpus: Corpus, kind: str, pattern: str, check: str) -> None:
    rng = Random(9)
    for _ in range(200):
        question, answer = (message["content"] for message in corpus.draw(rng, kind).messages)
        match = re.search(pattern, answer)
        assert match is not None
        expect = {"number": [match[1]], "spelling": match[1].replace("-", ""), "sequence": match[1].split(", ")}[check]
        if len(expect) > 1 or check == "number":
            assert is_right({"question": question, "check": check, "expect": expect}, answer), (question, answer)


def test_sums_are_worked_out_with_the_last_digits() -> None:
    assert Corpus.sum_answer(27, "+", 15) == "7 + 5 = 12, 27 + 15 = 42."
    assert Corpus.sum_answer(42, "-", 15) == "12 - 5 = 7, 42 - 15 = 27."
    assert Corpus.sum_answer(7, "+", 5) == "7 + 5 = 12."
    assert Corpus.sum_answer(12, "-", 5) == "12 - 5 = 7."
    assert Corpus.sum_answer(23, "+", 14) == "23 + 14 = 37."


def test_the_same_seed_draws_the_same_chats(corpus: Corpus) -> None:
    first, second = ([corpus.conversation(rng) for _ in range(50)] for rng in (Random(1), Random(1)))
    assert first == second


def test_a_block_holds_whole_rows_of_similar_length(data: Data) -> None:
    for passes in data.block(3, 0.5):
        for one in passes:
            assert len(one.ids) == len(one.learn) == one.length * len(one.kinds)
            assert one.learn.any()


def test_the_training_backend_computes_the_same_network() -> None:
    model = new_model(config(hidden=64, layers=2, width=64))
    with torch.no_grad():
        for layer in model.layers:
            assert layer.router is not None
            layer.mu.normal_()
            layer.router.normal_(std=3)
    ids, metadata = torch.arange(10, 50), AttentionMetadata.without_cache([20, 20])
    positions = torch.arange(20).repeat(2)
    model.ops = Backend()
    plain = model(ids, positions, metadata)
    backend = model.ops = TrainingBackend()
    trained = model(ids, positions, metadata)
    torch.testing.assert_close(trained, plain, rtol=1e-4, atol=1e-5)
    assert any(backend.rerouted)
    trained.square().sum().backward()
    assert all(layer.router.grad.abs().sum() > 0 for layer in model.layers if layer.router is not None)


def test_the_untrained_network_copies_what_it_never_saw() -> None:
    model = new_model(config())
    model.ops = TrainingBackend()
    rng, right, total = Random(9), 0, 0
    for _ in range(20):
        tokens = rng.sample(range(10, model.config.vocab_size), rng.randint(4, 24))
        ids, length = torch.tensor(tokens * 2), len(tokens)
        with torch.no_grad():
            hidden = model(ids, torch.arange(2 * length), AttentionMetadata.without_cache([2 * length]))
            guessed = model.logits(hidden[length:-1]).argmax(-1)
        right += int((guessed == ids[length + 1 :]).sum())
        total += length - 1
    assert right > 0.9 * total


def test_copying_is_mostly_taught_at_first() -> None:
    shares = [copies(progress / 20) for progress in range(20)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == COPIES


def small_trainer(data: Data) -> Trainer:
    shape = config(hidden=64, layers=2, width=64)
    return Trainer(data, new_model(type(shape)(**shape.to_dict() | {"vocab_size": 6000})))


def weights(model: DeepForCausalLM) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def train_together(rank: int, out: Path) -> None:
    parallel.join(rank, 2, str(out / "meeting"))
    torch.set_num_threads(1)
    trainer = small_trainer(Data(DEMO / "tokenizer.json", rows_per_block=120))
    for _ in range(2):
        trainer.block(2)
    torch.save(trainer.state(), out / f"{rank}.pt")


def test_two_processes_train_as_one_does(data: Data, tmp_path: Path) -> None:
    spawn(train_together, (tmp_path,), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.pop("seconds") != second.pop("seconds")
    alone = small_trainer(data)
    for _ in range(2):
        alone.block(2)
    assert alone.steps == first["steps"] > 1
    assert alone.tokens == first["tokens"]
    assert {*first["losses"], *second["losses"]} == set(alone.losses)
    for name, expected in alone.model.state_dict().items():
        torch.testing.assert_close(first["model"][name], second["model"][name], rtol=0, atol=0)
        torch.testing.assert_close(first["model"][name], expected, rtol=0, atol=1e-4)


def test_an_interrupted_training_ends_with_the_same_weights(data: Data, tmp_path: Path) -> None:
    whole, first, second = (small_trainer(data) for _ in range(3))
    whole.block(2)
    whole.block(2)
    first.block(2)
    torch.save(first.state(), tmp_path / "state.pt")
    second.load(torch.load(tmp_path / "state.pt"))
    second.block(2)
    assert second.losses == whole.losses
    for mine, expected in zip(weights(second.model), weights(whole.model), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
