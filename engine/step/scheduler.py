"""Which tokens are computed in the next step.

There is no prefill phase and no decode phase: each request has tokens that are not computed yet, and a step computes
some of them, within a budget of tokens. The rules, in this order:

- Requests are served by level: background requests (those of batches) come after all others, and under the policy
  `priority` the lowest number comes first. Within a level each client's requests are served in the order of arrival;
  several clients take turns.
- The next request to be admitted comes from the client with the fewest running requests; among several such clients,
  from the one with the fewest computed prompt tokens. No other request overtakes it, so it waits only for running
  requests. It is admitted when there are blocks for all its tokens, and one more for each running sequence.
- Every running sequence that needs a single token (a decode) is in the step; of background requests, only a few are if
  there are other requests, which are then hardly slower. Prompts share the rest of the budget, in chunks if necessary;
  the client with the fewest computed prompt tokens comes first. In a step with decodes, prompts get at most
  `max_num_prefill_tokens` (more in proportion to many decodes), so that new prompts do not slow down streams too much.
- If all `max_num_seqs` sequences run, a client with fewer than its share of them is admitted all the same. The last
  request of a client with more than its share then pauses: it keeps its blocks, and continues where it was.
- If blocks run out, the running request with the last claim to them is preempted, and later recomputes what has left
  the cache. That is, in the last level, the request of the client whose older requests hold the most blocks together.
  So the request with the first claim advances in every step.
"""

from __future__ import annotations

import itertools
import logging
import time
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from ..messages import EngineInfo
from .drafting import Drafter
from .kv_cache import KVCacheManager
from .request import Request, RequestStatus, ScheduledSequence

logger = logging.getLogger("pyllm.engine")
by_rank, by_turn = attrgetter("rank"), attrgetter("turn")
FEW_DECODES = 8
BACKGROUND_SHARE = 64  # in a step with other requests, at most this share of `max_num_seqs` are background requests
MIN_TOKENS = 16  # a step of one sequence is not made smaller than this


@dataclass(eq=False, slots=True)
class ClientQueue:
    """The unfinished requests of one client in one level."""

    level: tuple[bool, int]
    waiting: list[Request] = field(default_factory=list)  # new and preempted ones, by rank
    running: list[Request] = field(default_factory=list)  # those that have blocks, by rank
    num_read: int = 0  # prompt tokens computed for the client, or for others while it had no request

    @property
    def turn(self) -> tuple[tuple[bool, int], int, int, tuple[bool, int, int]]:
        """When its next request is admitted, lowest first."""
        return self.level, len(self.running), self.num_read, self.waiting[0].rank


class PreemptionNeeded(Exception):  # noqa: N818 - not an error: the step is planned later
    """A step cannot be planned before the step in flight is read."""


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
        self.running: list[Request] = []  # requests that have blocks, by rank
        self._queues: dict[tuple[bool, int, str], ClientQueue] = {}  # of clients with unfinished requests
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens that were looked up in the prefix cache
        self.num_prefix_hits = 0  # how many of those were found
        self._speculates = config.speculative_config is not None
        self._arrivals = itertools.count()
        self._ahead = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._queues)

    @property
    def waiting(self) -> list[Request]:
        """New and preempted requests, by rank."""
        return sorted(itertools.chain.from_iterable(queue.waiting for queue in self._queues.values()), key=by_rank)

    @property
    def num_paused(self) -> int:
        """Running requests that are paused for another client's."""
        return max(len(self.running) - self.max_num_seqs, 0)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        priority = request.priority if self.policy == "priority" else 0
        request.rank = (request.background, priority, next(self._arrivals))
        level = request.rank[:2]
        queue = self._queues.setdefault((*level, request.client), ClientQueue(level))
        if not queue.waiting:  # a client gains no credit while it has no requests
            others = [other for other in self._queues.values() if other.level == level and other is not queue]
            wait = [other.num_read for other in others if other.waiting]
            queue.num_read = max(queue.num_read, min(wait) if wait else max((o.num_read for o in others), default=0))
        insort(queue.waiting, request, key=by_rank)

    def schedule(self, *, ahead: bool = False) -> list[ScheduledSequence]:
        """Choose the next step's sequences, those with a single token first, and allocate their blocks.

        With `ahead`, this is the step after the one in flight, whose tokens count as drawn. Nothing is computed for a
        request whose last token allowed by `max_tokens` is already pending. If a request would have to be preempted,
        raises `PreemptionNeeded` instead, because the in-flight step may free blocks by finishing requests; blocks
        already allocated are kept for the next attempt.
        """
        self._ahead = ahead
        room = self.max_num_prefill_tokens
        while room > 0 and (admitted := self._serve_next_client()) is not None:
            room -= admitted.num_tokens - admitted.num_computed_tokens
        preemptions = self.num_preemptions
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self._allocate_step():
            single = len(request.token_ids) - request.num_computed_tokens == 1
            (decoding if single else prompts).append(request)
        budget = self._prefill_budget(len(decoding))
        decodes = [ScheduledSequence(request, 1, request.generates) for request in decoding]
        chunks: list[ScheduledSequence] = []
        if self._speculates:
            decodes, chunks = self._draft_all(decodes, budget)
            budget -= sum(len(sequence.draft) for sequence in chunks)
        # A step that preempted a request admits none: the freed blocks are for the running requests.
        for sequence in self._read_prompts(prompts, budget, admits=self.num_preemptions == preemptions):
            (decodes if sequence.num_tokens == 1 else chunks).append(sequence)
        self._ahead = False
        return decodes + chunks

    def restore_limits(self) -> None:
        """Undo `shrink`, once the requests that needed so much memory have ended."""
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
        queue = self._queue_of(request)
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            queue.running.remove(request)
        else:
            queue.waiting.remove(request)
        if not queue.waiting and not queue.running:
            del self._queues[(*queue.level, request.client)]
        request.status = RequestStatus.FINISHED
        self.kv_cache.free(request)

    def _queue_of(self, request: Request) -> ClientQueue:
        return self._queues[(*request.rank[:2], request.client)]

    def _next_waiting(self) -> Request | None:
        """Return the request to admit next."""
        queues = [queue for queue in self._queues.values() if queue.waiting]
        if len(queues) < 2:
            return queues[0].waiting[0] if queues else None
        return min(queues, key=by_turn).waiting[0]

    def _allocate_step(self) -> list[Request]:
        """Return the running requests that the step may have, with blocks for all their tokens.

        If too few blocks are free, preempts those with the last claim to them, perhaps the request itself.
        """
        chosen: list[Request] = []
        places, preemptions = self._background_places(), self.num_preemptions
        for request in self._unpaused():
            if self._ahead and request.is_complete:
                continue
            if request.status is not RequestStatus.RUNNING:  # just preempted
                continue
            if request.background and (places := places - 1) < 0:
                break  # those of lower rank are background requests too
            while request.status is RequestStatus.RUNNING and not self.kv_cache.allocate(request):
                self._preempt(max(self._claims())[-1])
            chosen.append(request)
        if self.num_preemptions == preemptions:
            return chosen
        return [request for request in chosen if request.status is RequestStatus.RUNNING]

    def _unpaused(self) -> list[Request]:
        """Return the running requests; if these are too many, each client's oldest ones, up to an equal share."""
        if not self.num_paused:
            return self.running.copy()
        chosen: list[Request] = []
        queues = [queue for queue in self._queues.values() if queue.running]
        queues.sort(key=lambda queue: (queue.level, len(queue.running), queue.running[0].rank))
        for _, same in itertools.groupby(queues, key=attrgetter("level")):
            clients = list(same)
            for done, queue in enumerate(
                clients
            ):  # clients with the fewest requests first, since the others share the places they leave
                share = (self.max_num_seqs - len(chosen)) // (len(clients) - done)
                chosen += queue.running[:share]
        return chosen

    def _claims(self) -> list[tuple[tuple[bool, int], int, int, Request]]:
        """Return the running requests, each after its claim to blocks, lowest first."""
        claims = []
        for queue in self._queues.values():
            held = 0
            for request in queue.running:
                claims.append((queue.level, held, request.rank[2], request))
                held += len(request.block_ids)
        return claims

    def _read_prompts(self, prompts: list[Request], budget: int, *, admits: bool) -> Iterator[ScheduledSequence]:
        """Yield chunks of the running `prompts` and, if the step `admits` them, of waiting ones."""
        while budget > 0:
            running = min(prompts, key=self._reading_turn) if prompts else None
            request = self._next_waiting() if admits else None
            if running is not None and (request is None or not self._reads_before(request, running)):
                request = running
                prompts.remove(request)
                count = self._chunk(request.num_computed_tokens, request.num_tokens, budget)
            elif request is not None:
                if not (admits := self._has_place(request)):
                    continue
                prefix = self.kv_cache.find_prefix(request)
                count = self._chunk(len(prefix) * self.kv_cache.block_size, request.num_tokens, budget)
                if not (admits := count > 0 and self._has_blocks(request, prefix)):
                    continue
                self._admit(request, prefix)
            else:
                return
            if count:  # otherwise no whole chunk fits in the rest of the budget
                budget -= count
                self._queue_of(request).num_read += count
                samples = request.num_computed_tokens + count == request.num_tokens and request.generates
                yield ScheduledSequence(request, count, samples)

    def _reading_turn(self, request: Request) -> tuple[tuple[bool, int], int, tuple[bool, int, int]]:
        """When the next chunk of a running prompt is read, lowest first."""
        queue = self._queue_of(request)
        return queue.level, queue.num_read, request.rank

    def _reads_before(self, waiting: Request, running: Request) -> bool:
        """Whether the waiting prompt goes before the running one: another client's, with no more tokens read."""
        first, second = self._queue_of(waiting), self._queue_of(running)
        return first is not second and (first.level, first.num_read) <= (second.level, second.num_read)

    def _prefill_budget(self, decodes: int) -> int:
        """Return how many prompt tokens the step may have alongside its decodes."""
        budget = self.max_num_batched_tokens - decodes
        limit = self.max_num_prefill_tokens * max(decodes, FEW_DECODES) // FEW_DECODES
        return min(budget, limit) if decodes else budget

    def _background_places(self) -> int:
        """Return how many background requests the step may have."""
        if all(queue.level[0] for queue in self._queues.values()):
            return self.max_num_seqs
        return max(self.max_num_seqs // BACKGROUND_SHARE, 1)

    def _draft_all(
        self, decodes: list[ScheduledSequence], budget: int
    ) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
        """Return the sequences of single tokens, and those that got a draft within the budget."""
        single: list[ScheduledSequence] = []
        drafted: list[ScheduledSequence] = []
        for request, count, samples, _ in decodes:
            draft = () if request.drafter is None else self._draft(request, request.drafter, budget)
            budget -= len(draft)
            (drafted if draft else single).append(ScheduledSequence(request, count + len(draft), samples, draft))
        return single, drafted

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

    def _serve_next_client(self) -> Request | None:
        """Preempt requests with a later claim until the next waiting one fits; admit it if another must pause for it.

        Returns the request that it admitted.
        """
        if len(self._queues) < 2 or not self.running or (request := self._next_waiting()) is None:
            return None
        queue = self._queue_of(request)
        has_share = self._has_share(queue)
        if not has_share and self.running[-1].rank[:2] <= queue.level:
            return None
        prefix = self.kv_cache.find_prefix(request)
        if not (has_share and self._has_blocks(request, prefix)):
            share = sum(len(r.block_ids) for r in queue.running) + self.kv_cache.num_needed(request, prefix)
            later = [
                claim[-1]
                for claim in sorted(self._claims(), reverse=True)
                if claim[0] > queue.level or (has_share and claim[0] == queue.level and claim[1] >= share)
            ]
            kept = len(self.running) - len(later)
            room = self.kv_cache.pool.num_free + sum(len(victim.block_ids) for victim in later)
            if not later or (kept and self.kv_cache.num_needed(request, prefix) + kept > room):
                return None  # it would not fit even if all of them were preempted
            for victim in later:
                self._preempt(victim)
                prefix = self.kv_cache.find_prefix(request)
                if has_share := self._has_share(queue) and self._has_blocks(request, prefix):
                    break
        if not has_share or len(self.running) < self.max_num_seqs:
            return None  # it is admitted when the budget has room for its first chunk
        self._admit(request, prefix)
        return request

    def _has_share(self, queue: ClientQueue) -> bool:
        """Whether another running request of this client is within its share of `max_num_seqs`."""
        if len(self.running) < self.max_num_seqs:
            return True
        others = [other for other in self._queues.values() if other is not queue]
        own = len(queue.running)
        before = [min(len(o.running), own + 1) if o.level == queue.level else len(o.running) for o in others]
        return own + sum(before) < self.max_num_seqs

    def _has_place(self, request: Request) -> bool:
        """Whether one more sequence may run, also if it is in the background."""
        if request.background and sum(other.background for other in self.running) >= self._background_places():
            return False
        return len(self.running) < self.max_num_seqs

    def _has_blocks(self, request: Request, prefix: list[int]) -> bool:
        """Whether there are blocks to admit `request`: for all its tokens, and one for each running sequence.

        Otherwise it would soon be preempted, and its tokens computed twice.
        """
        needed = self.kv_cache.num_needed(request, prefix) + len(self.running)
        return not self.running or needed <= self.kv_cache.pool.num_free

    def _admit(self, request: Request, prefix: list[int]) -> None:
        if not self.kv_cache.admit(request, prefix):
            raise RuntimeError(
                f"request {request.request_id} of {request.num_tokens} tokens does not fit in the KV cache"
            )
        queue = self._queue_of(request)
        queue.waiting.remove(request)
        insort(queue.running, request, key=by_rank)
        insort(self.running, request, key=by_rank)
        if request.status is RequestStatus.WAITING:
            request.scheduled_time = time.monotonic()
            request.num_cached_tokens = request.num_computed_tokens
            if self.kv_cache.enable_prefix_caching and not request.reads_prompt:
                self.num_prefix_queries += request.num_prompt_tokens
            self.num_prefix_hits += request.num_cached_tokens
        request.status = RequestStatus.RUNNING

    def _preempt(self, request: Request) -> None:
        if self._ahead:
            raise PreemptionNeeded
        queue = self._queue_of(request)
        self.running.remove(request)
        queue.running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        insort(queue.waiting, request, key=by_rank)
        self.num_preemptions += 1
