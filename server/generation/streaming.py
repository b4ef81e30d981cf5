"""Server-sent events: one loop for every endpoint that streams."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from ...engine.client.output_processor import RequestOutput
from ..http.errors import ApiError, encode_json, to_api_error
from .generation import Generation

_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")


def event(content: Any) -> bytes:
    """Return an event with JSON content."""
    return b"data: " + encode_json(content) + b"\n\n"


class EventWriter(ABC):
    """Writes the events of a stream, in an endpoint's format."""

    shows_tokens: bool = False
    """Whether events show single tokens, which must then all be sent, with the text that they belong to."""

    def opening(self) -> bytes:
        """Return the events before the first token."""
        return b""

    @abstractmethod
    def piece(self, index: int, output: RequestOutput) -> bytes:
        """Return the events for new text of one choice with its tokens."""

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return the events for the end of one choice; the text of `output` is already written."""
        return b""

    @abstractmethod
    def closing(self) -> bytes:
        """Return the events after the last choice has ended."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """Return the events that replace the rest after an error."""


async def send_events(generation: Generation, writer: EventWriter) -> bytes:
    """Send the events, those of one step as one piece; return the last ones unsent. An error becomes an event too."""
    context, waiting = generation.context, dict[int, RequestOutput]()
    data = writer.opening()
    try:
        while generation.running:
            if data:
                await context.send({"type": "http.response.body", "body": data, "more_body": True})
                data = b""
            await generation.wakeup.wait()
            for index, output in generation.drain():
                if waiting and (before := waiting.pop(index, None)) is not None:
                    output = _joined(before, output)
                # Tokens without text (a part of a character, the beginning of a stop string) wait for the next text.
                if output.text or (output.finish_reason and output.token_ids and writer.shows_tokens):
                    data += writer.piece(index, output)
                elif writer.shows_tokens and output.token_ids:
                    waiting[index] = output
                if output.finish_reason is not None:
                    data += writer.ending(index, output)
        return data + writer.closing()
    except Exception as error:
        return data + writer.failure(to_api_error(error, context.request_id))


def _joined(before: RequestOutput, output: RequestOutput) -> RequestOutput:
    """Join two outputs; the text of `before` is empty."""
    return msgspec.structs.replace(
        output,
        token_ids=before.token_ids + output.token_ids,
        logprobs=before.logprobs + output.logprobs,
        dynamics=before.dynamics + output.dynamics,
    )


class EventStream(EventSourceResponse):
    """A stream of encoded events; however it ends, it aborts its generation.

    The library sends the head and keep-alive comments, and ends the stream when the client disconnects or the server
    stops. The events bypass it, at half the cost.
    """

    def __init__(self, generation: Generation, writer: EventWriter, keep_alive_seconds: float) -> None:
        super().__init__(self._body(), ping=keep_alive_seconds, sep="\n", ping_message_factory=lambda: _KEEP_ALIVE)
        self._generation = generation
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; cancelled when the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()

    async def _body(self) -> AsyncIterator[bytes]:
        # In a task of its own, which wakes up without passing through all the layers above.
        yield await asyncio.create_task(send_events(self._generation, self._writer))
