"""One line of a batch: parsed, answered by the application as if a client had sent it, and written as a row."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec
from starlette.types import ASGIApp, Message

from ...http.budget import MAX_BODY_BYTES
from ...http.errors import encode_json, shorten
from ...http.middleware import BATCH_OWNER
from .wire import URLS

MAX_LINE_BYTES = MAX_BODY_BYTES + 4096
MAX_CUSTOM_ID = 512  # characters
RETRY = (429, 503)  # statuses of a server that cannot answer now
ENGINE_DIED = ("engine_dead", "aborted")
MAX_ATTEMPTS = 3  # of a line during which the engine dies
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
MEMBERS = ("custom_id", "method", "url", "body")


class LineError(ValueError):
    """A line that is not a request; the message says why."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_line") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Line(NamedTuple):
    """A request of a batch."""

    custom_id: str
    url: str
    body: bytes  # JSON


class Outcome(NamedTuple):
    """An answer of the application."""

    status: int
    body: bytes  # JSON
    request_id: str


class _Fields(msgspec.Struct):
    stream: Any = None


class _Error(msgspec.Struct):
    code: str | None = None


class _Failure(msgspec.Struct):
    error: _Error


_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_value = msgspec.json.Decoder().decode
_fields = msgspec.json.Decoder(_Fields).decode
_failure = msgspec.json.Decoder(_Failure).decode


def parse_line(data: bytes, url: str | None = None) -> Line:
    """Parse a line, for the endpoint `url` if given; raise `LineError`."""
    if len(data) > MAX_LINE_BYTES:
        raise LineError(f"The line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        members = _members(data)
    except (ValueError, RecursionError) as error:
        raise LineError(f"The line is not a JSON object: {shorten(str(error))}.", code="invalid_json_line") from None
    for name in members:
        if name not in MEMBERS:
            raise LineError(f"{shorten(name)} is not a member of a line: {', '.join(MEMBERS)} are.", shorten(name))
    try:
        custom_id, method, to = (_value(members.get(name, b"null")) for name in MEMBERS[:3])
        stream = _fields(members.get("body", b"null")).stream
    except (ValueError, RecursionError):
        raise LineError("body must be a JSON object.", "body") from None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters.", "custom_id")
    if method != "POST":
        raise LineError("method must be 'POST'.", "method")
    if to not in ((url,) if url else URLS):
        raise LineError(f"url must be {url or ', '.join(URLS)}, but got {shorten(repr(to))}.", "url")
    if stream:
        raise LineError("stream must be false in a batch.", "body.stream")
    return Line(custom_id, to, bytes(members["body"]))


def custom_id_of(data: bytes) -> str | None:
    """Return the `custom_id` of a line that may be wrong elsewhere."""
    try:
        custom_id = _value(_members(data)["custom_id"])
    except (ValueError, RecursionError, KeyError):
        return None
    return custom_id if isinstance(custom_id, str) and len(custom_id) <= MAX_CUSTOM_ID else None


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers from 1: b"" for a blank one, and cut where one is too long anyway."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, data if data.strip() else b""
        while not data.endswith(b"\n") and (data := file.readline(MAX_LINE_BYTES)):
            pass


async def execute(app: ASGIApp, line: Line, owner: str) -> Outcome:
    """Answer a line, and again while the server is busy or restarts its engine; cancelling this aborts its request."""
    attempts, pause = 0, FIRST_PAUSE
    while True:
        outcome = await _request(app, line, owner)
        if outcome.status not in RETRY or attempts == MAX_ATTEMPTS:
            return outcome
        attempts += _failure(outcome.body).error.code in ENGINE_DIED
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def _request(app: ASGIApp, line: Line, owner: str) -> Outcome:
    """Send a line to the application as a client would."""
    request_id = uuid.uuid4().hex
    left = [{"type": "http.request", "body": line.body, "more_body": False}]
    status, parts = 0, []

    async def receive() -> Message:
        if left:
            return left.pop()
        return await asyncio.Event().wait() and {}  # never: the client of a batch does not leave

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    headers = {"content-type": "application/json", "content-length": str(len(line.body)), "x-request-id": request_id}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": line.url, "raw_path": line.url.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": None, "server": None, BATCH_OWNER: owner,
    }  # fmt: skip
    await app(scope, receive, send)
    return Outcome(status, b"".join(parts), request_id)


def answer_row(custom_id: str, outcome: Outcome) -> bytes:
    """Return the row of an answered line."""
    response = {"status_code": outcome.status, "request_id": outcome.request_id, "body": msgspec.Raw(outcome.body)}
    return _row(custom_id, response, None)


def error_row(custom_id: str | None, error: LineError, *, with_response: bool = False) -> bytes:
    """Return the row of a line that was not executed, if asked with the response that a wrong request gets."""
    body = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code}
    response = {"status_code": 400, "request_id": uuid.uuid4().hex, "body": {"error": body}} if with_response else None
    return _row(custom_id, response, {"code": error.code, "message": str(error)})


def _row(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    row = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return encode_json(row) + b"\n"
