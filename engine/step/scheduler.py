"""Which tokens are computed in the next step.

There is no prefill phase and no decode phase: each request has tokens that are not computed yet, and a step computes
some of them, within a budget of tokens. The rules, in this order:

- Requests are served by rank: first come, first served, or by priority first; background requests (those of batches)
  come after all others. No request is overtaken by one of lower rank, so the first in the queue waits only for running
  requests.
- Every running sequence that needs a single token (a decode) is in the step; but of background requests only a few, if
  there are others, so that these are hardly slower. Prompts share the rest of the budget, by
  rank, in chunks if need be. In a step with decodes they get at most `max_num_prefill_tokens` (proportionally
  more when there are many decodes), which limits how much arriving prompts slow down running streams.
- A request is admitted when there are blocks for all its tokens, and one more for each running sequence.
- If blocks run out anyway, the running request of lowest rank is preempted and later computed from scratch,
  so that the one of highest rank advances in every step.
"""

from __future__ import annotations

import itertools
import logging
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..messages import EngineInfo
from .drafting import Drafter
from .kv_cache import KVCacheManager
from .request import PENDING_TOKEN, Request, RequestStatus

logger = logging.getLogger("pyllm.engine")
Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
by_rank = attrgetter("rank")
FEW_DECODES = 8
BACKGROUND_SHARE = 64  # in a step with other requests, at most this share of `max_num_seqs` are background requests
MIN_TOKENS = 16  # a step of one sequence is not made smaller than this


class ScheduledSequence(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a request."""

    request: Request
    num_tokens: int
    samples: bool  # they include the request's last token, so its next one is drawn
    draft: Sequence[int] = ()  # the last of them, which are only guesses: a token is drawn after each


@dataclass(frozen=True, slots=True)
class FlatStep:
    """A scheduled step as flat arrays: T tokens of S sequences, in order."""

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


class PreemptionNeeded(Exception):  # noqa: N818 - not an error: the step is planned later
    """A step cannot be planned before the one in flight is read."""


class Scheduler:
    """Continuous batching: requests join and leave between any two steps."""

    def __init__(self, info: EngineInfo) -> None:
        config = info.config
        self.kv_cache = KVCacheManager(
            config.num_kv_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.policy = config.scheduling_policy
        # All but a prompt's last chunk end at multiples of this, so that attention cuts its queries at the same places
        # however busy the engine is. If the budget cannot hold such a chunk and all decodes, chunks may end anywhere.
        fits = config.max_num_seqs + info.chunk_multiple <= config.max_num_batched_tokens
        self.chunk_multiple = info.chunk_multiple if fits else 1
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        # Maximum prompt tokens in a step with up to FEW_DECODES decodes.
        self.max_num_prefill_tokens = max(config.max_num_prefill_tokens, self.chunk_multiple)
        self._limits = self.chunk_multiple, self.max_num_seqs, self.max_num_batched_tokens, self.max_num_prefill_tokens
        self.waiting: list[Request] = []  # new and preempted requests, by rank
        self.running: list[Request] = []  # requests that have blocks, by rank
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens that were looked up in the prefix cache
        self.num_prefix_hits = 0  # of these, how many were found
        self._arrivals = itertools.count()
        self._ahead = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        priority = request.priority if self.policy == "priority" else 0
        request.rank = (request.background, priority, next(self._arrivals))
        insort(self.waiting, request, key=by_rank)

    def schedule(self, *, ahead: bool = False) -> list[ScheduledSequence]:
        """Choose the next step's sequences, those with a single token first, and allocate their blocks.

        With `ahead`, this is the step after the one in flight, whose tokens count as drawn. Nothing is computed for a
        request whose last token allowed by `max_tokens` is already pending. If a request would have to be preempted,
        raises `PreemptionNeeded` instead, because the in-flight step may free blocks by finishing requests; blocks
        already allocated are kept for the next attempt.
        """
        self._ahead = ahead
        self._preempt_for_priority()
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        budget, places = self._prefill_budget(), self._background_places()
        preemptions, index = self.num_preemptions, -1
        while (index := index + 1) < len(self.running):
            request = self.running[index]
            if self._ahead and request.is_complete:
                continue
            if request.background and (places := places - 1) < 0:
                break  # those of lower rank are background requests too
            start, end = request.num_computed_tokens, request.num_tokens
            count = 1 if end - start == 1 else self._chunk(start, end, budget)
            if not count:  # a prompt whose next chunk does not fit in the rest of the budget
                continue
            if not self._allocate(request):
                break  # it had the lowest rank and was preempted itself
            draft: Sequence[int] = ()
            if end - start > 1:
                budget -= count
            elif request.drafter is not None:
                draft = self._draft(request, request.drafter, budget)
                budget -= len(draft)
            samples = start + count == end and request.generates
            count += len(draft)
            (decodes if count == 1 else chunks).append(ScheduledSequence(request, count, samples, draft))
        # A step that preempted a request admits none: the freed blocks are for the running requests.
        while budget and self.waiting and self.num_preemptions == preemptions:
            request = self.waiting[0]
            prefix = self.kv_cache.find_prefix(request)
            start, end = len(prefix) * self.kv_cache.block_size, request.num_tokens
            count = self._chunk(start, end, budget)
            if not count or (request.background and places < 1) or not self._fits(request, prefix):
                break
            self._admit(request, prefix)
            budget -= count
            places -= request.background
            samples = start + count == end and request.generates
            (decodes if count == 1 else chunks).append(ScheduledSequence(request, count, samples))
        self._ahead = False
        return decodes + chunks

    def restore_limits(self) -> None:
        """Undo `shrink`, once the requests that needed so much memory are gone."""
        self.chunk_multiple, self.max_num_seqs, self.max_num_batched_tokens, self.max_num_prefill_tokens = self._limits

    def shrink(self, sequences: Sequence[ScheduledSequence]) -> bool:
        """Halve the limits of a step after one of these sequences ran out of memory; False if it cannot be smaller.

        The lower half in rank is preempted.
        """
        tokens, kept = sum(sequence.num_tokens for sequence in sequences), len(sequences) // 2
        if tokens <= MIN_TOKENS and kept == 0:
            return False
        for request in sorted((sequence.request for sequence in sequences), key=by_rank)[max(kept, 1) :]:
            self._preempt(request)
        self.max_num_seqs = max(kept, 1)
        self.max_num_batched_tokens = max(tokens // 2, self.max_num_seqs)
        if self.max_num_seqs + self.chunk_multiple > self.max_num_batched_tokens:
            self.chunk_multiple = 1
        prefill = min(self.max_num_prefill_tokens, self.max_num_batched_tokens)
        self.max_num_prefill_tokens = max(prefill, self.chunk_multiple)
        return True

    def finish(self, request: Request) -> None:
        """Remove a request, whatever its status, and free its blocks."""
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        request.status = RequestStatus.FINISHED
        self.kv_cache.free(request)

    def _prefill_budget(self) -> int:
        """Return how many prompt tokens the step may have alongside the decodes of the running requests."""
        decodes = sum([len(request.token_ids) - request.num_computed_tokens == 1 for request in self.running])
        budget = self.max_num_batched_tokens - decodes
        limit = self.max_num_prefill_tokens * max(decodes, FEW_DECODES) // FEW_DECODES
        return min(budget, limit) if decodes else budget

    def _background_places(self) -> int:
        """Return how many background requests the step may have."""
        firsts = self.running[:1] + self.waiting[:1]
        if all(request.background for request in firsts):
            return self.max_num_seqs
        return max(self.max_num_seqs // BACKGROUND_SHARE, 1)

    def _draft(self, request: Request, drafter: Drafter, budget: int) -> Sequence[int]:
        """Guess the tokens after the request's last one, if they fit and are worth their cost."""
        limit = min(budget, (request.params.max_tokens or budget) - request.num_output_tokens - 1)
        if limit < 1 or len(self.running) > drafter.settings.disable_by_batch_size:
            return ()
        try:
            draft = drafter.propose(request.token_ids, limit)
        except Exception:
            logger.exception("Request %s gets no more drafts after this error.", request.request_id)
            request.drafter = None
            return ()
        return draft if self.kv_cache.allocate(request, len(draft)) else ()

    def _chunk(self, start: int, end: int, budget: int) -> int:
        """Return how many of the tokens from `start` to `end` to compute; 0 if no whole chunk fits in the budget."""
        if end - start <= budget:
            return end - start
        return max(0, (start + budget) // self.chunk_multiple * self.chunk_multiple - start)

    def _preempt_for_priority(self) -> None:
        """Preempt running requests of lower rank than the first in the queue until it fits.

        Under fcfs that concerns only background requests: others that run arrived before those that wait.
        """
        if not self.waiting or not self.running or self.running[-1].rank < self.waiting[0].rank:
            return
        first = self.waiting[0]
        others = [request for request in self.running if request.rank < first.rank]
        room = self.kv_cache.pool.num_free + sum(len(request.block_ids) for request in self.running[len(others) :])
        if others and self.kv_cache.num_needed(first, self.kv_cache.find_prefix(first)) + len(others) > room:
            return  # it would not fit even if all those of lower rank were preempted
        while self.waiting and self.running and self.waiting[0].rank < self.running[-1].rank:
            if self._fits(self.waiting[0], self.kv_cache.find_prefix(self.waiting[0])):
                break
            self._preempt(self.running[-1])

    def _fits(self, request: Request, prefix: list[int]) -> bool:
        """Whether to admit `request`: its tokens must fit, and one more block for each running sequence.

        Otherwise it would soon be preempted, and its tokens computed twice.
        """
        if not self.running:
            return True
        needed = self.kv_cache.num_needed(request, prefix) + len(self.running)
        return len(self.running) < self.max_num_seqs and needed <= self.kv_cache.pool.num_free

    def _admit(self, request: Request, prefix: list[int]) -> None:
        if not self.kv_cache.admit(request, prefix):
            raise RuntimeError(
                f"request {request.request_id} of {request.num_tokens} tokens does not fit in the KV cache"
            )
        self.waiting.pop(0)
        insort(self.running, request, key=by_rank)
        if request.status is RequestStatus.WAITING:
            request.scheduled_time = time.monotonic()
            request.num_cached_tokens = request.num_computed_tokens
            if self.kv_cache.enable_prefix_caching and not request.reads_prompt:
                self.num_prefix_queries += request.num_prompt_tokens
            self.num_prefix_hits += request.num_cached_tokens
        request.status = RequestStatus.RUNNING

    def _allocate(self, request: Request) -> bool:
        """Allocate the next blocks of `request`, preempting from the lowest rank; False if it is preempted itself."""
        while not self.kv_cache.allocate(request):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        if self._ahead:
            raise PreemptionNeeded
        self.running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        insort(self.waiting, request, key=by_rank)
        self.num_preemptions += 1


def flatten(sequences: Sequence[ScheduledSequence], block_size: int) -> FlatStep:
    """Turn a scheduled step into flat arrays."""
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
    # Padded with a block of its own, so that a sequence can read nothing of another.
    tables = np.empty((len(requests), max(held)), np.int32)
    tables[:] = np.array([request.block_ids[-1] for request in requests])[:, None]
    blocks = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, sum(held))
    tables[np.arange(max(held)) < np.array(held)[:, None]] = blocks
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return FlatStep(ids, (indices, rows), positions, slots, tables, counts, begins + counts)
