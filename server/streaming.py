"""Server-sent events: one loop for every endpoint that streams, and the shapes that it asks for."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from ..engine.messages import TokenLogprobs
from ..model.tokenizer import Tokenizer
from .errors import encode_json, to_api_error
from .generation import Generation
from .protocol import GenerationRequest

_NOTHING: tuple[list[int], list[TokenLogprobs]] = ([], [])
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")


def event(content: Any) -> bytes:
    """One event with JSON in it."""
    return b"data: " + encode_json(content) + b"\n\n"


class Chunks(ABC):
    """Writes an endpoint's chunks as whole events; what all chunks of a choice share is encoded once.

    Attributes:
        member: the name of the text's place in a choice.
        empty: what stands there, in JSON, where nothing is new.
        shows_tokens: the chunks show single tokens (ids or log-probabilities), so these must all be sent, and with
            the text that they belong to.
    """

    member: bytes
    empty: bytes

    def __init__(
        self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, body: GenerationRequest
    ) -> None:
        """`head` is what every chunk says."""
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.with_ids = bool(body.return_token_ids)
        self.with_logprobs = generation.with_logprobs
        self.shows_tokens = self.with_ids or self.with_logprobs
        self.choices = generation.choices
        self.tokenizer = tokenizer
        self._head = head
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":'
        self._starts = [b'%s%d,"%s":' % (start, index, self.member) for index in range(len(self.choices))]
        self._tail = b',"usage":null}\n\n' if self.with_usage else b"}\n\n"

    def chunk(self, index: int, content: bytes, *, logprobs: bytes = b"null", reason: bytes = b"null",
              more: bytes = b"", beside: bytes = b"") -> bytes:  # fmt: skip
        """One chunk from parts in JSON; `more` are further members of the choice, `beside` of the chunk."""
        parts = (self._starts[index], content, logprobs, reason, more, beside, self._tail)
        return b'%s%s,"logprobs":%s,"finish_reason":%s%s}]%s%s' % parts

    def opening(self) -> bytes:
        """What comes before the first token."""
        return b""

    @abstractmethod
    def piece(self, index: int, text: str, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bytes:
        """New text of one choice with its tokens."""

    def ending(self, index: int, reason: str) -> bytes:
        """The end of one choice."""
        return self.chunk(index, self.empty, reason=encode_json(reason))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The token counts, without choices."""
        return event(self._head | {"choices": [], "usage": usage})


async def send_events(generation: Generation, chunks: Chunks, send: Send) -> bytes:
    """Send the events of an answer, those that come together as one piece; return what is left to send.

    A failure becomes an event too.
    """
    waiting: dict[int, tuple[list[int], list[TokenLogprobs]]] = {}
    data = chunks.opening()
    try:
        while generation.running:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = b""
            await generation.bell.heard()
            for index, output in generation.take():
                token_ids, logprobs = waiting.pop(index, _NOTHING) if waiting else _NOTHING
                if chunks.shows_tokens:
                    token_ids, logprobs = token_ids + output.token_ids, logprobs + output.logprobs
                reason = output.finish_reason
                # Tokens without text of their own (a part of a character, a stop string's beginning) wait for some.
                if output.text or (reason and token_ids):
                    data += chunks.piece(index, output.text, token_ids, logprobs)
                elif token_ids:
                    waiting[index] = token_ids, logprobs
                if reason is not None:
                    data += chunks.ending(index, reason)
        if chunks.with_usage:
            data += chunks.usage(generation.usage())
    except Exception as error:
        data += event(to_api_error(error).body)
    return data + DONE


class EventStream(EventSourceResponse):
    """A stream of ready-made events that stops its generation however it ends.

    The library's part is all around the events: the head, comments that keep the stream open, the client's going and
    the server's end. The events themselves pass it by, which costs half as much.
    """

    def __init__(self, generation: Generation, chunks: Chunks, keep_alive_seconds: float) -> None:
        super().__init__(self._body(), ping=keep_alive_seconds, sep="\n", ping_message_factory=lambda: _KEEP_ALIVE)
        self._generation = generation
        self._chunks = chunks
        self._send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that goes away cancels it here."""
        self._send = scope["state"]["send"]
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()

    async def _body(self) -> AsyncIterator[bytes]:
        # A task of its own: it is woken without a way through all the layers above.
        yield await asyncio.create_task(send_events(self._generation, self._chunks, self._send))
