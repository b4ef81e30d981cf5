"""Server-sent events: one loop for every endpoint that streams, and the chunks of chats and completions."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from ...engine.client.output_processor import RequestOutput
from ...engine.messages import TokenDynamics
from ...model.tokenizer import Tokenizer
from ..http.errors import ApiError, encode_json, to_api_error
from .generation import Choice, Generation
from .token_details import show_dynamics

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")
# Raw in JSON, but line ends to clients that read a stream line by line as Python does, such as httpx's `iter_lines`.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def event(content: Any) -> bytes:
    """Return an event with JSON content."""
    return b"data: " + encode_json(content) + b"\n\n"


class EventWriter(ABC):
    """Writes the events of a stream, in an endpoint's format."""

    shows_tokens: bool = False
    """Whether events report individual tokens; then every token must be sent, along with its text."""

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

    async def settle(self) -> bytes:
        """Store what was written, after `closing` or `failure`, and return the last events; never raises."""
        return b""


class ChunkOptions(Protocol):
    """The fields of a request that decide the contents of its chunks."""

    return_token_ids: bool | None
    return_dynamics: bool | None
    stream_options: Any  # None, or with `include_usage` and `continuous_usage_stats`


class Chunks(EventWriter):
    """Writes chunks; the part that all chunks of a choice share is encoded once."""

    content_field: bytes  # the field of a choice that holds its text
    empty: bytes  # its JSON without new text

    def __init__(self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, body: ChunkOptions) -> None:
        """`head` has the fields of every chunk."""
        self.body = body
        self.choices = generation.choices
        self.tokenizer = tokenizer
        self.with_logprobs = generation.with_logprobs
        self.shows_tokens = bool(self.with_logprobs or body.return_token_ids or body.return_dynamics)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._with_usage_so_far = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._generation = generation
        self._head = head
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":'
        self._starts = [b'%s%d,"%s":' % (start, index, self.content_field) for index in range(len(self.choices))]
        self._tail = b',"usage":null}\n\n' if self._with_usage else b"}\n\n"

    def chunk(self, index: int, content: bytes, *, logprobs: bytes = b"null", reason: bytes = b"null",
              choice_fields: bytes = b"", chunk_fields: bytes = b"") -> bytes:  # fmt: skip
        """Return one chunk from parts in JSON; additional fields begin with a comma."""
        tail = self._tail
        if self._with_usage_so_far:
            tail = b',"usage":%s}\n\n' % encode_json(self._generation.usage())
        parts = (self._starts[index], content, logprobs, reason, choice_fields, chunk_fields, tail)
        return b'%s%s,"logprobs":%s,"finish_reason":%s%s}]%s%s' % parts

    def details(self, output: RequestOutput) -> bytes:
        """Return the requested details of the new tokens, as fields of a choice."""
        return join_fields(_token_details(self.body, output.token_ids, output.dynamics, self.tokenizer))

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return the last chunk of a choice."""
        return self.last(index, output.finish_reason, output.stop_reason)

    def last(self, index: int, reason: str | None, stop: str | int | None, chunk_fields: bytes = b"") -> bytes:
        """Return the chunk with a choice's finish reason and the string or token that stopped it."""
        stopped = b"" if stop is None else b',"stop_reason":' + encode_json(stop)
        end = encode_json(reason)
        return self.chunk(index, self.empty, reason=end, choice_fields=stopped, chunk_fields=chunk_fields)

    def closing(self) -> bytes:
        """Return the token counts, if requested, and the end mark."""
        usage = event(self._head | {"choices": [], "usage": self._generation.usage()}) if self._with_usage else b""
        return usage + DONE

    def failure(self, error: ApiError) -> bytes:
        """Return the error and the end mark."""
        return event(error.body) + DONE


def join_fields(fields: dict[str, Any]) -> bytes:
    """Return fields in JSON, each after a comma."""
    return b"," + encode_json(fields)[1:-1] if fields else b""


def show_details(choice: Choice, body: ChunkOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the string or token that stopped a finished choice, and the requested details of its tokens."""
    stop = {} if choice.stop_reason is None else {"stop_reason": choice.stop_reason}
    return stop | _token_details(body, choice.token_ids, choice.dynamics, tokenizer)


def _token_details(
    body: ChunkOptions, token_ids: list[int], dynamics: list[TokenDynamics], tokenizer: Tokenizer
) -> dict[str, Any]:
    shown: dict[str, Any] = {"token_ids": token_ids} if body.return_token_ids else {}
    if body.return_dynamics:
        shown["dynamics"] = show_dynamics(token_ids, dynamics, tokenizer)
    return shown


async def send_events(generation: Generation, writer: EventWriter) -> bytes:
    """Send events, one write per engine step; return the last ones, or an error's, for the caller to send."""
    context, waiting = generation.context, dict[int, RequestOutput]()
    data = writer.opening()
    try:
        while generation.running:
            if data:
                await context.send({"type": "http.response.body", "body": _escape_line_ends(data), "more_body": True})
                data = b""
            await generation.wakeup.wait()
            for index, output in generation.drain():
                if waiting and (before := waiting.pop(index, None)) is not None:
                    output = _joined(before, output)
                # Tokens without text (a part of a character, the beginning of a stop string) wait for the next text.
                if (
                    output.text
                    or output.sections
                    or (output.finish_reason and output.token_ids and writer.shows_tokens)
                ):
                    data += writer.piece(index, output)
                elif writer.shows_tokens and output.token_ids:
                    waiting[index] = output
                if output.finish_reason is not None:
                    data += writer.ending(index, output)
        data += writer.closing()
    except Exception as error:
        data += writer.failure(to_api_error(error, context.request_id))
    return _escape_line_ends(data + await writer.settle())


def _escape_line_ends(data: bytes) -> bytes:
    """Leave the events' own line feeds as the only line ends."""
    if data.isascii():
        return data
    text = data.decode()  # searching text is several times as fast as searching bytes
    return text.translate(_LINE_ENDS).encode() if "\x85" in text or "\u2028" in text or "\u2029" in text else data


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
        del self.headers["connection"]  # the library's keep-alive is the default, and wrong where the connection closes
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
