"""Which tokens are computed in the next step.

There is no prefill phase and no decode phase: each request has tokens that are not computed yet, and a step computes
some of them, within a budget of tokens. The rules, in this order:

- Requests are served by rank: first come, first served, or by priority first. Nobody is overtaken by a lower rank,
  so whoever is first in the queue waits for those who run, and for nobody else.
- Every running sequence that needs a single token (a decode) is in the step. Prompts share what is left of the
  budget, by rank, in chunks if need be. Beside decodes they get `max_num_prefill_tokens` at most (in proportion more
  beside many), so that arriving prompts slow running streams down only so far.
- A request is admitted when there are blocks for all its tokens, beside one more for each running sequence.
- When the blocks run out nevertheless, the running request of lowest rank gives up its own and is computed anew
  later, so that the one of highest rank moves on in every step.
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

from ..config import SchedulingPolicy
from .kv_cache import KVCacheManager
from .request import Request, RequestStatus

logger = logging.getLogger("pyllm.engine")
by_rank = attrgetter("rank")


FEW_DECODES = 8
LEAST_TOKENS = 16
"""A step of one sequence with no more tokens than these is not made smaller."""


class ScheduledSequence(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a request; `samples` when they reach its end and it is to go on.

    The last of them may be a `draft`: tokens that are only guessed, so that each of them is drawn for as well.
    """

    request: Request
    num_tokens: int
    samples: bool
    draft: Sequence[int] = ()


class _MustPreempt(Exception):  # noqa: N818 - not an error: somebody else decides what to do
    """A step cannot be planned ahead."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: its sequences, those with a single token first."""

    sequences: list[ScheduledSequence]
    num_tokens: int


class Scheduler:
    """Continuous batching: requests join and leave between any two steps.

    Args:
        kv_cache: gives and takes the blocks.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: token budget of a step.
        max_num_prefill_tokens: most prompt tokens of a step that has up to FEW_DECODES decodes, and in proportion more
            where it has more, since it takes longer anyway; None sets no limit of its own.
        policy: `fcfs` serves in the order of arrival, `priority` by priority and then arrival.
        chunk_multiple: a chunk that is not a prompt's last ends at a multiple of this position, so that the same
            blocks of queries are computed however busy the engine is. It counts only where the budget has room for
            that beside a decode of every sequence.

    Attributes:
        waiting: new and preempted requests, by rank.
        running: requests that have blocks, by rank.
        num_preemptions: since the start, as are
        num_prefix_queries: prompt tokens of admitted requests, looked up in the prefix cache, and
        num_prefix_hits: how many of those were found.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_prefill_tokens: int | None = None,
        policy: SchedulingPolicy = "fcfs",
        chunk_multiple: int = 1,
    ) -> None:
        self.kv_cache = kv_cache
        fits = max_num_seqs + chunk_multiple <= max_num_batched_tokens
        self.chunk_multiple = chunk_multiple if fits else 1
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_prefill_tokens = max(max_num_prefill_tokens or max_num_batched_tokens, self.chunk_multiple)
        self._limits = self.chunk_multiple, max_num_seqs, max_num_batched_tokens, self.max_num_prefill_tokens
        self.policy = policy
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._arrivals = itertools.count()
        self._ahead = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        request.rank = (request.priority if self.policy == "priority" else 0, next(self._arrivals))
        insort(self.waiting, request, key=by_rank)

    def schedule_ahead(self) -> SchedulerOutput | None:
        """`schedule` while a step is under way whose tokens count as drawn; None if somebody must be preempted for it.

        Some of those who run may be about to end, so first it is found out who does. Nothing is computed for a request
        whose last token by `max_tokens` is awaited.
        """
        self._ahead = True
        try:
            return self.schedule()
        except _MustPreempt:
            return None  # blocks that were given until here are used when it is planned anew
        finally:
            self._ahead = False

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and give them their blocks."""
        self._make_way()
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        budget = self._prefill_budget()
        preemptions = self.num_preemptions
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if self._ahead and request.is_spent:
                index += 1
                continue
            start, end = request.num_computed_tokens, request.num_tokens
            count = 1 if end - start == 1 else self._chunk(start, end, budget)
            if count:  # else a prompt whose next chunk does not fit in what is left
                if not self._allocate(request):
                    break  # it had the lowest rank and gave up its own blocks: nobody is left after it
                draft: Sequence[int] = ()
                if end - start > 1:
                    budget -= count
                elif request.drafter is not None:
                    draft = self._draft(request, budget)
                    budget -= len(draft)
                sequence = self._sequence(request, start, count, draft)
                (decodes if sequence.num_tokens == 1 else chunks).append(sequence)
            index += 1
        # A step that had to preempt admits nobody: the blocks that it freed are for those who run.
        while budget and self.waiting and self.num_preemptions == preemptions:
            request = self.waiting[0]
            prefix = self.kv_cache.find_prefix(request)
            start, end = len(prefix) * self.kv_cache.block_size, request.num_tokens
            count = self._chunk(start, end, budget)
            if not count or not self._fits(request, prefix):
                break
            self._admit(request, prefix)
            budget -= count
            (decodes if count == 1 else chunks).append(self._sequence(request, start, count))
        return SchedulerOutput(decodes + chunks, len(decodes) + sum(chunk.num_tokens for chunk in chunks))

    def recover(self) -> None:
        """Take back what `shrink` did: whoever needed so much memory is gone."""
        self.chunk_multiple, self.max_num_seqs, self.max_num_batched_tokens, self.max_num_prefill_tokens = self._limits

    def shrink(self, sequences: Sequence[ScheduledSequence]) -> bool:
        """After a step of these that found no memory: halve what steps may hold; False if it can be no smaller.

        The lower half in rank makes way, and is computed anew later.
        """
        tokens, kept = sum(sequence.num_tokens for sequence in sequences), len(sequences) // 2
        if tokens <= LEAST_TOKENS and kept == 0:
            return False
        for request in sorted((sequence.request for sequence in sequences), key=by_rank)[max(kept, 1) :]:
            self._preempt(request)
        self.max_num_seqs = max(kept, 1)
        self.max_num_batched_tokens = max(tokens // 2, self.max_num_seqs)
        if self.max_num_seqs + self.chunk_multiple > self.max_num_batched_tokens:
            self.chunk_multiple = 1
        self.max_num_prefill_tokens = max(
            min(self.max_num_prefill_tokens, self.max_num_batched_tokens), self.chunk_multiple
        )
        return True

    def finish(self, request: Request) -> None:
        """Forget a request, in whatever state it is, and take its blocks back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self.kv_cache.free(request)

    def _prefill_budget(self) -> int:
        """Tokens that prompts may have in a step beside the decodes of those who run now."""
        decodes = sum([len(request.token_ids) - request.num_computed_tokens == 1 for request in self.running])
        budget = self.max_num_batched_tokens - decodes
        return (
            min(budget, self.max_num_prefill_tokens * max(decodes, FEW_DECODES) // FEW_DECODES) if decodes else budget
        )

    def _draft(self, request: Request, budget: int) -> Sequence[int]:
        """A guess of the tokens after the request's last one, where there is room for them and it is worth it."""
        assert request.drafter is not None  # for the type checker
        most = min(budget, (request.params.max_tokens or budget) - request.num_output_tokens - 1)
        if most < 1 or len(self.running) > request.drafter.max_batch_size:
            return ()
        try:
            draft = request.drafter.propose(request.token_ids, most)
        except Exception:
            logger.exception("Nothing can be guessed for request %s any more.", request.request_id)
            request.drafter = None
            return ()
        return draft if self.kv_cache.allocate(request, len(draft)) else ()

    def _chunk(self, start: int, end: int, budget: int) -> int:
        """How many of the tokens from `start` to `end` to compute with `budget` left, 0 when no whole chunk fits."""
        if end - start <= budget:
            return end - start
        return max(0, (start + budget) // self.chunk_multiple * self.chunk_multiple - start)

    @staticmethod
    def _sequence(request: Request, start: int, count: int, draft: Sequence[int] = ()) -> ScheduledSequence:
        samples = start + count == request.num_tokens and request.generates
        return ScheduledSequence(request, count + len(draft), samples, draft)

    def _make_way(self) -> None:
        """Let the first in the queue displace those of lower rank who run in its place, if it is held up by them.

        First come, first served, there are none such: whoever waits came after all who run.
        """
        if not self.waiting or not self.running or self.running[-1].rank < self.waiting[0].rank:
            return
        first = self.waiting[0]
        others = [request for request in self.running if request.rank < first.rank]
        room = self.kv_cache.pool.num_free + sum(len(request.block_ids) for request in self.running[len(others) :])
        if others and self.kv_cache.num_needed(first, self.kv_cache.find_prefix(first)) + len(others) > room:
            return  # it would not fit even without all those of lower rank
        while self.waiting and self.running and self.waiting[0].rank < self.running[-1].rank:
            if self._fits(self.waiting[0], self.kv_cache.find_prefix(self.waiting[0])):
                break
            self._preempt(self.running[-1])

    def _fits(self, request: Request, prefix: list[int]) -> bool:
        """Whether to admit `request`: its tokens so far must fit beside a block more for each running sequence.

        Otherwise the newcomer would soon be preempted, and its tokens computed twice.
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
        """Give `request` its next blocks, at the cost of the lowest in rank; False when that is `request` itself."""
        while not self.kv_cache.allocate(request):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        if self._ahead:
            raise _MustPreempt
        self.running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        insort(self.waiting, request, key=by_rank)
        self.num_preemptions += 1
