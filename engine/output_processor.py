"""From the engine's tokens to released text: incremental detokenisation, stop strings and how a request ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..model.tokenizer import DecodeStream, Tokenizer
from .messages import FinishReason, SamplingParams, TokenLogprobs, TokenOutput


class RequestTimes(NamedTuple):
    """Moments of a request's life so far, in seconds of `time.monotonic()`; 0 for what has not happened."""

    arrival: float
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What is new about one request.

    Attributes:
        text: newly released text; never half a character, nor what may still become a stop string.
        token_ids: new ids, an id that ended the sequence included.
        logprobs: one per new id, or [] where none were asked for.
        finish_reason: None while more is to come.
        stop_reason: the stop string or the asked-for stop id that ended it; None for the model's own end.
        num_output_tokens: since the start.
        error: one sentence, with finish_reason "error".
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    times: RequestTimes
    error: str | None = None


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back only what may begin one.

    The string that is complete first ends the text; of several complete at the same character, the one that starts
    first. Where the pieces are cut makes no difference. Work is linear in the new text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """`stops` are not empty strings; `include` leaves the found string in the text."""
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self.held = ""
        """Text that is not released: the longest suffix that begins a stop string."""

    def feed(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take more text; return the text released by it, and the stop string if one is complete.

        With `armed` false, stop strings that end in `text` are text like any other.
        """
        if not self.held and self._firsts.isdisjoint(text):
            return text, None
        pending = self.held + text
        for position, character in enumerate(text, start=len(self.held) + 1):
            complete = self._advance(character)
            if complete and armed:
                stop = max(complete, key=len)
                self.held = ""
                return pending[: position if self._include else position - len(stop)], stop
        kept = len(pending) - max(self._matched)
        self.held = pending[kept:]
        return pending[:kept], None

    def _advance(self, character: str) -> list[str]:
        """Move every stop string's automaton on by one character; return those now complete."""
        complete = []
        for n, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            length = self._matched[n]
            while length and stop[length] != character:
                length = borders[length]
            length += stop[length] == character
            if length == len(stop):
                complete.append(stop)
                length = borders[length]
            self._matched[n] = length
        return complete


def _borders(pattern: str) -> list[int]:
    """For each prefix length of `pattern`, the longest shorter prefix that is also that prefix's suffix."""
    borders = [0, 0]
    for character in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != character:
            length = borders[length]
        borders.append(length + (pattern[length] == character))
    return borders


@dataclass(slots=True)
class _TextState:
    """One unfinished request."""

    params: SamplingParams
    num_prompt_tokens: int
    stream: DecodeStream
    matcher: StopMatcher
    times: RequestTimes
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    released: list[str] = field(default_factory=list)
    """Text of the step at hand."""

    def take(self, token_id: int) -> str | None:
        """Add one token's text; return the stop string that it completes."""
        armed = self.num_output_tokens >= self.params.min_tokens
        text, stop = self.matcher.feed(self.stream.step(token_id), armed)
        self.released.append(text)
        return stop


class OutputProcessor:
    """The one owner of each running request's text. Not for use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _TextState] = {}

    def __len__(self) -> int:
        """Number of unfinished requests."""
        return len(self._states)

    def add(self, request_id: str, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Expect outputs of a new request; `ValueError` if one of this id is still running."""
        if request_id in self._states:
            raise ValueError(f"Request {request_id} is already running.")
        self._states[request_id] = _TextState(
            params=params,
            num_prompt_tokens=num_prompt_tokens,
            stream=self._tokenizer.decode_stream(params.skip_special_tokens),
            matcher=StopMatcher(params.stop, params.include_stop_str_in_output),
            times=RequestTimes(arrival=time.monotonic()),
        )

    def process(self, output: TokenOutput) -> RequestOutput | None:
        """What an engine's output means for its request; None when that has already ended.

        Where a stop string ends a request, the engine knows nothing of it: a result with a finish reason for an
        output without one tells the caller to abort the request there.
        """
        state = self._states.get(output.request_id)
        if state is None:
            return None
        params = state.params
        stop: str | None = None
        taken = 0
        for token_id in output.token_ids:
            taken += 1
            state.num_output_tokens += 1
            ends = taken == len(output.token_ids) and output.stop_token_id is not None
            shown = not ends or (params.include_stop_str_in_output and token_id in params.stop_token_ids)
            stop = state.take(token_id) if shown else None
            if stop is not None:
                break
        self._update(state, output, taken)
        if stop is not None:
            return self._result(output, state, taken, "stop", stop)
        asked = output.stop_token_id in params.stop_token_ids
        return self._result(output, state, taken, output.finish_reason, output.stop_token_id if asked else None)

    def abort(self, request_id: str, *, error: str | None = None) -> RequestOutput | None:
        """End a request from this side, as "error" where one is given; None when it has already ended."""
        reason: FinishReason = "abort" if error is None else "error"
        return self.process(TokenOutput(request_id=request_id, token_ids=[], finish_reason=reason, error=error))

    @staticmethod
    def _update(state: _TextState, output: TokenOutput, taken: int) -> None:
        state.num_cached_tokens = max(state.num_cached_tokens, output.num_cached_tokens)
        now = time.monotonic() if taken else state.times.last_token
        times = state.times
        state.times = RequestTimes(
            times.arrival, times.scheduled or output.scheduled_time, times.first_token or now, now
        )

    def _result(
        self,
        output: TokenOutput,
        state: _TextState,
        taken: int,
        finish_reason: FinishReason | None,
        stop_reason: str | int | None,
    ) -> RequestOutput:
        """The step's result, and the end of the state when there is a finish reason."""
        if finish_reason is not None:
            del self._states[output.request_id]
            state.released.append(state.matcher.held)
        text = "".join(state.released)
        state.released.clear()
        return RequestOutput(
            request_id=output.request_id,
            text=text,
            token_ids=output.token_ids[:taken],
            logprobs=output.logprobs[:taken],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=state.num_prompt_tokens,
            num_output_tokens=state.num_output_tokens,
            num_cached_tokens=state.num_cached_tokens,
            times=state.times,
            error=output.error,
        )
