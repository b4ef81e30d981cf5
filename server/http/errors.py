"""The one place where failures become HTTP errors, in OpenAI's format or in Anthropic's.

429s are decided elsewhere: the queue in `AsyncEngine.check_room` and `_check_bytes`, a key's limits in `Account.enter`
and `check_prompt`, memory in `MemoryBudget` (which also has a 503), grammars in `GrammarChecks`, files and batches in
`BatchStore`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...engine.errors import EngineBusyError, EngineDeadError, RequestError, lacks_threads

logger = logging.getLogger("pyllm.server")

PIECE_BYTES = 2**16  # of a response that is encoded while being sent


class Items:
    """An array in JSON whose items are made one by one during encoding, once."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items


def _encode_items(value: Any) -> msgspec.Raw:
    if not isinstance(value, Items):
        raise NotImplementedError
    return msgspec.Raw(b"[" + b",".join(map(encode_json, value.items)) + b"]")


encode_json = msgspec.json.Encoder(enc_hook=_encode_items).encode
"""Faster than Starlette's encoder; NaN and infinities, which JSON lacks, become null."""
MAX_ECHO = 200  # characters of the client's input that a message repeats
RETRY_AFTER_SECONDS = 5
# Anthropic's types by status; the others are invalid_request_error below 500, and api_error.
ANTHROPIC_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
ANTHROPIC_TYPES |= {429: "rate_limit_error", 503: "overloaded_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """A failure with its HTTP status and the fields of OpenAI's error object."""

    status: int
    message: str
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object, for a response or a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """Anthropic's error object, which has OpenAI's fields too."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": self.body["error"] | {"type": kind}, "request_id": request_id}


class JsonResponse(Response):
    """A response in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode `content`."""
        return encode_json(content)


class PiecewiseResponse(Response):
    """A large response in JSON, encoded while the client reads it."""

    media_type = "application/json"

    def __init__(self, content: Any) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in encode_pieces(self._content):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a piece takes a millisecond or two
        await send({"type": "http.response.body", "body": b""})


def encode_pieces(content: Any) -> Iterator[bytes]:
    """Yield the JSON of `content` in pieces of at least `PIECE_BYTES`, except for the last."""
    arrays: list[Items] = []

    def mark(value: Any) -> msgspec.Raw:
        arrays.append(value)
        return msgspec.Raw(b"\0")  # JSON has no such byte

    first, *rest = msgspec.json.Encoder(enc_hook=mark).encode(content).split(b"\0")
    data = bytearray(first)
    for array, after in zip(arrays, rest, strict=True):
        comma = b"["
        for item in array.items:
            data += comma
            data += encode_json(item)
            comma = b","
            if len(data) >= PIECE_BYTES:
                yield bytes(data)
                data.clear()
        data += b"[]" if comma == b"[" else b"]"
        data += after
    yield bytes(data)


def unavailable(message: str, code: str) -> ApiError:
    """Make a 503 with the time after which to retry."""
    return ApiError(503, message, code=code, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


def shorten(text: str) -> str:
    """Cut the client's input to the length that a message may repeat."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"


def to_api_error(error: Exception, request_id: str = "-") -> ApiError:
    """Map any failure; an unknown one is logged with its traceback, and is a 500 that reveals nothing."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code or "invalid_value")
        case EngineBusyError():
            return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)})
        case EngineDeadError():
            return unavailable("The engine has stopped, so this request cannot be finished.", "engine_dead")
        case HTTPException(status_code=404):
            return ApiError(404, "This route does not exist.", code="unknown_url")
        case HTTPException(status_code=405):
            return ApiError(405, "This route does not support this method.", code="method_not_allowed")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers or {})
    if lacks_threads(error):
        return unavailable("The system allows the server no more threads: retry later.", "no_threads")
    logger.error("A request failed because of an internal error. id=%s", request_id, exc_info=error)
    return ApiError(500, "The server failed to answer this request.", code="internal_error")
