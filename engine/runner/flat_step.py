"""A scheduled step as flat arrays: what every token and every sequence is, in the order of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..step.request import PENDING_TOKEN
from ..step.scheduler import ScheduledSequence

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class FlatStep:
    """T tokens of S sequences.

    Attributes:
        ids: int64 [T]; 0 where the token is awaited.
        awaited: places of tokens that the last step draws, and their rows in its draws.
        positions: int64 [T], of each token in its own sequence.
        slots: int64 [T], where in the pages its key and value go.
        tables: int32 [S, B], the blocks of each sequence, padded with one of its own.
        counts: int64 [S], tokens of each sequence.
        lengths: int64 [S], tokens of each sequence behind this step.
    """

    ids: Longs
    awaited: list[tuple[int, int]]
    positions: Longs
    slots: Longs
    tables: Ints
    counts: Longs
    lengths: Longs

    @property
    def starts(self) -> Ints:
        """Where each sequence begins, and the end of the last: int32 [S + 1]."""
        starts: Ints = np.concatenate(([0], self.counts.cumsum())).astype(np.int32)
        return starts


def flatten(sequences: Sequence[ScheduledSequence], block_size: int) -> FlatStep:
    """Lay a step out."""
    begins = np.array([sequence.request.num_computed_tokens for sequence in sequences])
    counts = np.array([sequence.num_tokens for sequence in sequences])
    tokens: list[int] = []
    awaited: list[tuple[int, int]] = []
    blocks = [sequence.request.block_ids for sequence in sequences]
    tables = np.empty((len(sequences), max(map(len, blocks))), np.int32)
    for row, sequence in enumerate(sequences):
        request = sequence.request
        start = request.num_computed_tokens
        tokens += request.token_ids[start : start + sequence.num_tokens]
        if tokens[-1] == PENDING_TOKEN:
            awaited.append((len(tokens) - 1, request.draw_row))
            tokens[-1] = 0
        tokens += sequence.draft
        tables[row, : len(blocks[row])] = blocks[row]
        # Padded with a page of its own, so that whatever another sequence may hold can't reach this one.
        tables[row, len(blocks[row]) :] = blocks[row][-1]
    owner = np.repeat(np.arange(len(sequences)), counts)  # [T], the sequence of each token
    positions = np.arange(len(tokens)) + (begins - (counts.cumsum() - counts))[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return FlatStep(np.array(tokens), awaited, positions, slots, tables, counts, begins + counts)
