"""A scheduled step as flat arrays, with its tokens and sequences in the order of the step."""

from __future__ import annotations

import itertools
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
    """T tokens of S sequences."""

    ids: Longs  # [T]; 0 for a pending token
    pending: tuple[Longs, Longs]  # [P] each, the indices of pending tokens and their rows in the last step's draws
    positions: Longs  # [T], of each token in its own sequence
    slots: Longs  # [T], where in the pages its key and value go
    tables: Ints  # [S, B], the blocks of each sequence, padded with one of its own
    counts: Longs  # [S], tokens of each sequence
    lengths: Longs  # [S], tokens of each sequence after this step

    @property
    def starts(self) -> Ints:
        """The first token of each sequence, and T: int32 [S + 1]."""
        starts: Ints = np.concatenate(([0], self.counts.cumsum())).astype(np.int32)
        return starts


def flatten(sequences: Sequence[ScheduledSequence], block_size: int) -> FlatStep:
    """Lay a step out."""
    requests = [sequence.request for sequence in sequences]
    begins = np.array([request.num_computed_tokens for request in requests])
    counts = np.array([sequence.num_tokens for sequence in sequences])
    owners = np.arange(len(requests))  # [T], the sequence of each token
    if counts.sum() == len(requests):  # decodes alone, the most frequent step
        positions = begins
        ids = np.array([request.token_ids[at] for request, at in zip(requests, begins.tolist(), strict=True)])
    else:
        tokens: list[int] = []
        for request, count, _, draft in sequences:
            start = request.num_computed_tokens
            tokens += request.token_ids[start : start + count]
            tokens += draft
        ids = np.array(tokens)
        owners = owners.repeat(counts)
        positions = np.arange(len(ids)) + (begins - (counts.cumsum() - counts))[owners]
    indices = rows = (ids == PENDING_TOKEN).nonzero()[0]
    if len(indices):
        ids[indices] = 0
        rows = np.array([requests[owner].draw_row for owner in owners[indices].tolist()])
    held = [len(request.block_ids) for request in requests]
    # The padding is a block of the sequence's own, so that it can read nothing of another.
    tables = np.empty((len(requests), max(held)), np.int32)
    tables[:] = np.array([request.block_ids[-1] for request in requests])[:, None]
    blocks = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, sum(held))
    tables[np.arange(max(held)) < np.array(held)[:, None]] = blocks
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return FlatStep(ids, (indices, rows), positions, slots, tables, counts, begins + counts)
