"""The engine: one step at a time, with no process, no thread and no text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from .block_pool import KVCacheManager
from .errors import RequestError
from .messages import EngineInfo, EngineRequest, EngineStats, StepOutputs, TokenOutput
from .request import Request, check_request
from .sampler import SampledToken
from .scheduler import ScheduledSequence, Scheduler, SchedulerOutput


class Runner(Protocol):
    """What computes a step: the model runner, or a stand-in without weights."""

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return a sampled token for each sequence that samples, in order."""
        ...


class EngineCore:
    """Takes requests in and gives tokens out, a step at a time.

    Args:
        info: sizes and limits.
        runner: computes a step.
    """

    def __init__(self, info: EngineInfo, runner: Runner) -> None:
        self.info = info
        self.runner = runner
        self.scheduler = Scheduler(
            KVCacheManager(info.num_blocks, info.block_size, enable_prefix_caching=info.enable_prefix_caching),
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_num_prefill_tokens=info.max_num_prefill_tokens,
            policy=info.scheduling_policy,
            chunk_multiple=info.chunk_multiple,
        )
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add_request(self, message: EngineRequest) -> None:
        """Queue a request; raise `RequestError` for one that can never run."""
        check_request(message, self.info)
        if message.request_id in self._requests:
            raise RequestError(f"A request with the id {message.request_id!r} is running already.")
        request = Request(message, self.info.eos_token_ids)
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, in whatever state they are; unknown ids are fine."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request)
        self._check_released()

    def step(self) -> StepOutputs:
        """Schedule, compute and sample once; return what it added to each request."""
        started = time.perf_counter()
        planned = self.scheduler.schedule()
        outputs = self._update(planned, self.runner.execute(planned.sequences)) if planned.sequences else []
        self._check_released()
        stats = self.stats(seconds=time.perf_counter() - started, tokens=planned.num_tokens, sampled=len(outputs))
        return StepOutputs(outputs=outputs, stats=stats)

    def stats(self, *, seconds: float = 0.0, tokens: int = 0, sampled: int = 0) -> EngineStats:
        """The engine's state now; the arguments say what the last step did."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=self.scheduler.kv_cache.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.num_prefix_queries,
            prefix_cache_hits=self.scheduler.num_prefix_hits,
            step_seconds=seconds,
            step_tokens=tokens,
            step_generated_tokens=sampled,
        )

    def check_idle(self) -> None:
        """Raise `RuntimeError` if an idle engine's books are wrong: a fault of ours.

        Every request and every KV block must be given back, and every cached block be the one that its name says.
        This reads all the books, so it is for an engine that really has nothing to do.
        """
        self._check_released()
        self.scheduler.kv_cache.pool.check_idle()

    def _check_released(self) -> None:
        pool = self.scheduler.kv_cache.pool
        if not self.has_work and (self._requests or pool.num_free != pool.num_blocks):
            raise RuntimeError(
                f"the idle engine holds {len(self._requests)} requests and {pool.num_blocks - pool.num_free} KV blocks"
            )

    def _update(self, planned: SchedulerOutput, sampled: list[SampledToken]) -> list[TokenOutput]:
        draws = iter(sampled)
        advance = self.scheduler.kv_cache.advance
        outputs: list[TokenOutput] = []
        for sequence in planned.sequences:
            request = sequence.request
            advance(request, sequence.num_tokens)
            if not sequence.samples:
                continue
            draw = next(draws)
            request.append(draw.token_id)
            by_stop_id = request.finish_reason == "stop"
            outputs.append(
                TokenOutput(
                    request_id=request.request_id,
                    token_ids=[draw.token_id],
                    logprobs=[] if draw.logprobs is None else [draw.logprobs],
                    finish_reason=request.finish_reason,
                    stop_token_id=draw.token_id if by_stop_id else None,
                    num_cached_tokens=request.num_cached_tokens,
                    scheduled_time=request.scheduled_time,
                )
            )
            if request.finish_reason is not None:
                self._finish(request)
        return outputs

    def _finish(self, request: Request) -> None:
        self.scheduler.finish(request)
        del self._requests[request.request_id]
