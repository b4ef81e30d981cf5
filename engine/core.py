"""The engine: one step at a time, with no process, no thread and no text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Protocol

from .block_pool import KVCacheManager
from .errors import RequestError
from .grammar import GrammarCompiler
from .messages import EngineInfo, EngineRequest, EngineStats, StepOutputs, TokenOutput
from .request import Request, RequestStatus, check_request
from .sampler import SampledToken
from .scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from .speculation import Drafter
from .watcher import Watcher

TELL_SECONDS = 1.0
"""How often the counts of the experts are told while the engine works; also whenever it comes to rest."""


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
        watcher: what the runner has seen of the experts; None where nobody looks.
        grammars: compiles those of requests; None where there is no tokenizer, so that no request may have any.
    """

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        watcher: Watcher | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.info = info
        self.runner = runner
        self._watcher = watcher if watcher is not None and watcher.expert_tokens.size else None
        self._told_experts = 0.0
        self._speculative = info.speculative_config
        self._num_drafts = self._num_draft_tokens = 0
        self._num_accepted = [0] * (self._speculative.num_speculative_tokens if self._speculative is not None else 0)
        self.grammars = grammars
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
        """Whether a step has anything to do."""
        return self.scheduler.has_work or (self.grammars is not None and self.grammars.has_ready)

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished; without work, all of them wait for their grammars."""
        return bool(self._requests)

    def wait_for_work(self) -> None:
        """Block until a step has something to do; there must be a request."""
        if not self.has_work and self.grammars is not None:
            self.grammars.wait()

    def add_request(self, message: EngineRequest) -> None:
        """Queue a request; raise `RequestError` for one that can never run."""
        check_request(message, self.info)
        if message.request_id in self._requests:
            raise RequestError(f"A request with the id {message.request_id!r} is running already.")
        request = Request(message, self.info.eos_token_ids)
        if self._speculative is not None and request.may_be_guessed:
            request.drafter = Drafter(self._speculative)
        if message.params.grammar is None or not request.generates:
            self.scheduler.add(request)
        elif self.grammars is None:
            raise RequestError("This engine has no tokenizer, so it can follow no grammar.", param="grammar")
        else:
            request.status = RequestStatus.COMPILING
            self.grammars.submit(request)
        self._requests[request.request_id] = request

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
        refused = self._admit_compiled()
        planned = self.scheduler.schedule()
        sampled = self.runner.execute(planned.sequences) if planned.sequences else []
        outputs = refused + self._update(planned, sampled)
        self._check_released()
        stats = self.stats(seconds=time.perf_counter() - started, tokens=planned.num_tokens, sampled=len(sampled))
        return StepOutputs(outputs=outputs, stats=stats)

    def stats(self, *, seconds: float = 0.0, tokens: int = 0, sampled: int = 0) -> EngineStats:
        """The engine's state now; the arguments say what the last step did."""
        expert_tokens = expert_reroutes = None
        if self._watcher is not None and not (self.has_work and time.monotonic() < self._told_experts + TELL_SECONDS):
            self._told_experts = time.monotonic()
            self._watcher.count()
            expert_tokens = self._watcher.expert_tokens.tolist()
            expert_reroutes = self._watcher.reroutes.tolist()
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + self._num_compiling,
            kv_cache_usage=self.scheduler.kv_cache.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.num_prefix_queries,
            prefix_cache_hits=self.scheduler.num_prefix_hits,
            step_seconds=seconds,
            step_tokens=tokens,
            step_generated_tokens=sampled,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted,
            expert_tokens=expert_tokens,
            expert_reroutes=expert_reroutes,
        )

    def check_idle(self) -> None:
        """Raise `RuntimeError` if an idle engine's books are wrong: a fault of ours.

        Every request and every KV block must be given back, and every cached block be the one that its name says.
        This reads all the books, so it is for an engine that really has nothing to do.
        """
        self._check_released()
        self.scheduler.kv_cache.pool.check_idle()

    @property
    def _num_compiling(self) -> int:
        return 0 if self.grammars is None else len(self.grammars)

    def _check_released(self) -> None:
        pool = self.scheduler.kv_cache.pool
        if not self.scheduler.has_work and (
            len(self._requests) != self._num_compiling or pool.num_free != pool.num_blocks
        ):
            raise RuntimeError(
                f"the idle engine holds {len(self._requests)} requests and {pool.num_blocks - pool.num_free} KV blocks"
            )

    def _admit_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammars are ready; the answers of those whose grammars are wrong."""
        refused = []
        for request, fault in self.grammars.take() if self.grammars is not None else ():
            if fault:
                del self._requests[request.request_id]
                refused.append(_failure(request, f"The grammar cannot be used: {fault}."))
            else:
                request.status = RequestStatus.WAITING
                self.scheduler.add(request)
        return refused

    def _update(self, planned: SchedulerOutput, sampled: list[SampledToken]) -> list[TokenOutput]:
        draws = iter(sampled)
        outputs: list[TokenOutput] = []
        for sequence in planned.sequences:
            request = sequence.request
            if sequence.samples:
                outputs.append(self._append(sequence, list(itertools.islice(draws, 1 + len(sequence.draft)))))
            else:
                self.scheduler.kv_cache.advance(request, sequence.num_tokens)
                if not request.generates and request.num_computed_tokens == request.num_prompt_tokens:
                    outputs.append(self._read(request))
            if request.finish_reason is not None:
                self._finish(request)
        return outputs

    def _append(self, sequence: ScheduledSequence, draws: list[SampledToken]) -> TokenOutput:
        """Give a request its new tokens: the first one drawn, and each one drawn behind a guess that was right."""
        request = sequence.request
        request.append(draws[0].token_id)
        kept = 1
        while kept < len(draws) and draws[kept - 1].token_id == sequence.draft[kept - 1] and not request.finish_reason:
            request.append(draws[kept].token_id)
            kept += 1
        self.scheduler.kv_cache.advance(request, sequence.num_tokens - len(draws) + kept)
        if sequence.draft:
            self._note_draft(request, len(sequence.draft), kept - 1)
        if request.finish_reason == "error":  # a token drawn without a mask is nobody's
            assert request.grammar is not None
            return _failure(request, request.grammar.error)
        last = draws[kept - 1].token_id
        by_stop_id = request.finish_reason == "stop" and last in request.stop_token_ids
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=[draw.token_id for draw in draws[:kept]],
            logprobs=[draw.logprobs for draw in draws[:kept] if draw.logprobs is not None],
            finish_reason=request.finish_reason,
            stop_token_id=last if by_stop_id else None,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_time=request.scheduled_time,
            prompt_logprobs=request.prompt_logprobs,
            dynamics=[draw.dynamics for draw in draws[:kept] if draw.dynamics is not None],
        )
        if request.reads_prompt:
            request.reads_prompt, request.prompt_logprobs = False, []
        return output

    def _note_draft(self, request: Request, size: int, num_right: int) -> None:
        assert request.drafter is not None  # for the type checker
        request.drafter.learn(num_right)
        self._num_drafts += 1
        self._num_draft_tokens += size
        for position in range(num_right):
            self._num_accepted[position] += 1

    def _read(self, request: Request) -> TokenOutput:
        """The one answer of a request that generates nothing, which ends here."""
        pooled = request.pooled
        request.finish_reason = "length" if request.pooling is None else "stop"
        if pooled is not None and request.pooling == "mean":
            pooled = pooled / request.num_prompt_tokens
        return TokenOutput(
            request_id=request.request_id,
            token_ids=[],
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_time=request.scheduled_time,
            prompt_logprobs=request.prompt_logprobs,
            embedding=None if pooled is None else pooled.tolist(),
        )

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.COMPILING:
            assert self.grammars is not None
            self.grammars.discard(request)
        else:
            self.scheduler.finish(request)
        del self._requests[request.request_id]


def _failure(request: Request, error: str) -> TokenOutput:
    return TokenOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error=error, refused=True)
