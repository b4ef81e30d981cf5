"""Server-sent events: one loop for every endpoint that streams, and the shapes that it asks for."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from ...engine.client.output_processor import RequestOutput
from ...model.tokenizer import Tokenizer
from ..http.context import RequestContext
from ..http.errors import ApiError, encode_json, to_api_error
from .generation import Generation
from .token_details import show_dynamics

_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")


def event(content: Any) -> bytes:
    """One event with JSON in it."""
    return b"data: " + encode_json(content) + b"\n\n"


class EventWriter(ABC):
    """Writes what an endpoint says while it generates, as whole events.

    Attributes:
        shows_tokens: the events show single tokens (ids, log-probabilities, dynamics), so these must all be sent, and
            with the text that they belong to.
    """

    shows_tokens: bool = False

    def opening(self) -> bytes:
        """What comes before the first token."""
        return b""

    @abstractmethod
    def piece(self, index: int, output: RequestOutput) -> bytes:
        """New text of one choice with its tokens."""

    @abstractmethod
    def ending(self, index: int, output: RequestOutput) -> bytes:
        """The end of one choice; `output` has its finish reason, and its text is written already."""

    @abstractmethod
    def closing(self) -> bytes:
        """What comes after the last choice has ended."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """What comes instead when the rest can't be generated."""


class Chunks(EventWriter):
    """OpenAI's chunks with choices; what all chunks of a choice share is encoded once.

    Attributes:
        member: the name of the text's place in a choice.
        empty: what stands there, in JSON, where nothing is new.
    """

    member: bytes
    empty: bytes
    DONE = b"data: [DONE]\n\n"

    def __init__(
        self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, *, with_usage: bool, with_ids: bool
    ) -> None:
        """`head` is what every chunk says."""
        self.with_usage = with_usage
        self.with_ids = with_ids
        self.with_dynamics = generation.params.return_dynamics
        self.with_logprobs = generation.with_logprobs
        self.shows_tokens = self.with_ids or self.with_logprobs or self.with_dynamics
        self.choices = generation.choices
        self.tokenizer = tokenizer
        self._generation = generation
        self._head = head
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":'
        self._starts = [b'%s%d,"%s":' % (start, index, self.member) for index in range(len(self.choices))]
        self._tail = b',"usage":null}\n\n' if self.with_usage else b"}\n\n"

    def chunk(self, index: int, content: bytes, *, logprobs: bytes = b"null", reason: bytes = b"null",
              more: bytes = b"", beside: bytes = b"") -> bytes:  # fmt: skip
        """One chunk from parts in JSON; `more` are further members of the choice, `beside` of the chunk."""
        parts = (self._starts[index], content, logprobs, reason, more, beside, self._tail)
        return b'%s%s,"logprobs":%s,"finish_reason":%s%s}]%s%s' % parts

    def details(self, output: RequestOutput) -> bytes:
        """The members of a choice that show the new tokens, as far as they are asked for."""
        ids = b',"token_ids":' + encode_json(output.token_ids) if self.with_ids else b""
        if not self.with_dynamics:
            return ids
        return ids + b',"dynamics":' + encode_json(show_dynamics(output.token_ids, output.dynamics, self.tokenizer))

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """The last chunk of one choice, with the finish reason."""
        return self.last(index, output.finish_reason, output.stop_reason)

    def last(self, index: int, reason: str | None, stop: str | int | None, beside: bytes = b"") -> bytes:
        """The chunk with a finish reason and what stopped the choice."""
        more = b"" if stop is None else b',"stop_reason":' + encode_json(stop)
        return self.chunk(index, self.empty, reason=encode_json(reason), more=more, beside=beside)

    def closing(self) -> bytes:
        """The token counts, without choices, if they are asked for, and the mark of the end."""
        usage = event(self._head | {"choices": [], "usage": self._generation.usage()}) if self.with_usage else b""
        return usage + self.DONE

    def failure(self, error: ApiError) -> bytes:
        """The error, and the mark of the end."""
        return event(error.body) + self.DONE


async def send_events(generation: Generation, writer: EventWriter, send: Send) -> bytes:
    """Send the events of an answer, those that come together as one piece; return what is left to send.

    A failure becomes an event too.
    """
    waiting: dict[int, RequestOutput] = {}
    data = writer.opening()
    try:
        while generation.running:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = b""
            await generation.wakeup.wait()
            for index, output in generation.drain():
                if waiting and (before := waiting.pop(index, None)) is not None:
                    output = _joined(before, output)
                # Tokens without text of their own (a part of a character, a stop string's beginning) wait for some.
                if output.text or (output.finish_reason and output.token_ids and writer.shows_tokens):
                    data += writer.piece(index, output)
                elif writer.shows_tokens and output.token_ids:
                    waiting[index] = output
                if output.finish_reason is not None:
                    data += writer.ending(index, output)
        return data + writer.closing()
    except Exception as error:
        return data + writer.failure(to_api_error(error))


def _joined(before: RequestOutput, output: RequestOutput) -> RequestOutput:
    """Both as one; the text of `before` is empty."""
    return msgspec.structs.replace(
        output,
        token_ids=before.token_ids + output.token_ids,
        logprobs=before.logprobs + output.logprobs,
        dynamics=before.dynamics + output.dynamics,
    )


class EventStream(EventSourceResponse):
    """A stream of ready-made events that stops its generation however it ends.

    The library's part is all around the events: the head, comments that keep the stream open, the client's going and
    the server's end. The events themselves pass it by, which costs half as much.
    """

    def __init__(self, generation: Generation, writer: EventWriter, keep_alive_seconds: float) -> None:
        super().__init__(self._body(), ping=keep_alive_seconds, sep="\n", ping_message_factory=lambda: _KEEP_ALIVE)
        self._generation = generation
        self._writer = writer
        self._send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that goes away cancels it here."""
        self._send = RequestContext.of(scope).send
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()

    async def _body(self) -> AsyncIterator[bytes]:
        # A task of its own: it is woken without a way through all the layers above.
        yield await asyncio.create_task(send_events(self._generation, self._writer, self._send))
