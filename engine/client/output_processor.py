"""Turns the engine's tokens into text, finds stop strings, and keeps each request's outputs until they are read."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ...model.tokenizer import DecodeStream, Tokenizer
from ..errors import EngineDeadError
from ..messages import FinishReason, SamplingParams, TokenDynamics, TokenLogprobs, TokenOutput
from .sections import Piece, SectionSplitter

logger = logging.getLogger("pyllm.engine")


class RequestTimes(NamedTuple):
    """When a request reached each stage, in seconds of `time.monotonic()`; 0 where it has not."""

    arrival: float
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """New output of one request.

    A msgspec struct, because one is created per token and a dataclass would take 2 µs longer.
    """

    request_id: str
    text: str  # only whole characters, and nothing that may still turn into a stop string
    token_ids: list[int]  # including the id that ended the sequence, if one did
    logprobs: list[TokenLogprobs]  # one per id, if requested
    finish_reason: FinishReason | None
    stop_reason: str | int | None  # the stop string or the requested stop id; None for the model's own end
    num_prompt_tokens: int
    num_output_tokens: int  # so far
    num_cached_tokens: int
    times: RequestTimes
    error: str | None = None  # one sentence, with the finish reason "error"
    refused: bool = False  # the error is the request's own fault
    prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's next tokens; the last come with the first token
    dynamics: list[TokenDynamics] = []  # one per id, if requested
    embedding: list[float] | None = None
    sections: list[Piece] = []  # the pieces of the text, if the request names the marks of sections
    num_reasoning_tokens: int = 0  # so far
    is_reasoning: bool = False  # what follows is reasoning, if there is more


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and holds back only text that may begin one.

    The first string to complete ends the text; if several complete at the same character, the longest, which starts
    first, wins. How the text is cut into pieces makes no difference. The work is linear in the text, whatever the
    length of the stop strings and of the held text. `include` leaves the found string in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._include = include
        self._starts: dict[str, list[_StopString]] = {}  # by their first character
        for stop in dict.fromkeys(stops):
            self._starts.setdefault(stop[0], []).append(_StopString(stop))
        self._firsts = frozenset(self._starts)
        # Stop strings that the end of the text begins, and how many characters of each it has.
        self._matched: dict[_StopString, int] = {}
        self._holding: _StopString | None = None  # the stop string whose beginning is held back
        self._num_held = 0

    @property
    def held(self) -> str:
        """The longest suffix that begins a stop string, not released yet."""
        return "" if self._holding is None else self._holding.text[: self._num_held]

    def release(self) -> str:
        """Return the held text, because no text follows it."""
        held = self.held
        self._holding, self._num_held = None, 0
        self._matched.clear()
        return held

    def feed(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Add text; return the released text, and a completed stop string if `armed` (once min_tokens is reached)."""
        if not self._matched and self._firsts.isdisjoint(text):
            return text, None
        stop: str | None = None
        num_held, released = 0, self._num_held + len(text)
        for position, character in enumerate(text, 1):
            complete = self._advance(character)
            if complete and armed:
                stop = max(complete, key=len)
                released = self._num_held + position - (0 if self._include else len(stop))
                self._matched.clear()
                break
        holding = max(self._matched, key=self._matched.__getitem__, default=None)
        if holding is not None:
            num_held = self._matched[holding]
            released -= num_held
        before = "" if self._holding is None else self._holding.text[: min(self._num_held, released)]
        shown = before + text[: max(0, released - self._num_held)]
        self._holding, self._num_held = holding, num_held
        return shown, stop

    def _advance(self, character: str) -> list[str]:
        """Add one character; return the strings that are complete."""
        complete, matched = [], {}
        for stop, length in self._matched.items():
            length = stop.advance(length, character)
            if length == len(stop.text):
                complete.append(stop.text)
                length = stop.borders[length]
            if length:
                matched[stop] = length
        for stop in self._starts.get(character, ()):
            if stop not in self._matched:
                stop.extend(1)
                if len(stop.text) == 1:
                    complete.append(stop.text)
                else:
                    matched[stop] = 1
        self._matched = matched
        return complete


class _StopString:
    """A Knuth-Morris-Pratt automaton for one string, built only as far as a text has matched."""

    __slots__ = ("borders", "others", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.borders = array("i", [-1])  # for each prefix length, the longest shorter prefix that is also a suffix
        self.others = array("i", [-1])  # the longest such prefix that another character follows; -1: none

    def advance(self, length: int, character: str) -> int:
        """Return how much of the string is matched after `character`, if `length` characters matched before it."""
        while length >= 0 and self.text[length] != character:
            length = self.others[length]
        self.extend(length + 1)
        return length + 1

    def extend(self, length: int) -> None:
        """Prepare for a match of this length."""
        while len(self.borders) <= length:
            end = len(self.borders)
            border = self.borders[-1]
            while border >= 0 and self.text[border] != self.text[end - 1]:
                border = self.others[border]
            border += 1
            self.borders.append(border)
            same = end < len(self.text) and self.text[border] == self.text[end]
            self.others.append(self.others[border] if same else border)


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
    splitter: SectionSplitter | None = None
    sections: list[Piece] = field(default_factory=list)  # those to report next
    num_reasoning_tokens: int = 0

    def add_tokens(self, token_ids: Sequence[int], hidden: int) -> tuple[str, str | None, int]:
        """Return the text to show, the stop string that ended it, and how many tokens were used.

        The `hidden`-th token, counted from 1, adds no text; 0 for none.
        """
        pieces, used, stop = [], 0, None
        for used, token_id in enumerate(token_ids, 1):
            self.num_output_tokens += 1
            if used != hidden:
                armed, text = self.num_output_tokens >= self.params.min_tokens, self.stream.step(token_id)
                if self.splitter is not None:
                    stop = self._split(self.splitter, token_id, text, armed)
                else:
                    text, stop = self.matcher.feed(text, armed)
                    pieces.append(text)
                if stop is not None:
                    break
        return "".join(pieces), stop, used

    def _split(self, splitter: SectionSplitter, token_id: int, text: str, armed: bool) -> str | None:
        """Add a token to `sections`; return a completed stop string."""
        before = splitter.section
        if splitter.is_mark(token_id):
            self._add_pieces(splitter, [(before, self.stream.finish())], armed=False)  # an unfinished character
        elif before == "reasoning":
            self.num_reasoning_tokens += 1
        return self._add_pieces(splitter, splitter.feed(token_id, text), armed)

    def _add_pieces(self, splitter: SectionSplitter, pieces: list[Piece], armed: bool) -> str | None:
        for section, text in pieces:
            stop = None
            if section in ("content", "call"):
                text, stop = self.matcher.feed(text, armed)
            elif held := self.matcher.release():
                self.sections += splitter.trim("content", held)
            self.sections += splitter.trim(section, text)
            if stop is not None:
                return stop
        return None

    def finish_sections(self, splitter: SectionSplitter, stop: str | None) -> str | None:
        """Add the held text, unless `stop` came before it; return the stop string that ends the text."""
        if stop is None:
            armed = self.num_output_tokens >= self.params.min_tokens
            stop = self._add_pieces(splitter, splitter.finish(), armed)
        self.sections += splitter.trim("content", self.matcher.release()) + splitter.finish_trimming()
        return stop

    def take_sections(self) -> list[Piece]:
        """Return the sections since the last call."""
        sections, self.sections = self.sections, []
        return sections


class OutputProcessor:
    """Owns the text of each running request. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _TextState] = {}

    def __len__(self) -> int:
        """Count the unfinished requests."""
        return len(self._states)

    def add(self, request_id: str, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Expect outputs of a new request; raise `ValueError` if its id is in use."""
        if request_id in self._states:
            raise ValueError(f"Request {request_id} is already running.")
        self._states[request_id] = _TextState(
            params=params,
            num_prompt_tokens=num_prompt_tokens,
            stream=self._tokenizer.decode_stream(params.skip_special_tokens),
            matcher=StopMatcher(params.stop, params.include_stop_str_in_output),
            splitter=SectionSplitter(params.marks) if params.marks else None,
            times=RequestTimes(arrival=time.monotonic()),
        )

    def process(self, output: TokenOutput, now: float | None = None) -> RequestOutput | None:
        """Turn an output of the engine into text; return None if its request has already finished.

        If the result has a finish reason and the output has none, a stop string has ended the request, and the caller
        must abort it in the engine. `now` is `time.monotonic()`, which a caller with many outputs reads only once.
        """
        state = self._states.get(output.request_id)
        if state is None:
            return None
        if output.error is not None and not output.refused:
            logger.error("Request %s failed with an internal error:\n%s", output.request_id, output.error)
        params, stop_id, hidden = state.params, output.stop_token_id, 0
        if stop_id is not None and not (params.include_stop_str_in_output and stop_id in params.stop_token_ids):
            hidden = len(output.token_ids)
        text, stop, used = state.add_tokens(output.token_ids, hidden)
        if used or output.scheduled_time:
            arrival, scheduled, first, _ = state.times
            now = time.monotonic() if now is None else now
            state.times = RequestTimes(arrival, scheduled or output.scheduled_time, first or now, now)
            state.num_cached_tokens = output.num_cached_tokens or state.num_cached_tokens
        finish_reason: FinishReason | None = output.finish_reason if stop is None else "stop"
        if finish_reason is not None:
            del self._states[output.request_id]
        if finish_reason is not None and state.splitter is None:
            text += state.matcher.held
        elif finish_reason is not None and state.splitter is not None:
            stop = state.finish_sections(state.splitter, stop)
            finish_reason = "stop" if stop is not None and output.error is None else finish_reason
        if sections := state.take_sections():
            text = "".join(piece for _, piece in sections)
        return RequestOutput(
            request_id=output.request_id,
            text=text,
            token_ids=output.token_ids[:used],
            logprobs=output.logprobs[:used],
            finish_reason=finish_reason,
            stop_reason=stop_id if stop is None and stop_id in params.stop_token_ids else stop,
            num_prompt_tokens=state.num_prompt_tokens,
            num_output_tokens=state.num_output_tokens,
            num_cached_tokens=state.num_cached_tokens,
            times=state.times,
            error=output.error,
            refused=output.refused,
            prompt_logprobs=output.prompt_logprobs,
            dynamics=output.dynamics[:used],
            embedding=output.embedding,
            sections=sections,
            num_reasoning_tokens=state.num_reasoning_tokens,
            is_reasoning=state.splitter is not None and state.splitter.section == "reasoning",
        )

    def abort(self, request_id: str, *, error: str | None = None) -> RequestOutput | None:
        """End a request from this side, because of an `error` if given; return None if it has already finished."""
        reason: FinishReason = "abort" if error is None else "error"
        return self.process(TokenOutput(request_id=request_id, token_ids=[], finish_reason=reason, error=error))


class Wakeup:
    """An event that streams set and one task waits for; cheaper than `asyncio.Event`, which serves several tasks."""

    __slots__ = ("_loop", "_pending", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending = False
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the waiting task, or the next one to wait."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        else:
            self._pending = True

    def wait(self) -> asyncio.Future[None]:
        """Return a future that is done once `wake` has been called since the last wait."""
        self._waiter = waiter = self._loop.create_future()
        if self._pending:
            waiter.set_result(None)
        self._pending = False
        return waiter


class RequestStream:
    """The outputs of one request, as they arrive: `async for output in stream`.

    Iteration ends after the output with a `finish_reason`, and raises `EngineDeadError` if the engine dies first.
    To stop reading earlier, call `abort`. One task can read several streams that share one `Wakeup`.
    """

    def __init__(
        self, wire_id: str, wakeup: Wakeup, abort: Callable[[str], None], client: str = "", num_bytes: int = 0
    ) -> None:
        self.client = client
        self.num_bytes = num_bytes  # of the request
        self._wire_id = wire_id
        self._wakeup = wakeup
        self._abort = abort  # called with the id when the reader aborts the request
        self._outputs: list[RequestOutput] = []
        self._finished = False
        self._dead: str | None = None

    @property
    def unread(self) -> int:
        """Tokens that have arrived and not been read."""
        return sum(len(output.token_ids) for output in self._outputs)

    def drain(self) -> list[RequestOutput]:
        """Return all unread outputs at once; raise `EngineDeadError` if there are none and the engine is dead."""
        if not self._outputs and self._dead is not None:
            raise EngineDeadError(self._dead)
        outputs, self._outputs = self._outputs, []
        if outputs and self._dead is not None:
            self._wakeup.wake()  # the next drain raises
        return outputs

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            if self._finished:
                raise StopAsyncIteration
            await self._wakeup.wait()
        return self._outputs.pop(0)

    def abort(self) -> None:
        """Stop generating; does nothing if the request has finished."""
        if not self._finished:
            self._finished = True
            self._wakeup.wake()
            self._abort(self._wire_id)

    def put(self, output: RequestOutput) -> None:
        """Keep an output until it is read."""
        self._outputs.append(output)
        self._finished = output.finish_reason is not None
        self._wakeup.wake()

    def die(self, reason: str) -> None:
        """End the stream, because the engine is dead."""
        self._dead = reason
        self._finished = True
        self._wakeup.wake()
