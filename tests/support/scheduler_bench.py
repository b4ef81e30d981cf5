"""Drives a scheduler alone, with tokens that are never computed, and checks every step."""

from __future__ import annotations

from dataclasses import dataclass, field

from support.paged_runner import make_info

from pyllm.engine.messages import EngineRequest, SamplingParams
from pyllm.engine.step.request import Request, ScheduledSequence
from pyllm.engine.step.scheduler import Scheduler


def make_request(
    name: str, tokens: list[int], output: int, priority: int = 0, background: bool = False, client: str = ""
) -> Request:
    params = SamplingParams(max_tokens=output)
    message = EngineRequest(
        request_id=name, prompt_token_ids=tokens, params=params, priority=priority, background=background, client=client
    )
    return Request(message)


@dataclass
class Bench:
    """Drives a scheduler as the engine does, and checks every step."""

    scheduler: Scheduler
    arrived: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    steps: list[list[tuple[str, int, int]]] = field(default_factory=list)
    """Each step as (request, first token, number of tokens)."""

    @classmethod
    def make(cls, *, prefill: int | None = None, policy: str = "fcfs", chunk_multiple: int = 1,
             blocks: int = 64, block_size: int = 4, seqs: int = 8, budget: int = 32) -> Bench:  # fmt: skip
        info = make_info(
            num_blocks=blocks, block_size=block_size, max_num_seqs=seqs, max_num_batched_tokens=budget,
            max_num_prefill_tokens=prefill, scheduling_policy=policy, chunk_multiple=chunk_multiple,
        )  # fmt: skip
        return cls(Scheduler(info))

    def add(
        self,
        name: str,
        prompt: int,
        output: int,
        *,
        priority: int = 0,
        kind: int | None = None,
        background: bool = False,
        client: str = "",
    ) -> Request:
        """A request whose prompt is like those of its `kind`, and like no other without one."""
        tokens = [1000 + len(self.arrived) if kind is None else kind] * prompt
        request = make_request(name, tokens, output, priority, background, client)
        self.arrived.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> list[ScheduledSequence]:
        scheduler = self.scheduler
        before = list(scheduler.running)
        left = {id(request): request.num_tokens - request.num_computed_tokens for request in before}
        preemptions = scheduler.num_preemptions
        planned = scheduler.schedule()
        self.check_choice(planned, before, left)
        if any(request.client for request in self.arrived):
            self.check_clients(before)
        else:
            self.check_ranks(planned, before, scheduler.num_preemptions - preemptions)
        self.check_blocks()
        self.admitted += [r.request_id for r in scheduler.running if r not in before]
        self.steps.append([(s.request.request_id, s.request.num_computed_tokens, s.num_tokens) for s in planned])
        for sequence in planned:
            request = sequence.request
            scheduler.kv_cache.advance(request, sequence.num_tokens)
            assert sequence.samples == (request.num_computed_tokens == request.num_tokens)
            if sequence.samples:
                request.append(7)
                if request.finish_reason is not None:
                    scheduler.finish(request)
                    self.finished.append(request)
        return planned

    def check_choice(self, planned: list[ScheduledSequence], before: list[Request], left: dict[int, int]) -> None:
        """What is in the step, given what each of those who ran `before` had left to compute."""
        scheduler = self.scheduler
        counts = [sequence.num_tokens for sequence in planned]
        chosen = {id(sequence.request): sequence.num_tokens for sequence in planned}
        assert all(count > 0 for count in counts)
        assert sum(counts) <= scheduler.max_num_batched_tokens
        assert len(planned) <= scheduler.max_num_seqs
        assert len(chosen) == len(counts), "a request is in a step once"
        assert [count > 1 for count in counts] == sorted(count > 1 for count in counts), "single tokens come first"
        alone = all(request.background for request in scheduler.running)
        decodes = [request for request in before if left[id(request)] == 1 and request in scheduler.running]
        decodes = [request for request in decodes if alone or not request.background]
        missing = [request for request in decodes if id(request) not in chosen]
        assert len(missing) <= scheduler.num_paused, "no decode waits"
        decodes = [request for request in decodes if id(request) in chosen]
        if decodes:
            limit = scheduler.max_num_prefill_tokens * max(8, len(decodes)) // 8
            others = sum(sequence.request.background for sequence in planned if not alone)
            assert sum(counts) - len(decodes) - others <= limit
        if scheduler.has_work:
            assert chosen, "a step moves on"
            named = any(request.client for request in self.arrived)
            assert named or id(scheduler.running[0]) in chosen, "the first in rank moves on in every step"

    def check_ranks(self, planned: list[ScheduledSequence], before: list[Request], preempted: int) -> None:
        """Who runs, who waits, and who was set back."""
        scheduler = self.scheduler
        running = [request.rank for request in scheduler.running]
        waiting = [request.rank for request in scheduler.waiting]
        assert running == sorted(running)
        assert waiting == sorted(waiting)
        newcomers = [request for request in scheduler.running if request not in before]
        assert not newcomers or not waiting or max(r.rank for r in newcomers) < waiting[0], "no request overtakes"
        gone = [request for request in before if request not in scheduler.running]
        set_back = before[len(before) - preempted :]
        assert [request for request in set_back if request in gone] == gone, "those of lowest rank are set back"
        best = min(request.rank for request in [*before, *scheduler.waiting, *scheduler.running]) if before else None
        if before and before[0].rank == best:
            assert before[0] in scheduler.running, "the first of all is never set back"
        if scheduler.policy == "fcfs" and not any(request.background for request in self.arrived):
            assert gone == set_back
            assert not preempted or not newcomers
            assert not running or not waiting or running[-1] < waiting[0]

    def check_clients(self, before: list[Request]) -> None:
        """Each client's own requests keep their order, and the first one with a claim keeps its blocks."""
        scheduler = self.scheduler
        waiting: dict[tuple[object, ...], Request] = {}
        for request in scheduler.waiting:
            waiting.setdefault((*request.rank[:2], request.client), request)
        for request in scheduler.running:
            after = waiting.get((*request.rank[:2], request.client))
            assert request in before or after is None or request.rank < after.rank, "no own request overtakes"
        if before and before[0].rank[:2] == min(r.rank[:2] for r in [*scheduler.running, *scheduler.waiting]):
            assert before[0] in scheduler.running, "the first of all is never set back"

    def check_blocks(self) -> None:
        scheduler = self.scheduler
        pool = scheduler.kv_cache.pool
        owned = {block for request in scheduler.running for block in request.block_ids}
        assert len(owned) == pool.num_blocks - pool.num_free
        for request in scheduler.running:
            pauses = request.background or scheduler.num_paused
            tokens = {request.num_tokens, request.num_computed_tokens if pauses else request.num_tokens}
            assert len(request.block_ids) in {-(-count // scheduler.kv_cache.block_size) for count in tokens}
        assert all(not request.block_ids and not request.num_computed_tokens for request in scheduler.waiting)

    def run(self, limit: int) -> None:
        """Step until idle; fail if that takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still at work after {limit} steps"
        self.scheduler.kv_cache.pool.check_idle()
