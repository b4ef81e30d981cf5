"""The demo model's training data as tokens: the tokenizer, and blocks of steps drawn from the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from minijinja import Environment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pyllm.model.demo.corpus import Corpus
from pyllm.model.demo.phrasing import Sample
from pyllm.model.demo.template import ASSISTANT, BOS, CALL_TOKENS, EOS, PAD, SPECIAL, TEMPLATE

SEED = 20261130
VOCAB = 2048
CONTEXT = 2048
TOKENS_PER_PASS = 1280
"""Of rows of about the same length, through the network at once: what a core's cache holds."""
PASSES_PER_STEP = 4
"""A multiple of the processes that share them."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, and for each whether the model is to learn to write it."""

    kind: str
    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows padded to one length, one after the other: ids int64 [T] and what is learned, bool [T]."""

    kinds: list[str]
    length: int
    ids: Tensor
    learn: Tensor


class Data:
    """Draws blocks of steps, each from its own seed: a block is the same after a restart."""

    def __init__(self, tokenizer_file: Path, rows_per_block: int = 1000) -> None:
        self.rows_per_block = rows_per_block
        self.environment = Environment()
        if not tokenizer_file.exists():
            rng, corpus = Random(SEED), Corpus()
            chats = [self.render(corpus.conversation(rng)) for _ in range(30_000)]
            train_tokenizer(chats).save(str(tokenizer_file))
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        texts = range(len(SPECIAL) + len(CALL_TOKENS), self.tokenizer.get_vocab_size())
        pieces = {self.tokenizer.decode([id_]).strip() for id_ in texts}
        self.corpus = Corpus(sorted(piece for piece in pieces if piece.isalpha() and piece.islower()))

    def render(self, sample: Sample) -> str:
        """The chat as text, by the template that is shipped."""
        return self.environment.render_str(TEMPLATE, messages=sample.messages, tools=list(sample.tools))

    def chat(self, sample: Sample) -> Row:
        """The chat as tokens; what the assistant says, with its end token, is to be learned."""
        ids = self.tokenizer.encode(self.render(sample)).ids[:CONTEXT]
        learn, speaking = [], False
        for at, token in enumerate(ids):
            learn.append(speaking and ids[at - 1] != ASSISTANT)  # the newline after the role is given
            speaking = token == ASSISTANT or (speaking and token != EOS)
        return Row(sample.kind, ids, learn)

    def copying(self, rng: Random) -> Row:
        """Random tokens, mostly all different, then the same again once or twice: all is in the context."""
        first = len(SPECIAL + CALL_TOKENS)
        if rng.random() < 0.2:
            start = rng.randrange(first, VOCAB - 12)
            tokens = [rng.randrange(start, start + 12) for _ in range(rng.randint(4, 12))]
        else:
            tokens = rng.sample(range(first, VOCAB), rng.randint(4, 24))
        again = rng.choice((1, 2))
        learn = [False] * len(tokens) + [True] * (len(tokens) * again + 1)
        return Row("copying", tokens * (1 + again) + [EOS], learn)

    def drill(self, rng: Random) -> Row:
        """A page of bare sums or spelt words."""
        ids = self.tokenizer.encode(self.corpus.drill(rng)).ids
        return Row("drill", [BOS, *ids, EOS], [False, *[True] * (len(ids) + 1)])

    def row(self, rng: Random, copies: float) -> Row:
        """One row: with the chance `copies` an exercise in copying, else now and then a drill, mostly a chat."""
        if rng.random() < copies:
            return self.copying(rng)
        draw = rng.random()
        if draw < 0.06:
            return self.drill(rng)
        long = draw > 0.998
        return self.chat(self.corpus.conversation(rng, rng.randint(8, 40) if long else None))

    def block(self, number: int, copies: float) -> Iterator[list[Pass]]:
        """The steps of one block, each with passes of different lengths."""
        rng = Random(f"{SEED} {number}")
        rows = sorted((self.row(rng, copies) for _ in range(self.rows_per_block)), key=lambda row: len(row.ids))
        passes: list[Pass] = []
        batch: list[Row] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(row.ids) > TOKENS_PER_PASS:
                passes.append(_padded(batch))
                batch = []
            batch.append(row)
        rng.shuffle(passes)
        for at in range(0, len(passes) - PASSES_PER_STEP + 1, PASSES_PER_STEP):
            yield passes[at : at + PASSES_PER_STEP]


def _padded(rows: list[Row]) -> Pass:
    length = max(len(row.ids) for row in rows)
    ids = [row.ids + [PAD] * (length - len(row.ids)) for row in rows]
    learn = [row.learn + [False] * (length - len(row.learn)) for row in rows]
    return Pass([row.kind for row in rows], length, torch.tensor(ids).flatten(), torch.tensor(learn).flatten())


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE whose digits stand alone, so that sums are sums of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [AddedToken(mark, special=mark in SPECIAL, normalized=False) for mark in SPECIAL + CALL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=marks, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(values))
