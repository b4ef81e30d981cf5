"""The engine core: one step at a time, with no process, no thread and no text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import RequestError, describe
from ..grammar.compiler import GrammarCompiler
from ..memory import is_out_of_memory
from ..messages import (
    CheckGrammar,
    EngineInfo,
    EngineRequest,
    EngineStats,
    GrammarVerdict,
    StepOutputs,
    TokenOutput,
    check_request,
)
from .drafting import Drafter
from .kv_events import KVEventLog, KVEventPublisher
from .request import PENDING_TOKEN, Request, RequestStatus, SampledToken, ScheduledSequence, failure_of
from .retry import retry_by_halves
from .runner import LaunchedStep, Runner, StepObserver
from .scheduler import PreemptionNeeded, Scheduler

OUT_OF_MEMORY = (
    "There was not enough memory to compute even this request alone: lower --gpu-memory-utilization, "
    "--kv-cache-memory-bytes or --max-num-batched-tokens."
)
EXPERT_SECONDS = 1.0
"""Seconds between reports of the expert counts while the engine works; it also reports on becoming idle."""


class InFlightStep(NamedTuple):
    """A step being computed; its tokens count as computed, and those it draws are pending."""

    sequences: list[ScheduledSequence]
    ends: list[int]  # how many tokens of each sequence are computed after the step: the index of the token it draws
    launched: LaunchedStep


class EngineCore:
    """Takes requests and returns tokens, one step at a time.

    With `overlap_scheduling`, `step` launches a step and then returns the outputs of the previous one, so that the
    device computes while the host plans. A sequence then ends at most one step late, and that step's results for it
    are discarded. A step with a sequence that `needs_tokens` is finished before the next one is planned.

    Without `grammars`, requests with a grammar are refused.
    """

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        observer: StepObserver | None = None,
        grammars: GrammarCompiler[Request | CheckGrammar] | None = None,
    ) -> None:
        self.info = info
        self.runner = runner
        self.observer = observer
        self.grammars = grammars or GrammarCompiler()
        self._uses_grammars = False  # whether any grammar was ever submitted
        self.scheduler = Scheduler(info)
        self._requests: dict[str, Request] = {}
        self._verdicts: list[GrammarVerdict] = []
        self._in_flight: InFlightStep | None = None  # until it is finished, or all of its requests have finished
        self._num_failures = 0  # consecutive steps that ran out of memory
        self._experts_reported = 0.0
        self._num_drafts = self._num_draft_tokens = 0
        speculative = info.config.speculative_config
        self._publisher: KVEventPublisher | None = None
        self._num_accepted = [0] * (speculative.num_speculative_tokens if speculative is not None else 0)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.has_work or (self._uses_grammars and self.grammars.has_ready)

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished; without work, all of them wait for their grammars."""
        return bool(self._requests)

    def wait_for_work(self) -> None:
        """Block until a step has something to do; there must be a request or a check."""
        if not self.has_work:
            self.grammars.wait()

    def add_request(self, message: EngineRequest) -> None:
        """Queue a request; raise `RequestError` for one that can never run."""
        check_request(message, self.info)
        if message.request_id in self._requests:
            raise RequestError(f"A request with the id {message.request_id!r} is already running.")
        request = Request(message, self.info.eos_token_ids)
        if self.info.config.speculative_config is not None and request.allows_drafts:
            request.drafter = Drafter(self.info.config.speculative_config)
            request.needs_tokens = True
        if message.params.grammar is None or not request.generates:
            self.scheduler.add(request)
        else:
            request.status = RequestStatus.COMPILING
            self._uses_grammars = True
            self.grammars.submit(request, message.params.grammar, ignore_eos=message.params.ignore_eos)
        self._requests[request.request_id] = request

    def publish_kv_events(self, publisher: KVEventPublisher) -> None:
        """Publish from now on which blocks the KV cache stores and evicts."""
        config = self.info.config
        log = KVEventLog(config.block_size, "GPU" if config.device == "cuda" else "CPU")
        self.scheduler.kv_cache.record(log)
        publisher.follow(log)
        publisher.start()
        self._publisher = publisher

    def check_grammar(self, check: CheckGrammar) -> None:
        """Compile a grammar; a later step's outputs have the verdict."""
        self._uses_grammars = True
        self.grammars.submit(check, check.grammar)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests, whatever their status; unknown ids are ignored."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request)
        self._drop_finished_step()
        self._check_released()

    def step(self) -> StepOutputs:
        """Schedule, compute and sample once; return the outputs of this step, or of the previous one."""
        started = time.perf_counter()
        outputs = self._admit_compiled() if self._uses_grammars else []
        planned = self._plan(outputs)
        try:
            outputs += self._run(planned)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            outputs += self._finish_in_flight() + self._shrink(planned)
        self._drop_finished_step()
        if not self.scheduler.has_work:
            self.scheduler.restore_limits()
        self._check_released()
        if self._publisher is not None:
            self._publisher.publish()
        num_tokens = sum(sequence.num_tokens for sequence in planned)
        stats = self.stats(seconds=time.perf_counter() - started, tokens=num_tokens)
        verdicts, self._verdicts = self._verdicts, []
        return StepOutputs(outputs=outputs, stats=stats, verdicts=verdicts)

    def stats(self, *, seconds: float = 0.0, tokens: int = 0) -> EngineStats:
        """Return the engine's state; the arguments describe the last step."""
        pool = self.scheduler.kv_cache.pool
        running = len(self.scheduler.running) - self.scheduler.num_paused
        experts: list[list[int]] = []
        reroutes: list[int] = []
        if self.observer is not None:
            now = time.monotonic()
            if not self.has_work or now >= self._experts_reported + EXPERT_SECONDS:
                self._experts_reported = now
                experts, reroutes = self.observer.count()
        events = self._publisher
        return EngineStats(
            num_kv_event_batches=0 if events is None else events.num_published,
            num_kv_event_batches_dropped=0 if events is None else events.num_dropped,
            num_running=running,
            num_waiting=len(self._requests) - running,
            kv_cache_usage=1.0 - pool.num_free / pool.num_blocks,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.num_prefix_queries,
            prefix_cache_hits=self.scheduler.num_prefix_hits,
            step_seconds=seconds,
            step_tokens=tokens,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted,
            expert_tokens=experts or None,
            expert_reroutes=reroutes or None,
        )

    def check_idle(self) -> None:
        """Raise `RuntimeError` if an idle engine still holds a request or a block, or its block hashes are wrong.

        This reads all bookkeeping, so it is for an engine that has nothing else to do.
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
        """Queue requests whose grammars are compiled, and return the others' failures; verdicts go to `_verdicts`."""
        outputs = []
        for ticket, result in self.grammars.drain():
            if isinstance(ticket, CheckGrammar):
                self._verdicts.append(_verdict_of(ticket, result))
            elif isinstance(result, Exception):
                del self._requests[ticket.request_id]
                outputs.append(failure_of(ticket, result))
            else:
                ticket.grammar, ticket.status = result, RequestStatus.WAITING
                self.scheduler.add(ticket)
        return outputs

    def _plan(self, outputs: list[TokenOutput]) -> list[ScheduledSequence]:
        """Plan the next step; if that needs the in-flight step's tokens, finish that step into `outputs` first."""
        try:
            return self.scheduler.schedule(ahead=self._in_flight is not None)
        except PreemptionNeeded:
            outputs += self._finish_in_flight()
        return self.scheduler.schedule()

    def _run(self, sequences: list[ScheduledSequence]) -> list[TokenOutput]:
        """Launch a step and finish the previous one; finish the new one too unless it may stay in flight."""
        if not sequences:
            return self._finish_in_flight()
        overlaps = self.info.config.overlap_scheduling and not any(
            sequence.request.needs_tokens for sequence in sequences
        )
        try:
            if overlaps:
                launched = self.runner.launch(sequences)
            else:
                sampled = self.runner.execute(sequences)
        except Exception as error:
            return self._isolate_failure(sequences, error)
        self._num_failures = 0
        outputs = self._finish_in_flight()
        if not overlaps:
            return outputs + self._apply(sequences, sampled)
        # The new step's results for requests that have just finished are discarded. Their blocks may already belong
        # to others, which write to them in a later step.
        ends = [sequence.request.num_computed_tokens + sequence.num_tokens for sequence in sequences]
        self._in_flight = InFlightStep(sequences, ends, launched)
        for request, count, samples, _ in sequences:
            if request.status is not RequestStatus.FINISHED:
                request.num_computed_tokens += count
                if samples:
                    request.token_ids.append(PENDING_TOKEN)
        return outputs

    def _isolate_failure(self, sequences: list[ScheduledSequence], error: Exception) -> list[TokenOutput]:
        """Retry a failed step by halves: only requests that fail on their own are ended."""
        if is_out_of_memory(error):
            raise error
        outputs = self._finish_in_flight()
        left = [sequence for sequence in sequences if sequence.request.status is not RequestStatus.FINISHED]
        result = retry_by_halves(self.runner.execute, left, error)
        outputs += [self._fail(request, fault) for request, fault in result.failed]
        return outputs + self._apply(result.sequences, result.sampled)

    def _finish_in_flight(self) -> list[TokenOutput]:
        """Wait for the in-flight step, if there is one, and apply its draws."""
        step, self._in_flight = self._in_flight, None
        return [] if step is None else self._apply(step.sequences, step.launched(), step.ends)

    def _apply(
        self, sequences: list[ScheduledSequence], sampled: list[SampledToken], ends: list[int] | None = None
    ) -> list[TokenOutput]:
        """Apply a finished step's draws to its requests; an error ends only its request.

        `ends` are those of the step, if it was in flight and its tokens are pending; None otherwise.
        """
        outputs: list[TokenOutput] = []
        first = 0
        for index, sequence in enumerate(sequences):
            request = sequence.request
            draws = sampled[first : first + 1 + len(sequence.draft)] if sequence.samples else []
            first += len(draws)
            if request.status is RequestStatus.FINISHED:  # it finished or was aborted while the step was computed
                continue
            try:
                if ends is None:
                    output = self._apply_executed(sequence, draws)
                else:
                    output = self._apply_in_flight(request, ends[index], draws)
            except Exception as error:
                outputs.append(self._fail(request, error))
                continue
            if output is not None:
                outputs.append(output)
            if request.finish_reason is not None:
                self._finish(request)
        return outputs

    def _apply_in_flight(self, request: Request, end: int, draws: list[SampledToken]) -> TokenOutput | None:
        """Replace the pending token at `end`, if the step drew one: its progress was counted when it was launched."""
        self.scheduler.kv_cache.cache_blocks(request, end)
        if not draws:
            return None
        request.resolve(end, draws[0].token_id)
        return request.output(draws)

    def _apply_executed(self, sequence: ScheduledSequence, draws: list[SampledToken]) -> TokenOutput | None:
        """Count a sequence's tokens as computed and append those drawn: the first, and one per right draft token."""
        request, draft = sequence.request, sequence.draft
        if not sequence.samples:
            self.scheduler.kv_cache.advance(request, sequence.num_tokens)
            if not request.generates and request.num_computed_tokens == request.num_prompt_tokens:
                return self._finish_prompt(request)
            return None
        request.append(draws[0].token_id)
        kept = 1
        if draft and request.drafter is not None:
            correct = request.drafter.verify(draft, [draw.token_id for draw in draws])
            while kept <= correct and not request.finish_reason:
                request.append(draws[kept].token_id)
                kept += 1
            self._num_drafts += 1
            self._num_draft_tokens += len(draft)
            for position in range(kept - 1):
                self._num_accepted[position] += 1
        self.scheduler.kv_cache.advance(request, sequence.num_tokens - len(draft) - 1 + kept)
        if request.finish_reason == "error" and request.grammar is not None:  # drawn without a mask: discarded
            return failure_of(request, RequestError(request.grammar.error))
        output = request.output(draws[:kept])
        if request.reads_prompt:  # reported with the first token, and only once
            request.reads_prompt, request.prompt_logprobs = False, []
        return output

    def _finish_prompt(self, request: Request) -> TokenOutput:
        """End a request that generates nothing when its prompt is computed."""
        request.finish_reason = "length" if request.pooling is None else "stop"
        if request.pooled is None:
            return request.output([])
        pooled = request.pooled / request.num_prompt_tokens if request.pooling == "mean" else request.pooled
        return request.output([], pooled.tolist())

    def _drop_finished_step(self) -> None:
        """Forget an in-flight step whose requests have all finished, without waiting for it."""
        step = self._in_flight
        if step is not None and all(s.request.status is RequestStatus.FINISHED for s in step.sequences):
            self._in_flight = None

    def _shrink(self, planned: list[ScheduledSequence]) -> list[TokenOutput]:
        """Make the next steps smaller after one ran out of memory; end a request that does not fit even alone."""
        self.runner.release_cached_memory()
        self._num_failures += 1
        if self._num_failures == 1:  # releasing the cached memory may have been enough
            return []
        left = [s for s in planned if s.request.status is not RequestStatus.FINISHED]
        if not left or self.scheduler.shrink(left):
            return []
        self._num_failures = 0
        self.scheduler.restore_limits()
        return [self._fail(left[0].request, RuntimeError(OUT_OF_MEMORY))]

    def _fail(self, request: Request, error: Exception) -> TokenOutput:
        """End a request because of an internal error."""
        self._finish(request)
        return failure_of(request, error)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.COMPILING:
            self.grammars.discard(request)
        else:
            self.scheduler.finish(request)
        del self._requests[request.request_id]


def _verdict_of(check: CheckGrammar, result: object) -> GrammarVerdict:
    """Report the compiler's result for a grammar."""
    match result:
        case RequestError():
            return GrammarVerdict(key=check.key, outcome="refused", reason=str(result))
        case TimeoutError():
            return GrammarVerdict(key=check.key, outcome="busy", reason=str(result))
        case Exception():
            return GrammarVerdict(key=check.key, outcome="failed", reason=describe(result))
    return GrammarVerdict(key=check.key, outcome="accepted")
