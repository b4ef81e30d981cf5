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
    """

    def __init__(self, kv_cache: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.kv_cache = kv_cache
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
            count = min(request.num_tokens - request.num_computed_tokens, budget)
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
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            if not self.kv_cache.allocate(request, count):
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

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    @staticmethod
    def _scheduled(request: Request, count: int) -> ScheduledSequence:
        return ScheduledSequence(request, count, request.num_computed_tokens + count == request.num_tokens)
