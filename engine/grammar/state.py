"""Which tokens a request's grammar allows next.

Each request with a grammar has its own matcher. It consumes the drawn tokens, and makes the mask of the next
one while the network runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import llguidance
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checker import TOO_SLOW, error_of
from .object_keys import KeyTracker

MASK_SECONDS = 2.0  # a slower mask ends its request; the parser's own limits normally stop it much earlier
Bits = npt.NDArray[np.uint8]
MASK_TABLE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)
"""FP32 [256, 8]: the numbers that each byte of a bit mask adds to the scores of its eight tokens."""


@dataclass(eq=False, slots=True)
class GrammarState:
    """One sequence's progress through its grammar."""

    matcher: llguidance.LLMatcher
    avoided: Bits | None  # bits of the tokens allowed only if no other token is
    mask_bytes: int  # length of a bit mask
    error: str = ""  # why the grammar cannot be followed further
    finished: bool = False  # nothing can follow the text so far
    keys: KeyTracker | None = None  # rules out keys that the grammar would repeat

    def fill(self, bits: Bits) -> None:
        """Set the bits of the tokens that may come next, uint8 [mask_bytes]; all of them after an error."""
        if not self.error:
            self.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            if self.matcher.is_error():
                self.fail(error_of(self.matcher))
            elif self.keys is not None:
                self.keys.forbid(bits)
                if not bits.any():
                    self.fail("every key that it allows here is already in the object")
        if self.error:
            bits[:] = 255
        elif self.avoided is not None and (rest := bits & ~self.avoided).any():
            bits[:] = rest

    def consume(self, token_id: int) -> None:
        """Advance by a token that was drawn."""
        if not self.error:
            if not self.matcher.consume_token(token_id):
                self.fail(error_of(self.matcher))
            else:
                self.finished = self.matcher.is_stopped()
                if self.keys is not None:
                    self.keys.consume(token_id)

    def fail(self, reason: str) -> None:
        """Stop following the grammar; the request ends with this error."""
        self.error = f"The grammar could not be followed: {reason}."


class MaskBatch:
    """The masks of one step's sequences, made in order, from the state `first` on."""

    def __init__(self, states: Sequence[GrammarState], first: int = 0) -> None:
        self.states = states
        self.done = first  # rows of `masks` that are ready
        self.masks = np.zeros((len(states), 8 * states[0].mask_bytes), np.float32)
        self.abandoned = False  # one of the masks hangs, so the thread must not write any more
        self.error: Exception | None = None  # an internal error
        self.finished = threading.Event()

    def make(self) -> None:
        """Make the masks, unless the batch is abandoned."""
        try:
            bits = np.empty(self.states[0].mask_bytes, np.uint8)
            while self.done < len(self.states) and not self.abandoned:
                self.states[self.done].fill(bits)
                if not self.abandoned:
                    np.take(MASK_TABLE, bits, axis=0, out=self.masks[self.done].reshape(-1, 8))
                    self.done += 1
        except Exception as error:
            self.error = error
        self.finished.set()


class MaskMaker:
    """Makes masks in its own thread while the network runs; the library releases Python's lock meanwhile."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[MaskBatch] | None = None

    def start(self, states: Sequence[GrammarState]) -> MaskBatch:
        """Begin to make the masks of `states`, which belong to the batch until `finish`."""
        return self._queue(MaskBatch(states))

    def finish(self, batch: MaskBatch) -> Tensor:
        """Wait for the masks, FP32 [len(states), vocab or more]: 0 for tokens that may come next, -inf for the rest.

        Raises the internal error, if there was one.
        """
        done = batch.done
        while not batch.finished.wait(MASK_SECONDS):
            if batch.done == done:
                # Native code cannot be interrupted: its thread is abandoned, and a new one makes the other masks.
                batch.abandoned, self._batches = True, None
                batch.states[done].fail(TOO_SLOW)
                rest = MaskBatch(batch.states, first=done + 1)
                rest.masks[:done] = batch.masks[:done]
                batch = self._queue(rest)
            done = batch.done
        if batch.error is not None:
            raise batch.error
        return torch.from_numpy(batch.masks)

    def _queue(self, batch: MaskBatch) -> MaskBatch:
        if self._batches is None:
            batches: queue.SimpleQueue[MaskBatch] = queue.SimpleQueue()
            try:
                threading.Thread(target=_make_batches, args=(batches,), name="masks", daemon=True).start()
            except RuntimeError:  # the system allows no more threads: make them here, which takes longer
                batch.make()
                return batch
            self._batches = batches
        self._batches.put(batch)
        return batch


def _make_batches(batches: queue.SimpleQueue[MaskBatch]) -> None:
    batch = None
    while batch is None or not batch.abandoned:
        batch = batches.get()
        batch.make()
