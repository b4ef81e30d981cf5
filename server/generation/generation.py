"""One HTTP request's sequences in the engine: submitted, read as one stream, counted and aborted together."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect

from ...engine.client.async_engine import AsyncEngine
from ...engine.client.output_processor import RequestOutput, RequestStream, RequestTimes, Wakeup
from ...engine.client.sections import Piece
from ...engine.errors import EngineDeadError, RequestError
from ...engine.messages import EngineStats, Pooling, SamplingParams, StepOutputs, TokenDynamics, TokenLogprobs
from ..http.budget import Hold
from ..http.errors import ApiError, unavailable
from ..http.middleware import RequestContext

MAX_SEQUENCES = 1024
MAX_LISTED_IDS = 2**22  # total ids in one list option, over all sequences of a request
MAX_GRAMMAR_BYTES = 2**26  # of a request's grammar, over all its sequences
MAX_SHOWN = 2**21
"""Candidates for tokens in one response."""
CANDIDATE_BYTES = 150  # of memory for each until the response is written; as much for a layer of a token's dynamics
LARGE_RESPONSE = 2**16  # candidates


@dataclass(slots=True)
class Choice:
    """The output of one sequence so far."""

    prompt_token_ids: list[int]
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    dynamics: list[TokenDynamics] = field(default_factory=list)
    embedding: list[float] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    is_reasoning: bool = False  # as in `RequestOutput`
    sections: list[Piece] = field(default_factory=list)
    times: RequestTimes = field(default=RequestTimes(0.0))

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)


class Histogram:
    """Counts values in buckets, ten times as fast as prometheus_client's: one is updated at every token."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class Counts:
    """Counts of a served model's work so far; `Metrics` names and exposes them."""

    def __init__(self, model_name: str, histograms: Mapping[str, Histogram]) -> None:
        """Take the histograms of `metrics.HISTOGRAMS` by name."""
        self.model_name = model_name
        self.num_prompt_tokens = self.num_generation_tokens = 0
        self.responses_by_status: dict[int, int] = {}
        # By finish reason. All start at 0, so that a Prometheus rate includes the first one.
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.experts = EngineStats()  # the latest that included expert counts
        self.histograms = histograms
        self.time_to_first_token = histograms["time_to_first_token_seconds"]
        self.inter_token_latency = histograms["inter_token_latency_seconds"]
        self._request_latency = histograms["e2e_request_latency_seconds"]
        # Each from one moment of `RequestTimes` to the next.
        self._phases = [histograms[f"request_{phase}_time_seconds"] for phase in ("queue", "prefill", "decode")]
        self._prompt_tokens = histograms["request_prompt_tokens"]
        self._generation_tokens = histograms["request_generation_tokens"]
        self._step_tokens = histograms["iteration_tokens_total"]
        self._step_seconds = histograms["engine_step_seconds"]

    def on_step(self, outputs: StepOutputs) -> None:
        """Count an engine step; messages without a step (a refusal, an abort) do not count."""
        stats = outputs.stats
        if stats.expert_tokens is not None:
            self.experts = stats
        if stats.step_tokens:
            self._step_seconds.observe(stats.step_seconds)
            self._step_tokens.observe(stats.step_tokens)

    def on_response(self, status: int) -> None:
        """Count an HTTP response."""
        self.responses_by_status[status] = self.responses_by_status.get(status, 0) + 1

    def on_finish(self, reason: str, seconds: float, times: RequestTimes, prompt_tokens: int, tokens: int) -> None:
        """Count a sequence that ended `seconds` after its arrival, and the phases that it reached."""
        self.finished[reason] += 1
        self._request_latency.observe(seconds)
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(tokens)
        for phase, (begin, end) in zip(self._phases, pairwise(times), strict=True):
            if 0 < begin < end:
                phase.observe(end - begin)


class Generation:
    """The sequences of one request: `n` for each prompt, in the order of the response's choices."""

    def __init__(
        self,
        engine: AsyncEngine,
        counts: Counts,
        context: RequestContext,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        field: str,
        n: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
        streams: bool = False,
    ) -> None:
        """Submit all sequences; `field` is the endpoint's name for prompts.

        Raises `RequestError`, `EngineBusyError` or `EngineDeadError` if the engine refuses one; then none runs.
        """
        _check_size(engine, prompts, params, field, n, streams, context.client)
        if context.account is not None and not context.background:
            context.account.check_prompt(sum(map(len, prompts)))
        self._engine = engine
        self._counts = counts
        self.context = context
        self.n = n
        self.params = params
        self.model_name = counts.model_name
        self.with_logprobs = params.logprobs is not None
        self.choices = [Choice(prompt) for prompt in prompts for _ in range(n)]
        self._streams: list[RequestStream] = []
        self.wakeup = Wakeup()  # set when there is something to drain
        self.num_shown = 0  # candidates for tokens in the response so far
        self.running = len(self.choices)  # unfinished sequences
        salt = context.cache_owner + (cache_salt or "") or None  # unambiguous: all owners' names have the same length
        try:
            self._submit(priority, salt, pooling)
        except BaseException as error:
            self.abort()
            if isinstance(error, RequestError) and error.param is None:
                error.param = field
            raise
        context.generation = self
        context.release_body()

    def _submit(self, priority: int, salt: str | None, pooling: Pooling | None) -> None:
        context, account = self.context, self.context.account
        for index, choice in enumerate(self.choices):
            own = msgspec.structs.replace(self.params, seed=_shifted(self.params.seed, index % self.n))
            stream = self._engine.submit(
                f"{context.request_id}-{index}", choice.prompt_token_ids, own,
                priority=priority, background=context.background, client=context.client, cache_salt=salt,
                pooling=pooling, wakeup=self.wakeup,
            )  # fmt: skip
            self._streams.append(stream)
            if account is not None:
                account.num_waiting += 1
        if account is not None and not context.background:
            account.spend(sum(len(choice.prompt_token_ids) for choice in self.choices[:: self.n]))

    def abort(self) -> None:
        """Stop the sequences that still run; safe to call at any time and more than once."""
        for stream, choice in zip(self._streams, self.choices, strict=False):
            stream.abort()
            if choice.finish_reason is None:
                self._finish(choice, "abort" if self._engine.is_alive else "error")

    @property
    def unread(self) -> int:
        """Tokens waiting to be read; one with log-probabilities counts once, plus once per candidate."""
        return (1 + (self.params.logprobs or 0)) * sum(stream.unread for stream in self._streams)

    def seconds_to(self, moment: float) -> float | None:
        """Return the seconds from the request's arrival to a moment of `RequestTimes`; None before that moment."""
        return moment - self.context.arrival if moment else None

    def drain(self) -> Iterator[tuple[int, RequestOutput]]:
        """Yield every output that has arrived, with its choice's index; raise if a sequence failed."""
        for index, stream in enumerate(self._streams):
            for output in stream.drain():
                self._record(index, output)
                yield index, output

    def _record(self, index: int, output: RequestOutput) -> None:
        """Update counts and times, and raise if the sequence failed."""
        choice, times, counts = self.choices[index], output.times, self._counts
        new_tokens = output.num_output_tokens - choice.num_output_tokens
        starts, account = bool(times.scheduled) and not choice.times.scheduled, self.context.account
        prompt_tokens = output.num_prompt_tokens if starts and index % self.n == 0 else 0  # once, as in `usage`
        counts.num_prompt_tokens += prompt_tokens
        if account is not None:
            account.follow(prompt_tokens, new_tokens, starts=starts)
            if not self.context.background:
                account.spend(new_tokens)
        if new_tokens and not choice.num_output_tokens:
            counts.time_to_first_token.observe(times.first_token - self.context.arrival)
        elif new_tokens:
            counts.inter_token_latency.observe((times.last_token - choice.times.last_token) / new_tokens, new_tokens)
        counts.num_generation_tokens += new_tokens
        choice.num_output_tokens = output.num_output_tokens
        choice.num_cached_tokens = output.num_cached_tokens
        choice.num_reasoning_tokens = output.num_reasoning_tokens
        choice.is_reasoning = output.is_reasoning
        choice.times = times
        choice.prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None:
            choice.stop_reason = output.stop_reason
            choice.embedding = output.embedding
            self._finish(choice, output.finish_reason)
        if output.refused:
            raise RequestError(output.error or "The engine refused this request.")
        if output.finish_reason == "error":
            if not self._engine.is_alive:
                raise EngineDeadError(output.error or "The engine has stopped.")
            raise ApiError(500, "The engine failed on this request.", code="internal_error")
        if output.finish_reason == "abort":
            raise unavailable("The server stopped this request.", "aborted")

    def _finish(self, choice: Choice, reason: str) -> None:
        choice.finish_reason = reason
        self.running -= 1
        if self.context.account is not None:
            self.context.account.finish(started=bool(choice.times.scheduled))
        seconds, prompt = time.monotonic() - self.context.arrival, choice.prompt_token_ids
        self._counts.on_finish(reason, seconds, choice.times, len(prompt), choice.num_output_tokens)

    async def collect(self) -> None:
        """Run to the end and keep everything in `choices`; raises `ClientDisconnect` as soon as the client has left."""
        work = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_disconnected(self.context))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            self.abort()

    async def _collect(self) -> None:
        kept: Hold | None = None
        while self.running:
            await self.wakeup.wait()
            for index, output in self.drain():
                choice = self.choices[index]
                choice.pieces.append(output.text)
                choice.sections += output.sections
                choice.token_ids += output.token_ids
                choice.logprobs += output.logprobs
                choice.dynamics += output.dynamics
                if output.logprobs or output.prompt_logprobs or output.dynamics:
                    shown = sum(1 + len(each.top) for each in (*output.logprobs, *output.prompt_logprobs))
                    shown += len(output.dynamics) * (1 + self._engine.info.num_layers)
                    self.num_shown += shown
                    kept = kept or self.context.hold("answers", 0)
                    kept.resize(CANDIDATE_BYTES * self.num_shown)

    @property
    def is_large(self) -> bool:
        """Whether the response should be encoded while being sent."""
        return self.num_shown > LARGE_RESPONSE

    def log_fields(self) -> dict[str, Any]:
        """Return token counts, and the first choice's seconds in the queue and to its first token."""
        usage, times = self.usage(), self.choices[0].times
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        tokens = {"prompt": usage["prompt_tokens"], "cached": cached, "completion": usage["completion_tokens"]}
        moments = {"queue": self.seconds_to(times.scheduled), "ttft": self.seconds_to(times.first_token)}
        return {"tokens": tokens} | {name: round(value, 6) for name, value in moments.items() if value is not None}

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object, which counts each prompt once and the tokens of every choice."""
        firsts = self.choices[:: self.n]
        prompt = sum(len(choice.prompt_token_ids) for choice in firsts)
        completion = sum(choice.num_output_tokens for choice in self.choices)
        reasoning = sum(choice.num_reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in firsts)},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }


def _check_size(
    engine: AsyncEngine,
    prompts: list[list[int]],
    params: SamplingParams,
    field: str,
    n: int,
    streams: bool,
    client: str,
) -> None:
    """Raise `RequestError` or `EngineBusyError` for more sequences, or data about them, than memory allows."""
    count, info = len(prompts) * n, engine.info
    if count > MAX_SEQUENCES:
        message = f"Too many sequences: {len(prompts)} prompts with n = {n} make {count}; the limit is {MAX_SEQUENCES}."
        raise RequestError(message, param="n")
    field = "n" if n > 1 else field
    try:
        engine.check_room(count, client)
    except RequestError as error:
        error.param = field
        raise
    lists = {
        "allowed_token_ids": len(params.allowed_token_ids or ()),
        "bad_words": sum(len(word) for word in params.bad_words),
    }
    for name, length in lists.items():
        if length * count > MAX_LISTED_IDS:  # each sequence carries its own list
            message = f"{name} is too long for {count} sequences: {length * count} ids; the limit is {MAX_LISTED_IDS}."
            raise RequestError(message, param=name)
    if len(params.grammar or "") * count > MAX_GRAMMAR_BYTES:  # the same
        message = f"The grammar of the answer is too long for {count} sequences: {len(params.grammar or '')} bytes"
        raise RequestError(f"{message} each; the limit is {MAX_GRAMMAR_BYTES} in all.", param=field)
    shown = 0
    for prompt in prompts:
        if params.prompt_logprobs is not None:
            shown += len(prompt) * (params.prompt_logprobs + 1)
        if not streams:  # a stream sends each token's data immediately and keeps none
            room = max(info.config.max_model_len - len(prompt), 0)
            tokens = room if params.max_tokens is None else min(params.max_tokens, room)
            shown += tokens * (0 if params.logprobs is None else params.logprobs + 1)
            shown += tokens * (info.num_layers + 1 if params.return_dynamics else 0)
    if shown * n > MAX_SHOWN:
        message = f"Too many log-probabilities or dynamics: {shown * n} candidates; the limit is {MAX_SHOWN}."
        raise RequestError(message, param=field)


def _shifted(seed: int | None, offset: int) -> int | None:
    """Return `seed + offset`, wrapping around at 64 bits."""
    return None if seed is None else (seed + offset + 2**63) % 2**64 - 2**63


async def _disconnected(context: RequestContext) -> None:
    while (await context.receive())["type"] != "http.disconnect":
        pass
