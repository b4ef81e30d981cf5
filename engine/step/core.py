"""The engine: one step at a time, with no process, no thread and no text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

from ..checks import check_request
from ..errors import RequestError
from ..grammar.compiler import GrammarCompiler
from ..memory import is_out_of_memory
from ..messages import CheckGrammar, EngineInfo, EngineRequest, EngineStats, GrammarVerdict, StepOutputs, TokenOutput
from .drafting import Drafter
from .kv_cache import KVCacheManager
from .outputs import failure_of, output_of, verdict_of
from .request import PENDING_TOKEN, Request, RequestStatus
from .retry import run_apart
from .runner import ExpertCounts, LaunchedStep, Runner, SampledToken
from .scheduler import ScheduledSequence, Scheduler, SchedulerOutput

OUT_OF_MEMORY = RuntimeError(
    "There was not enough memory to compute even this request alone: lower --gpu-memory-utilization, "
    "--kv-cache-memory-bytes or --max-num-batched-tokens."
)
TELL_SECONDS = 1.0
"""How often the counts of the experts are told while the engine works; also whenever it comes to rest."""


class _Flight(NamedTuple):
    """A step under way; its tokens count as computed, and those it draws are awaited."""

    sequences: list[ScheduledSequence]
    ends: list[int]
    """Tokens of each sequence that are computed after it, so also the place of the drawn one."""
    launched: LaunchedStep


class EngineCore:
    """Takes requests in and gives tokens out, a step at a time.

    With `info.overlap_scheduling`, `step` begins a step and then returns what the one before it gave, so that a device
    computes while the host plans and tells. A sequence then ends one step late at most, and what is computed for it in
    that step is nobody's. Where a sequence `needs_tokens`, the step is finished before the next one is planned.

    Args:
        info: sizes and limits.
        runner: computes a step.
        expert_stats: which experts have worked; None without an observer.
        grammars: compiles grammars; None refuses them all.
    """

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        expert_stats: ExpertCounts | None = None,
        grammars: GrammarCompiler[Request | CheckGrammar] | None = None,
    ) -> None:
        self.info = info
        self.runner = runner
        self.expert_stats = expert_stats
        self._told_experts = 0.0
        self._speculative = info.speculative_config
        self._num_drafts = self._num_draft_tokens = 0
        self._num_accepted = [0] * (self._speculative.num_speculative_tokens if self._speculative is not None else 0)
        self.grammars = grammars or GrammarCompiler()
        self._verdicts: list[GrammarVerdict] = []
        self.scheduler = Scheduler(
            KVCacheManager(info.num_blocks, info.block_size, enable_prefix_caching=info.enable_prefix_caching),
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_num_prefill_tokens=info.max_num_prefill_tokens,
            policy=info.scheduling_policy,
            chunk_multiple=info.chunk_multiple,
        )
        self._requests: dict[str, Request] = {}
        self._overlap = info.overlap_scheduling
        self._flight: _Flight | None = None  # as long as any of its requests goes on
        self._num_failures = 0  # steps in a row that there was no memory for

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.has_work or self.grammars.has_ready

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished; without work, all of them wait for their grammars."""
        return bool(self._requests)

    def wait_for_work(self) -> None:
        """Block until a step has something to do; there must be a request."""
        if not self.has_work:
            self.grammars.wait()

    def add_request(self, message: EngineRequest) -> None:
        """Queue a request; raise `RequestError` for one that can never run."""
        check_request(message, self.info)
        if message.request_id in self._requests:
            raise RequestError(f"A request with the id {message.request_id!r} is running already.")
        request = Request(message, self.info.eos_token_ids)
        if self._speculative is not None and request.may_be_guessed:
            request.drafter = Drafter(self._speculative)
            request.needs_tokens = True
        if message.params.grammar is None or not request.generates:
            self.scheduler.add(request)
        else:
            request.status = RequestStatus.COMPILING
            self.grammars.submit(request, message.params.grammar, ignore_eos=message.params.ignore_eos)
        self._requests[request.request_id] = request

    def check_grammar(self, check: CheckGrammar) -> None:
        """Compile a grammar; a later step's outputs have the verdict."""
        self.grammars.submit(check, check.grammar)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, in whatever state they are; unknown ids are fine."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request)
        self._forget_ended()
        self._check_released()

    def step(self) -> StepOutputs:
        """Schedule, compute and sample once; return what that, or the step before, added to each request."""
        started = time.perf_counter()
        outputs = self._admit_compiled()
        planned = self._plan(outputs)
        try:
            outputs += self._compute(planned.sequences)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            outputs += self._land() + self._make_room(planned)
        self._forget_ended()
        if not self.scheduler.has_work:
            self.scheduler.recover()
        self._check_released()
        stats = self.stats(seconds=time.perf_counter() - started, tokens=planned.num_tokens)
        verdicts, self._verdicts = self._verdicts, []
        return StepOutputs(outputs=outputs, stats=stats, verdicts=verdicts)

    def stats(self, *, seconds: float = 0.0, tokens: int = 0) -> EngineStats:
        """The engine's state now; the arguments say what the last step did."""
        stats, now = self.expert_stats, time.monotonic()
        due = stats is not None and not (self.has_work and now < self._told_experts + TELL_SECONDS)
        expert_tokens, expert_reroutes = stats.count() if stats is not None and due else ([], [])
        if due:
            self._told_experts = now
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self._requests) - len(self.scheduler.running),
            kv_cache_usage=self.scheduler.kv_cache.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.num_prefix_queries,
            prefix_cache_hits=self.scheduler.num_prefix_hits,
            step_seconds=seconds,
            step_tokens=tokens,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted,
            expert_tokens=expert_tokens or None,
            expert_reroutes=expert_reroutes or None,
        )

    def check_idle(self) -> None:
        """Raise `RuntimeError` if an idle engine's books are wrong: a fault of ours.

        Every request and every KV block must be given back, and every cached block be the one that its name says.
        This reads all the books, so it is for an engine that really has nothing to do.
        """
        self._check_released()
        self.scheduler.kv_cache.pool.check_idle()

    def _check_released(self) -> None:
        if self.scheduler.has_work:
            return
        pool = self.scheduler.kv_cache.pool
        requests = [request for request in self._requests.values() if request not in self.grammars]
        if requests or pool.num_free != pool.num_blocks:
            raise RuntimeError(
                f"the idle engine holds {len(requests)} requests and {pool.num_blocks - pool.num_free} KV blocks"
            )

    def _admit_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammars are compiled; return the answers of those whose grammars are not."""
        outputs = []
        for ticket, result in self.grammars.drain():
            if isinstance(ticket, CheckGrammar):
                self._verdicts.append(verdict_of(ticket, result))
            elif isinstance(result, Exception):
                del self._requests[ticket.request_id]
                outputs.append(failure_of(ticket, result))
            else:
                ticket.grammar, ticket.status = result, RequestStatus.WAITING
                self.scheduler.add(ticket)
        return outputs

    def _plan(self, outputs: list[TokenOutput]) -> SchedulerOutput:
        """The next step; the one under way is read first, and told to `outputs`, if that is in the way of it."""
        if self._flight is not None:
            planned = self.scheduler.schedule_ahead()
            if planned is not None:
                return planned
            outputs += self._land()
        return self.scheduler.schedule()

    def _compute(self, sequences: list[ScheduledSequence]) -> list[TokenOutput]:
        """Begin a step, read the one before it, and finish the new one too unless it may stay under way."""
        if not sequences:
            return self._land()
        if not self._overlap or any(sequence.request.needs_tokens for sequence in sequences):
            try:
                sampled = self.runner.execute(sequences)
            except Exception as error:
                return self._compute_apart(sequences, error)
            self._num_failures = 0
            return self._land() + self._update(sequences, sampled)
        try:
            launched = self.runner.launch(sequences)
        except Exception as error:
            return self._compute_apart(sequences, error)
        self._num_failures = 0
        outputs = self._land()
        # Whoever has just ended is in the new step in vain: its pages may be given to others, who write to them later.
        self._flight = _Flight(sequences, [s.request.num_computed_tokens + s.num_tokens for s in sequences], launched)
        for request, count, samples, _ in sequences:
            if request.status is not RequestStatus.FINISHED:
                request.num_computed_tokens += count
                if samples:
                    request.token_ids.append(PENDING_TOKEN)
        return outputs

    def _compute_apart(self, sequences: list[ScheduledSequence], error: Exception) -> list[TokenOutput]:
        """What a step that failed gives to those of its requests that are not to blame; the others end."""
        if is_out_of_memory(error):
            raise error
        outputs = self._land()
        left = [sequence for sequence in sequences if sequence.request.status is not RequestStatus.FINISHED]
        apart = run_apart(self.runner.execute, left, error)
        outputs += [self._fail(request, fault) for request, fault in apart.failed]
        return outputs + self._update(apart.sequences, apart.sampled)

    def _land(self) -> list[TokenOutput]:
        """Read the step under way, if there is one."""
        flight, self._flight = self._flight, None
        outputs: list[TokenOutput] = []
        if flight is None:
            return outputs
        draws = iter(flight.launched.read())
        for sequence, end in zip(flight.sequences, flight.ends, strict=True):
            request = sequence.request
            draw = next(draws) if sequence.samples else None
            if request.status is RequestStatus.FINISHED:  # it ended, or was aborted, when this had begun
                continue
            try:
                self.scheduler.kv_cache.publish(request, end)
                if draw is not None:
                    request.resolve(end, draw.token_id)
                    outputs.append(output_of(request, [draw]))
            except Exception as error:
                outputs.append(self._fail(request, error))
            else:
                if request.finish_reason is not None:
                    self._finish(request)
        return outputs

    def _forget_ended(self) -> None:
        """Do not wait for a step whose every request has ended."""
        if self._flight is not None and all(s.request.status is RequestStatus.FINISHED for s in self._flight.sequences):
            self._flight = None

    def _make_room(self, planned: SchedulerOutput) -> list[TokenOutput]:
        """After a step that found no memory, of which nothing is under way: make the next ones smaller."""
        self.runner.release_cached_memory()
        self._num_failures += 1
        if self._num_failures == 1:  # what was kept in reserve may have been enough
            return []
        left = [s for s in planned.sequences if s.request.status is not RequestStatus.FINISHED]
        if not left or self.scheduler.shrink(left):
            return []
        request = left[0].request
        self._finish(request)
        self._num_failures = 0
        self.scheduler.recover()
        return [failure_of(request, OUT_OF_MEMORY)]

    def _update(self, sequences: list[ScheduledSequence], sampled: list[SampledToken]) -> list[TokenOutput]:
        draws = iter(sampled)
        outputs: list[TokenOutput] = []
        for sequence in sequences:
            request = sequence.request
            own = list(itertools.islice(draws, 1 + len(sequence.draft))) if sequence.samples else []
            if request.status is RequestStatus.FINISHED:  # by the step before this one
                continue
            try:
                if sequence.samples:
                    outputs.append(self._append(sequence, own))
                else:
                    self.scheduler.kv_cache.advance(request, sequence.num_tokens)
                    if not request.generates and request.num_computed_tokens == request.num_prompt_tokens:
                        outputs.append(self._read(request))
            except Exception as error:
                outputs.append(self._fail(request, error))
            else:
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
            return failure_of(request, RequestError(request.grammar.error))
        output = output_of(request, draws[:kept])
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

    def _fail(self, request: Request, error: Exception) -> TokenOutput:
        """End a request by a fault of ours."""
        self._finish(request)
        return failure_of(request, error)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.COMPILING:
            self.grammars.discard(request)
        else:
            self.scheduler.finish(request)
        del self._requests[request.request_id]
