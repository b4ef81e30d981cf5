"""From the engine's tokens to released text: incremental detokenisation, stop strings and how a request ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from ...model.tokenizer import DecodeStream, Tokenizer
from ..messages import FinishReason, SamplingParams, TokenDynamics, TokenLogprobs, TokenOutput

logger = logging.getLogger("pyllm.engine")


class RequestTimes(NamedTuple):
    """Moments of a request's life so far, in seconds of `time.monotonic()`; 0 for what has not happened."""

    arrival: float
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is new about one request (a struct, for it is made at every token, and a dataclass takes 2 µs for that).

    Attributes:
        text: newly released text; never half a character, nor what may still become a stop string.
        token_ids: new ids, an id that ended the sequence included.
        logprobs: one per new id, or [] where none were asked for.
        finish_reason: None while more is to come.
        stop_reason: the stop string or the asked-for stop id that ended it; None for the model's own end.
        num_output_tokens: since the start.
        error: one sentence, with finish_reason "error".
        refused: the error is the request's own fault.
        prompt_logprobs: of the prompt's next tokens, where asked for; all have come when the first token does.
        dynamics: one per new id, or [] where none were asked for.
        embedding: the answer of a request with pooling.
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
    refused: bool = False
    prompt_logprobs: list[TokenLogprobs] = []
    dynamics: list[TokenDynamics] = []
    embedding: list[float] | None = None


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

    def take(self, token_id: int) -> tuple[str, str | None]:
        """Add one token's text; return what it releases, and the stop string that it completes."""
        return self.matcher.feed(self.stream.step(token_id), self.num_output_tokens >= self.params.min_tokens)


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

    def process(self, output: TokenOutput, now: float | None = None) -> RequestOutput | None:
        """What an engine's output means for its request; None when that has already ended.

        Where a stop string ends a request, the engine knows nothing of it: a result with a finish reason for an
        output without one tells the caller to abort the request there. `now` is `time.monotonic()`, which a caller
        with many outputs asks only once.
        """
        state = self._states.get(output.request_id)
        if state is None:
            return None
        if output.error is not None and not output.refused:
            logger.error("Request %s ended by a fault of ours:\n%s", output.request_id, output.error)
        params, pieces, taken = state.params, [], 0
        stop: str | None = None
        stop_id, hidden = output.stop_token_id, 0
        if stop_id is not None and not (params.include_stop_str_in_output and stop_id in params.stop_token_ids):
            hidden = len(output.token_ids)
        for token_id in output.token_ids:
            taken += 1
            state.num_output_tokens += 1
            if taken != hidden:
                text, stop = state.take(token_id)
                pieces.append(text)
                if stop is not None:
                    break
        if taken or output.scheduled_time:
            arrival, scheduled, first, _ = state.times
            now = time.monotonic() if now is None else now
            state.times = RequestTimes(arrival, scheduled or output.scheduled_time, first or now, now)
            state.num_cached_tokens = output.num_cached_tokens or state.num_cached_tokens
        finish_reason: FinishReason | None = output.finish_reason if stop is None else "stop"
        if finish_reason is not None:
            del self._states[output.request_id]
            pieces.append(state.matcher.held)
        return RequestOutput(
            request_id=output.request_id,
            text="".join(pieces),
            token_ids=output.token_ids if stop is None else output.token_ids[:taken],
            logprobs=output.logprobs if stop is None else output.logprobs[:taken],
            finish_reason=finish_reason,
            stop_reason=stop_id if stop is None and stop_id in params.stop_token_ids else stop,
            num_prompt_tokens=state.num_prompt_tokens,
            num_output_tokens=state.num_output_tokens,
            num_cached_tokens=state.num_cached_tokens,
            times=state.times,
            error=output.error,
            refused=output.refused,
            prompt_logprobs=output.prompt_logprobs,
            dynamics=output.dynamics if stop is None else output.dynamics[:taken],
            embedding=output.embedding,
        )

    def abort(self, request_id: str, *, error: str | None = None) -> RequestOutput | None:
        """End a request from this side, as "error" where one is given; None when it has already ended."""
        reason: FinishReason = "abort" if error is None else "error"
        return self.process(TokenOutput(request_id=request_id, token_ids=[], finish_reason=reason, error=error))
