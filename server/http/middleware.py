"""The layer around all routes: each request's context, API keys, error responses, and one log line per request."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..flags import ServerConfig
from .budget import Hold, Kind, MemoryBudget
from .errors import MAX_ECHO, PIECE_BYTES, ApiError, JsonResponse, to_api_error, unavailable
from .keys import Account, KeyRing

logger = logging.getLogger("pyllm.server")

PROBES = frozenset({"/health", "/ready", "/ping", "/is_sleeping", "/metrics"})
"""Routes that monitoring polls: logged at debug level, not counted, and open without a key."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")  # anything else could forge fields in the log line
ANTHROPIC_ROUTES = "/v1/messages"  # this route and those below it speak Anthropic's API
CLIENT_GONE = 499  # the status of a request whose client left before the whole response was sent
MAX_HEADER = 1024  # characters of `x-pyllm-ignored`
MAX_NAME = 100  # characters of one name in it
CONTEXT = "pyllm.context"  # the member of an ASGI scope that holds the context
BATCH_OWNER = "pyllm.batch_owner"  # the member that makes a scope a line of this owner's batch
STARTS_PER_ROUND = 4  # requests; each takes a few milliseconds


class GenerationProgress(Protocol):
    """The interface of a generation that the connection and the log use."""

    @property
    def unread(self) -> int: ...  # tokens that a slow client has not taken yet

    def log_fields(self) -> dict[str, Any]: ...  # token counts as `tokens`, and seconds until some events


@dataclass(slots=True, eq=False)
class RequestContext:
    """Everything known about a request except its body."""

    scope: Scope
    client_receive: Receive
    send: Send  # straight to the client, bypassing all layers: for the events of a stream
    path: str  # without the prefix that a proxy may have left
    request_id: str
    budget: MemoryBudget
    arrival: float = field(default_factory=time.monotonic)
    status: int = 0  # of the response; 0 before its head is sent
    complete: bool = False  # the whole response is sent
    owner: str = ""  # names the API key without revealing it
    account: Account | None = None  # the client with this key
    is_counted: bool = False  # the account's limits apply
    is_admitted: bool = False  # the account has counted it
    cache_owner: str = ""  # cached prompts are shared within this owner only; "" shares with everyone
    client: str = ""  # the client's name in turn-taking between clients
    background: bool = False  # a line of a batch, which gives way to all other requests
    model: str | None = None  # as the body names it
    ignored: Mapping[str, None] = field(default_factory=dict)  # places in the body of hints that have no effect
    generation: GenerationProgress | None = None
    holds: list[Hold] = field(default_factory=list)  # memory, released at the end of the request
    body_hold: Hold | None = None

    @classmethod
    def of(cls, scope: Scope) -> RequestContext:
        """Return the context of a request that has passed the middleware."""
        context: RequestContext = scope[CONTEXT]
        return context

    @property
    def is_anthropic(self) -> bool:
        """Whether the request speaks Anthropic's API."""
        return (self.path + "/").startswith(ANTHROPIC_ROUTES + "/")

    async def receive(self) -> Message:
        """Receive the next message, and note whether the client has left."""
        message = await self.client_receive()
        # uvicorn also sends this after a complete response, although the client is still there.
        if message["type"] == "http.disconnect" and not self.complete:
            self.status = CLIENT_GONE
        return message

    async def respond(self, message: Message) -> None:
        """Send a part of the response; its head gets the request id."""
        if len(body := message.get("body", b"")) > PIECE_BYTES:  # sent as the client reads it
            last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
            for start in range(0, last, PIECE_BYTES):
                piece = body[start : start + PIECE_BYTES]
                await self.send({"type": "http.response.body", "body": piece, "more_body": True})
            message = {**message, "body": body[last:]}
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            length = int(Headers(raw=message["headers"]).get("content-length", 0))
            if length > PIECE_BYTES and self.scope["method"] != "HEAD":
                self.hold("answers", length)  # fails before anything is sent
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self.is_anthropic:
                headers["request-id"] = self.request_id
            if self.ignored:
                headers["x-pyllm-ignored"] = _list_names(self.ignored)
            if self.account is not None and self.is_counted:
                headers.update(self.account.headers())
        await self.send(message)

    def admit(self) -> None:
        """Count the request against its key's limits, until it ends; raise `ApiError` 429 if one is reached."""
        if self.account is not None:
            self.is_counted = not self.background
            self.account.enter(background=self.background)
            self.is_admitted = True

    def leave_account(self) -> None:
        """Stop counting the request that `admit` counted."""
        if self.account is not None:
            self.account.num_refused += self.status == 429
            if self.is_admitted:
                self.account.leave()

    def hold(self, kind: Kind, size: int) -> Hold:
        """Charge bytes to this request, until they are released or it ends; see `MemoryBudget`."""
        hold = self.budget.hold(kind, size, self.owner)
        self.holds.append(hold)
        return hold

    async def reserve(self, size: int) -> None:
        """Reserve memory for a large body, once per request; raise `EngineBusyError` if too little is free in time."""
        if self.body_hold is None:
            self.body_hold = await self.budget.reserve(size, self.owner)
            self.holds.append(self.body_hold)

    def release_body(self) -> None:
        """Release the memory that `reserve` holds; safe to call more than once."""
        if self.body_hold is not None:
            self.body_hold.release()

    def release(self) -> None:
        """Release all memory; safe to call more than once."""
        for hold in self.holds:
            hold.release()


def _list_names(names: Iterable[str]) -> str:
    """Return names for a header, as many as fit; characters that could break a list or a header are percent-encoded."""
    shown = ", ".join(quote(name[:MAX_NAME], safe="[]") for name in islice(names, MAX_HEADER))
    if len(shown) <= MAX_HEADER:
        return shown
    return shown[:MAX_HEADER].rpartition(", ")[0] + ", ..."


def error_response(error: ApiError, context: RequestContext | None = None) -> JsonResponse:
    """Make the HTTP response to a failed request."""
    body = error.anthropic_body(context.request_id) if context and context.is_anthropic else error.body
    return JsonResponse(body, status_code=error.status, headers=error.headers)


class ServiceState(Protocol):
    """The interface of `Service` that the middleware uses."""

    config: ServerConfig
    budget: MemoryBudget
    draining: bool
    keys: KeyRing

    def enter(self) -> None: ...

    def leave(self, context: RequestContext, seconds: float) -> None: ...


class Turnstile:
    """Lets a few requests start in each round of the event loop, so that nothing else waits for hundreds of them."""

    def __init__(self) -> None:
        self._room = STARTS_PER_ROUND  # in this round
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def enter(self) -> None:
        """Wait behind earlier requests."""
        self._turn()
        if self._room and not self._waiting:
            self._room -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._begin_round)

    def _begin_round(self) -> None:
        self._room, self._is_turning = STARTS_PER_ROUND, False
        while self._room and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its task was not cancelled
                turn.set_result(None)
                self._room -= 1
        if self._room < STARTS_PER_ROUND:
            self._turn()


class RequestMiddleware:
    """Plain ASGI, so that streams pass through untouched."""

    def __init__(
        self, app: ASGIApp, service: ServiceState, public_paths: frozenset[str], is_route: Callable[[str], bool]
    ) -> None:
        """`is_route` says whether a path is one that the app serves."""
        self._app = app
        self._is_route = is_route
        self._service = service
        self._turnstile = Turnstile()
        self._public_paths = PROBES | public_paths
        self._root = service.config.root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and turn a failure into an error response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A proxy may or may not strip the prefix.
        if self._root and (scope["path"] + "/").startswith(self._root + "/"):
            scope["root_path"] = self._root
            if scope["path"] == self._root:  # the pages' relative links need the slash
                await RedirectResponse(self._root + "/")(scope, receive, send)
                return
        prefix, headers = scope.get("root_path", ""), Headers(scope=scope)
        asked = path = scope["path"].removeprefix(prefix)
        if "//" in path or path[1:].endswith("/"):  # as made by joining a base URL and a path
            tidy = "/" + "/".join(part for part in path.split("/") if part)
            if self._is_route(tidy):
                path, scope["path"] = tidy, prefix + tidy
        if not _REQUEST_ID.fullmatch(request_id := headers.get("x-request-id", "")):
            request_id = uuid.uuid4().hex
        scope[CONTEXT] = context = RequestContext(scope, receive, send, path, request_id, self._service.budget)
        context.background = BATCH_OWNER in scope
        self._service.enter()
        try:
            if path not in PROBES:
                await self._turnstile.enter()
            self._identify(context, headers, is_public=asked in self._public_paths)
            # HEAD is answered like GET; the HTTP server leaves out the body.
            get_scope = scope if scope["method"] != "HEAD" else {**scope, "method": "GET"}
            await self._app(get_scope, context.receive, context.respond)
        except ClientDisconnect:
            context.status = CLIENT_GONE
        except asyncio.CancelledError:  # the server stops while the client is still sending or reading
            if not self._service.draining:
                raise
            if not context.status:
                error = unavailable("The server is shutting down.", "shutting_down")
                await error_response(error, context)(scope, context.receive, context.respond)
        except Exception as failure:
            if context.status not in (0, CLIENT_GONE):
                raise
            # In a local variable, the error would keep itself, and through its traceback all of the body.
            response = error_response(to_api_error(failure, context.request_id), context)
            await response(scope, context.receive, context.respond)
        finally:
            context.release()
            context.leave_account()
            seconds = time.monotonic() - context.arrival
            self._service.leave(context, seconds)
            _log(context, seconds)
            context.generation = None  # they refer to each other, and a large one would wait for the garbage collector

    def _identify(self, context: RequestContext, headers: Headers, *, is_public: bool) -> None:
        """Note the request's client; raise `ApiError` 401 if it needs a key and has none."""
        keys, fair = self._service.keys, self._service.config.fair_scheduling
        if keys.guards and not is_public:
            context.account = _account_of(headers, context.scope.get(BATCH_OWNER), keys)
            context.owner = context.account.owner
            context.cache_owner = context.owner if self._service.config.isolate_cache_by_key else ""
        if len(keys.accounts) > 1 if fair is None else fair:
            context.client = context.owner or _network_of(context.scope)


def _account_of(headers: Headers, batch_owner: str | None, keys: KeyRing) -> Account:
    """Return the account of the request's key, or of its batch; raise `ApiError` 401 without a valid one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    given = [text.encode("latin-1") for text in (bearer, headers.get("x-api-key")) if text]
    account = keys.find(given, batch_owner)
    if account is None:
        message = "This server needs a valid API key, as `Authorization: Bearer KEY` or `x-api-key: KEY`."
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return account


def _network_of(scope: Scope) -> str:
    """Name the client by its address (of IPv6, the half that a host cannot choose itself); "" for a Unix socket."""
    host = scope["client"][0].partition("%")[0] if scope.get("client") else ""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _log(context: RequestContext, seconds: float) -> None:
    """Log a request that has ended, without its prompt."""
    level = logging.DEBUG if context.path in PROBES else logging.INFO
    if not logger.isEnabledFor(level):
        return
    method, status, request_id = context.scope["method"], context.status, context.request_id
    path = repr(context.scope["path"][:MAX_ECHO].encode("ascii", "backslashreplace").decode())[1:-1]
    fields: dict[str, Any] = {"method": method, "path": path, "status": status, "id": request_id}
    text = ""
    if context.generation is not None:
        progress = context.generation.log_fields()
        text = "".join(f" {kind}_tokens={count}" for kind, count in progress["tokens"].items())
        text += "".join(f" {name}={value:.3f}" for name, value in progress.items() if name != "tokens")
        fields |= progress
    fields["seconds"] = round(seconds, 6)
    line = "%s %s %d id=%s%s seconds=%.3f"
    logger.log(level, line, method, path, status, request_id, text, seconds, extra={"fields": fields})
