"""What runs in each of Ray Serve's proxies, in front of all requests that generate.

Serve's proxy chooses a replica before it has read a body, passes bodies of any length, and ends the answer of a replica
that dies as if it were complete. `Front` reads the body first, and gives the router what it needs to know of it. A
replica that has just ended is passed over, and an answer that stops in the middle ends with an error.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..flags import ServerConfig
from ..http.budget import MAX_BODY_BYTES
from ..http.errors import ApiError, unavailable
from .affinity import Route, route_of_body
from .relay import REPLICA_HEADER, RETRY_HEADER

PATHS = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/tokenize", "/detokenize",
}  # fmt: skip
RESPONSE = re.compile(r"/v1/responses/([^/]{1,256})(/.*)?")
RESPONSE_ID = re.compile(rb'"id" ?: ?"(resp_[^"]{1,128})"')
SESSION = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
"""The header in which Serve's proxy looks for the name of a session."""
SESSION_HEADERS = (SESSION, b"session_id", b"session-id")
BODY_SECONDS = ServerConfig().body_timeout
MIN_PROGRESS = 4 * 2**10  # of a body in that time
LARGE_BODY_BYTES = 2**16  # from here, a body is read in a thread
MAX_ATTEMPTS = 5
RETRY_SECONDS = 0.2
MAX_ANSWERS = 20_000  # responses whose replica is known


def middlewares() -> list[Middleware]:
    """Return what Serve's proxies apply; the value of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this."""
    return [Middleware(Front)]


class Front:
    """An ASGI middleware of Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: OrderedDict[str, Route] = OrderedDict()  # by the id of a response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to Serve."""
        path = re.sub("/+", "/", scope.get("path", "")).rstrip("/")
        if scope["type"] == "http" and (found := RESPONSE.fullmatch(path)) and found[1] in self._answers:
            route = msgspec.structs.replace(self._answers[found[1]], pinned=True)
            await self._app(_routed(scope, route), receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and path in PATHS:
            try:
                async with asyncio.timeout(None) as limit:
                    body = await _read(receive, limit)
            except (ApiError, TimeoutError) as error:
                late = ApiError(408, "The request body is uploading too slowly.", code="body_timeout")
                await _send_error(send, error if isinstance(error, ApiError) else late, path)
                return
            if body is not None:
                await self._answer(scope, path, body, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, path: str, body: bytes, receive: Receive, send: Send) -> None:
        names = dict(reversed(scope["headers"]))
        session = next((names[name] for name in SESSION_HEADERS if name in names), b"").decode("latin-1")
        if len(body) < LARGE_BODY_BYTES:
            route = route_of_body(body, session, self._answers)
        else:
            route = await asyncio.to_thread(route_of_body, body, session, self._answers)
        client = _Client(receive, body)
        for attempt in range(MAX_ATTEMPTS):
            keep = partial(self._keep, route) if path == "/v1/responses" else None
            answer = _Answer(send, is_last=attempt == MAX_ATTEMPTS - 1, on_id=keep)
            await self._app(_routed(scope, route), client.replay(), answer)
            if client.has_left or not answer.is_refused:
                break
            route = msgspec.structs.replace(route, avoid=(*route.avoid, answer.replica))
            await asyncio.sleep(RETRY_SECONDS * attempt)
        if not client.has_left and not answer.is_complete:
            await answer.fail(path)

    def _keep(self, route: Route, response_id: str) -> None:
        self._answers[response_id] = route
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)


def _routed(scope: Scope, route: Route) -> Scope:
    """Copy a scope, with the route where Serve's proxy looks for the name of a session: the last one counts."""
    header = (SESSION, route.encode().encode())
    return {**scope, "headers": [*scope["headers"], header] if route.marks or route.avoid else list(scope["headers"])}


async def _read(receive: Receive, limit: asyncio.Timeout) -> bytes | None:
    """Read a body; None if the client has gone. Raises `ApiError` if it is too long, `TimeoutError` if it stalls."""
    parts: list[bytes] = []
    size, more, wanted = 0, True, 0
    while more:
        if size >= wanted:
            limit.reschedule(asyncio.get_running_loop().time() + BODY_SECONDS)
            wanted = size + MIN_PROGRESS
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            reason = f"The body is larger than {MAX_BODY_BYTES} bytes."
            raise ApiError(413, reason, code="body_too_large", headers={"connection": "close"})
        more = message.get("more_body", False)
    return b"".join(parts)


class _Client:
    """The client's side of a request whose body has been read, as often as it is sent."""

    def __init__(self, receive: Receive, body: bytes) -> None:
        self.has_left = False
        self._receive, self._body = receive, body

    def replay(self) -> Receive:
        """Return a `receive` that begins with the body."""
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            message = await self._receive()
            self.has_left = self.has_left or message["type"] == "http.disconnect"
            return message

        return receive


class _Answer:
    """One replica's answer on its way to the client; a refusal is held back, unless it is the `is_last` one."""

    def __init__(self, send: Send, *, is_last: bool, on_id: Callable[[str], None] | None) -> None:
        self.is_refused = self.is_complete = self.has_started = False
        self.replica = ""
        self._send, self._is_last, self._on_id = send, is_last, on_id
        self._beginning = b""
        self._is_stream = self._is_foreign = False

    async def __call__(self, message: Message) -> None:
        """Take one of Serve's messages."""
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.replica = headers.get(REPLICA_HEADER, b"").decode()
            self.is_refused = RETRY_HEADER in headers and not self._is_last
            self._is_foreign = not self.replica and message["status"] >= 400  # Serve's own, in plain text
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self.is_refused or self._is_foreign:
                return
            self.has_started = True
            message["headers"] = [pair for pair in message["headers"] if pair[0] != RETRY_HEADER]
        elif self.is_refused or self._is_foreign:
            return
        elif message["type"] == "http.response.body":
            self._look_for_id(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        await self._send(message)

    def _look_for_id(self, data: bytes) -> None:
        if self._on_id is not None:
            self._beginning += data
            if found := RESPONSE_ID.search(self._beginning):
                self._on_id(found[1].decode())  # before the client knows it
            if found or len(self._beginning) > 2**12:
                self._on_id = None

    async def fail(self, path: str) -> None:
        """End an answer that its replica cannot finish."""
        error = unavailable("The replica that answered this request has ended.", "replica_dead")
        if self._is_foreign:
            error = unavailable("No replica can take this request now.", "no_replica")
        if not self.has_started:
            await _send_error(self._send, error, path)
        elif self._is_stream:
            name = "event: error\n" if path in ("/v1/messages", "/v1/responses") else ""
            event = f"{name}data: {msgspec.json.encode(_body(error, path)).decode()}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        # The body stays incomplete, so the server closes the connection, and no client takes it for the whole.


def _body(error: ApiError, path: str) -> dict[str, Any]:
    return error.anthropic_body("") if path.startswith("/v1/messages") else error.body


async def _send_error(send: Send, error: ApiError, path: str) -> None:
    headers = [(b"content-type", b"application/json")]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(_body(error, path))})
