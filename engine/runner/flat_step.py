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
    pending: Longs  # [2, P], the indices of pending tokens and their rows in the last step's draws
    positions: Longs  # [T], of each token in its own sequence
    slots: Longs  # [T], where in the pages its key and value go
    tables: Ints  # [S, B], the blocks of each sequence, padded with one of its own
    starts: Ints  # [S + 1], the first token of each sequence, and T
    lengths: Longs  # [S], tokens of each sequence after this step


def flatten(sequences: Sequence[ScheduledSequence], block_size: int) -> FlatStep:
    """Lay a step out."""
    requests = [sequence.request for sequence in sequences]
    begins = np.array([request.num_computed_tokens for request in requests])
    counts = np.array([sequence.num_tokens for sequence in sequences])
    ends = counts.cumsum()
    owners = np.repeat(np.arange(len(sequences)), counts)  # [T], the sequence of each token
    if ends[-1] == len(requests):  # decodes alone, the most frequent step
        ids = np.array([request.token_ids[at] for request, at in zip(requests, begins.tolist(), strict=True)])
    else:
        tokens: list[int] = []
        for request, count, _, draft in sequences:
            start = request.num_computed_tokens
            tokens += request.token_ids[start : start + count]
            tokens += draft
        ids = np.array(tokens)
    pending = np.flatnonzero(ids == PENDING_TOKEN)
    rows = np.array([request.draw_row for request in requests])[owners[pending]]
    ids[pending] = 0
    held = np.array([len(request.block_ids) for request in requests])
    blocks = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, held.sum())
    # The padding is a block of the sequence's own, so that it can read nothing of another.
    tables = np.repeat(blocks[held.cumsum() - 1][:, None], held.max(), axis=1)
    tables[np.arange(held.max()) < held[:, None]] = blocks
    positions = np.arange(len(ids)) + (begins - (ends - counts))[owners]
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    starts = np.concatenate(([0], ends)).astype(np.int32)
    return FlatStep(ids, np.stack((pending, rows)), positions, slots, tables, starts, begins + counts)
