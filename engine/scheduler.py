"""Which tokens are computed in the next step.

There is no prefill phase and no decode phase: each request has tokens that are not computed yet, and
a step computes some of them, within a budget of tokens. Running requests come first, oldest first, so
a decode is never held up by a new prompt; a prompt that does not fit in what is left is computed in
chunks over several steps. When the KV blocks run out, the youngest running request gives up its own
and computes them anew later, so the oldest always moves on.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from .block_pool import KVCacheManager
from .request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next `num_tokens` uncomputed tokens of a request; `samples` when they reach its end."""

    request: Request
    num_tokens: int
    samples: bool


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
        chunk_multiple: a chunk that is not a prompt's last ends at a multiple of this position, so that the same
            blocks of queries are computed however busy the engine is. It counts only where the budget has room for
            that beside a decode of every sequence.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunk_multiple: int = 1,
    ) -> None:
        self.kv_cache = kv_cache
        fits = max_num_seqs + chunk_multiple <= max_num_batched_tokens
        self.chunk_multiple = chunk_multiple if fits else 1
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and give them their blocks."""
        budget = self.max_num_batched_tokens
        sequences: list[ScheduledSequence] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            count = self._chunk(request, budget)
            if not count:
                index += 1  # a prompt whose next chunk does not fit in what is left; single tokens still may
                continue
            while not self.kv_cache.allocate(request, count):
                preempted = True
                self._preempt(self.running[-1])
                if request.status is RequestStatus.PREEMPTED:
                    break
            else:
                sequences.append(self._scheduled(request, count))
                budget -= count
                index += 1
                continue
            break  # the youngest gave up its own blocks: nobody is left after it
        # A step that had to preempt admits nobody: the blocks that it freed are for those who run.
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not preempted:
            request = self.waiting[0]
            count = self._chunk(request, budget)
            if not count or not self._has_room(request) or not self.kv_cache.allocate(request, count):
                break
            self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            request.scheduled_time = request.scheduled_time or time.monotonic()
            self.running.append(request)
            sequences.append(self._scheduled(request, count))
            budget -= count
        sequences.sort(key=lambda sequence: sequence.num_tokens > 1)
        return SchedulerOutput(sequences, self.max_num_batched_tokens - budget)

    def finish(self, request: Request) -> None:
        """Forget a request, in whatever state it is, and take its blocks back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self.kv_cache.free(request)

    def _chunk(self, request: Request, budget: int) -> int:
        """How many tokens of `request` to compute with `budget` left, 0 when no whole chunk fits."""
        start, end = request.num_computed_tokens, request.num_tokens
        if end - start <= budget:
            return end - start
        return max(0, (start + budget) // self.chunk_multiple * self.chunk_multiple - start)

    def _has_room(self, request: Request) -> bool:
        """Whether to admit `request`: its tokens so far must fit beside a block more for each running sequence.

        Otherwise the newcomer would soon be preempted, and its tokens computed twice.
        """
        needed = -(-request.num_tokens // self.kv_cache.block_size)
        return not self.running or needed + len(self.running) <= self.kv_cache.pool.num_free

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    @staticmethod
    def _scheduled(request: Request, count: int) -> ScheduledSequence:
        return ScheduledSequence(request, count, request.num_computed_tokens + count == request.num_tokens)
