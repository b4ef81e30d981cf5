"""What every request passes: its id, the key, the last catch for failures, and one line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..api.pages import PAGE_PATHS
from .errors import ApiError, error_response, shorten, speaks_anthropic, to_api_error, unavailable
from .logs import current_request

if TYPE_CHECKING:
    from ..app import Service
    from ..generation.generation import Generation

logger = logging.getLogger("pyllm.server")

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Routes that are logged at debug level only, since machines ask for them all the time."""
PUBLIC_PATHS = PROBES | PAGE_PATHS
"""Routes that never need a key."""
CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")
"""Nothing that could pass for another member of a log line."""


class RequestMiddleware:
    """The layer around the routes, as plain ASGI so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        # What belongs to a key is told by a name that says nothing of the key and holds for this run alone.
        secret = secrets.token_bytes(32)
        keys = [key.encode() for key in service.config.api_key]
        self._keys = [(key, hashlib.blake2b(key, key=secret, digest_size=16).hexdigest()) for key in keys]
        self._root = service.config.root_path.rstrip("/")
        self._isolates = service.config.isolate_cache_by_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and answer whatever failure comes out of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = self._begin(scope, headers)
        state["send"] = send  # past all layers, for what comes between a stream's head and its end
        request_id = state["request_id"]
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        status = 0
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                shown = MutableHeaders(scope=message)
                shown["x-request-id"] = request_id
                if speaks_anthropic(scope):
                    shown["request-id"] = request_id
            await send(message)

        async def receive_until_gone() -> Message:
            nonlocal status
            message = await receive()
            # After a whole answer the server says the same, and nobody has gone.
            if message["type"] == "http.disconnect" and not complete:
                status = CLIENT_GONE
            return message

        self._service.enter()
        try:
            if self._keys and path not in PUBLIC_PATHS:
                state["owner"] = owner = self._owner(headers)
                state["cache_owner"] = owner if self._isolates else ""
            # HEAD is answered as GET; the HTTP server leaves the body out.
            asked = scope if scope["method"] != "HEAD" else {**scope, "method": "GET"}
            await self._app(asked, receive_until_gone, send_with_id)
        except ClientDisconnect:
            status = CLIENT_GONE
        except asyncio.CancelledError:  # the server ends, and the client has not sent or taken the rest in time
            if not self._service.draining:
                raise
            if not status:
                error = unavailable("The server is shutting down.", "shutting_down")
                await error_response(error, scope)(scope, receive, send_with_id)
        except Exception as error:
            if status not in (0, CLIENT_GONE):
                raise
            await error_response(to_api_error(error), scope)(scope, receive, send_with_id)
        finally:
            self._service.leave()
            seconds = time.monotonic() - state["arrival"]
            level = logging.DEBUG if path in PROBES else logging.INFO
            _log(level, scope, request_id, status, seconds)
            if self._service.model is not None and level == logging.INFO:
                self._service.model.metrics.on_answer(status)
            if self._service.tracing is not None:
                self._service.tracing.record(scope, path, status, seconds)

    def _begin(self, scope: Scope, headers: Headers) -> dict[str, Any]:
        """Find out what is known of a request from its start on; return its state."""
        # A proxy may take the prefix off or leave it there.
        if self._root and (scope["path"] + "/").startswith(self._root + "/"):
            scope["root_path"] = self._root
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        current_request.set(request_id)
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": request_id, "owner": "", "cache_owner": "", "arrival": time.monotonic()}
        return state

    def _owner(self, headers: Headers) -> str:
        """The name of the key that a request brings; raise `ApiError` 401 without a known one."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given = [text.encode("latin-1") for text in (bearer, headers.get("x-api-key")) if text]
        # All keys are compared, so that the time tells nothing about which one was near.
        owners = [owner for text in given for key, owner in self._keys if hmac.compare_digest(text, key)]
        if not owners:
            raise ApiError(
                401,
                "A valid API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return owners[0]


def _log(level: int, scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One line, without anything of the prompt."""
    if not logger.isEnabledFor(level):
        return
    path = repr(shorten(scope["path"]).encode("ascii", "backslashreplace").decode())[1:-1]
    fields = {"method": scope["method"], "path": path, "status": status, "id": request_id}
    tokens = ""
    if (generation := scope["state"].get("generation")) is not None:
        tokens, about = _about(generation)
        fields |= about
    fields["seconds"] = round(seconds, 6)
    logger.log(
        level, "%s %s %d id=%s%s seconds=%.3f", scope["method"], path, status, request_id, tokens, seconds,
        extra={"fields": fields},
    )  # fmt: skip


def _about(generation: Generation) -> tuple[str, dict[str, Any]]:
    """A generation's token counts and its first choice's times, as text and as fields."""
    usage, times = generation.usage(), generation.choices[0].times
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    text = f" prompt_tokens={prompt} cached_tokens={cached} completion_tokens={completion}"
    fields: dict[str, Any] = {"tokens": {"prompt": prompt, "cached": cached, "completion": completion}}
    for name, moment in (("queue", times.scheduled), ("ttft", times.first_token)):
        if (seconds := generation.seconds_to(moment)) is not None:
            text += f" {name}={seconds:.3f}"
            fields[name] = round(seconds, 6)
    return text, fields
