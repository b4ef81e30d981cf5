"""One HTTP request while it is answered: made by the middleware, read by everything above it."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from .budget import BodyBudget, Reservation

ANTHROPIC_ROUTES = "/v1/messages"
"""This route and those below it speak Anthropic's API."""
CLIENT_GONE = 499
"""The status of a request whose client left before its answer."""
current_request: ContextVar[str] = ContextVar("current_request", default="-")
"""The id of the request that is being answered, for the log lines about its failures."""
_KEY = "pyllm.context"


class GenerationProgress(Protocol):
    """What the connection and the log read of a request's generation."""

    @property
    def unread(self) -> int:
        """Output tokens that a slow client has not taken yet."""

    def log_fields(self) -> dict[str, Any]:
        """Token counts as `tokens`, and seconds to the events that have happened."""


@dataclass(slots=True, kw_only=True, eq=False)
class RequestContext:
    """Everything that is known of a request beside its body."""

    scope: Scope
    client_receive: Receive
    send: Send  # past all middleware, for the events of a stream
    path: str  # without the prefix that a proxy may leave there
    request_id: str
    budget: BodyBudget
    arrival: float = field(default_factory=time.monotonic)
    status: int = 0  # of the answer; 0 before its head is sent
    complete: bool = False  # the whole answer is sent
    owner: str = ""  # a name for the API key, which does not reveal it
    cache_owner: str = ""  # the only owner to share cached prompts with; "" for all
    model: str | None = None  # the name that the body asks for
    generation: GenerationProgress | None = None
    reservation: Reservation | None = None

    def __post_init__(self) -> None:
        self.scope[_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> RequestContext:
        """Return the context of a request that the middleware has seen."""
        context: RequestContext = scope[_KEY]
        return context

    @classmethod
    def find(cls, scope: Scope) -> RequestContext | None:
        """Return the context of a request, which the middleware may not have seen yet."""
        return scope.get(_KEY)

    @property
    def is_anthropic(self) -> bool:
        """Whether the request is for Anthropic's routes."""
        return self.path == ANTHROPIC_ROUTES or self.path.startswith(ANTHROPIC_ROUTES + "/")

    async def receive(self) -> Message:
        """Receive the next message, and note when the client has left."""
        message = await self.client_receive()
        # After a complete answer the server says the same of a client that is still there.
        if message["type"] == "http.disconnect" and not self.complete:
            self.status = CLIENT_GONE
        return message

    async def respond(self, message: Message) -> None:
        """Send a part of the answer, its head with the request's id."""
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self.is_anthropic:
                headers["request-id"] = self.request_id
        await self.send(message)

    async def reserve(self, size: int) -> None:
        """Reserve bytes of the body budget, once; raises `EngineBusyError`."""
        if self.reservation is None:
            self.reservation = await self.budget.reserve(size)

    def release(self) -> None:
        """Release the reservation, if there is one; may be called again."""
        if self.reservation is not None:
            self.reservation.release()
