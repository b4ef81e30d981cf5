"""The state that all requests of a server share, and how a request gets from its body to its endpoint's response."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ..engine.errors import RequestError
from .api.batches.store import BatchStore
from .api.fields import ErrorAnswer
from .api.responses.choice import make_store
from .api.responses.store import ResponseStore
from .api.rules import RULES
from .chat.served_model import ServedModel
from .flags import ServerConfig
from .generation.tracing import Tracing
from .http.body import read_body
from .http.budget import MemoryBudget, default_limit
from .http.errors import MAX_ECHO, to_api_error, unavailable
from .http.keys import KeyRing
from .http.middleware import PROBES, RequestContext
from .http.tolerance import Tolerance

logger = logging.getLogger("pyllm.server")

MAX_REPORTED = 1000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route that takes a JSON body."""

    path: str
    body: type[BaseModel]
    handle: Callable[..., Awaitable[Response]]  # answers a checked body; its docstring describes the route
    answer: type[BaseModel]
    chunk: type[BaseModel] | None = None  # one event of a stream
    error: type[BaseModel] = ErrorAnswer
    uses_store: bool = False  # whether `handle` also takes the store of responses


@dataclass(slots=True)
class Service:
    """A running server: its model, its flags and the state that its requests share."""

    config: ServerConfig
    model: ServedModel | None = None  # None until it is loaded
    tracing: Tracing | None = None  # None without --otlp-traces-endpoint
    restarting: Literal["", "waiting", "loading"] = ""
    """After an engine died: "waiting" until the restart, "loading" while the new engine loads."""
    draining: bool = False  # the server is shutting down and refuses new requests
    in_flight: int = 0  # HTTP requests
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # set while there are none
    reported: set[str] = field(default_factory=set)  # ignored fields already named in the log
    batches: BatchStore | None = None  # None without --batch-dir
    keys: KeyRing = field(init=False)
    budget: MemoryBudget = field(init=False)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        self.idle.set()
        limit = self.config.max_api_memory or default_limit()
        # It names the owners of stored data. A batch folder keeps it, so that they find their batches after a restart.
        secret = secrets.token_bytes(32) if self.batches is None else self.batches.secret
        self.keys = KeyRing(self.config.api_key, self.config.api_key_file, secret)
        owner_limit = limit // 2 if len(self.keys.accounts) > 1 else limit
        self.budget = MemoryBudget(limit, owner_limit=owner_limit, upload_seconds=self.config.body_timeout)
        self.responses = make_store(self.config, self.budget)

    def enter(self) -> None:
        """Register a new request."""
        self.in_flight += 1
        self.idle.clear()

    def leave(self, context: RequestContext, seconds: float) -> None:
        """Unregister a finished request, and record it and its `seconds` in the metrics and traces."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()
        if self.model is not None and context.path not in PROBES:
            self.model.metrics.on_response(context.status)
        for name in (ascii(name[:MAX_ECHO])[1:-1] for name in context.ignored):
            if name not in self.reported and len(self.reported) < MAX_REPORTED:
                self.reported.add(name)
                logger.info("A request has the field %s, which has no effect here.", name)
        if self.tracing is not None:
            self.tracing.record(context, seconds)

    @property
    def alive(self) -> bool:
        """Whether the engine is running or loading."""
        return self.model is None or self.model.engine.is_alive or self.restarting == "loading"

    def ready_model(self) -> ServedModel:
        """Return the model; raise `ApiError` 503 while it cannot take requests."""
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down")
        if self.model is None:
            raise unavailable("The model is still loading.", "loading")
        if self.restarting:
            raise unavailable("The engine has stopped and is restarting.", "engine_restarting")
        if not self.alive:
            raise unavailable("The engine has stopped and cannot serve requests.", "engine_dead")
        return self.model

    async def answer(self, endpoint: Endpoint, request: Request) -> Response:
        """Read and check the body of a request, and answer it."""
        model, context = self.ready_model(), RequestContext.of(request.scope)
        try:
            context.admit()
            variables = model.template.variables if model.marks is None else model.switches
            if "chat_template_kwargs" not in endpoint.body.model_fields:
                variables = frozenset()
            tolerance = Tolerance(RULES[endpoint.path], self.config.ignore_unknown_fields, variables)
            body: Any = await read_body(request, endpoint.body, tolerance)
            context.ignored = tolerance.ignored
            context.model = body.model
            if body.model is None:
                body.model = model.names[0]
            elif body.model not in model.names:
                body.model = model.resolve_name(body.model)
            shared = (self.responses,) if endpoint.uses_store else ()
            try:
                return await endpoint.handle(context, body, model, *shared)
            except RequestError as error:
                raise tolerance.renumber(to_api_error(error)) if tolerance.numbers else error from None
        finally:
            context.release_body()
