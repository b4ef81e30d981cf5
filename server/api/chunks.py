"""What chat completions and completions write in the same way: chunks of streams, and details of choices."""

from __future__ import annotations

from typing import Any

from ...engine.client.output_processor import RequestOutput
from ...engine.messages import TokenDynamics
from ...model.tokenizer import Tokenizer
from ..generation.generation import Choice, Generation
from ..generation.streaming import EventWriter, event
from ..generation.token_details import show_dynamics
from ..http.errors import ApiError, encode_json
from .fields import GenerationRequest

DONE = b"data: [DONE]\n\n"


class Chunks(EventWriter):
    """Writes chunks with choices; encodes what all chunks of a choice share only once."""

    content_field: bytes  # the field of a choice that holds its text
    empty: bytes  # its JSON without new text

    def __init__(
        self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, body: GenerationRequest
    ) -> None:
        """`head` has the fields of every chunk."""
        self.body = body
        self.choices = generation.choices
        self.tokenizer = tokenizer
        self.with_logprobs = generation.with_logprobs
        self.shows_tokens = bool(self.with_logprobs or body.return_token_ids or body.return_dynamics)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._generation = generation
        self._head = head
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":'
        self._starts = [b'%s%d,"%s":' % (start, index, self.content_field) for index in range(len(self.choices))]
        self._tail = b',"usage":null}\n\n' if self._with_usage else b"}\n\n"

    def chunk(self, index: int, content: bytes, *, logprobs: bytes = b"null", reason: bytes = b"null",
              choice_fields: bytes = b"", chunk_fields: bytes = b"") -> bytes:  # fmt: skip
        """Return one chunk from parts in JSON; additional fields begin with a comma."""
        parts = (self._starts[index], content, logprobs, reason, choice_fields, chunk_fields, self._tail)
        return b'%s%s,"logprobs":%s,"finish_reason":%s%s}]%s%s' % parts

    def details(self, output: RequestOutput) -> bytes:
        """Return the requested details of the new tokens, as fields of a choice."""
        return join_fields(_token_details(self.body, output.token_ids, output.dynamics, self.tokenizer))

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return the last chunk of a choice."""
        return self.last(index, output.finish_reason, output.stop_reason)

    def last(self, index: int, reason: str | None, stop: str | int | None, chunk_fields: bytes = b"") -> bytes:
        """Return the chunk with a choice's finish reason and what stopped it."""
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


def show_details(choice: Choice, body: GenerationRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what stopped a finished choice, and the requested details of its tokens."""
    stop = {} if choice.stop_reason is None else {"stop_reason": choice.stop_reason}
    return stop | _token_details(body, choice.token_ids, choice.dynamics, tokenizer)


def _token_details(
    body: GenerationRequest, token_ids: list[int], dynamics: list[TokenDynamics], tokenizer: Tokenizer
) -> dict[str, Any]:
    shown: dict[str, Any] = {"token_ids": token_ids} if body.return_token_ids else {}
    if body.return_dynamics:
        shown["dynamics"] = show_dynamics(token_ids, dynamics, tokenizer)
    return shown
