"""One HTTP request while it is answered: made by the middleware, read by all that answers it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from .budget import BodyBudget, Reservation

ANTHROPIC_ROUTES = "/v1/messages"
"""This route and those below it speak Anthropic's API."""
CLIENT_GONE = 499
"""The status of a request whose client left before the whole answer was sent."""
CONTEXT = "pyllm.context"
"""The member of an ASGI scope that holds the context."""


class GenerationProgress(Protocol):
    """What the connection and the log read of a request's generation."""

    @property
    def unread(self) -> int: ...  # tokens that a slow client has not taken yet

    def log_fields(self) -> dict[str, Any]: ...  # token counts as `tokens`, and seconds until some events


@dataclass(slots=True, eq=False)
class RequestContext:
    """Everything known about a request except its body."""

    scope: Scope
    client_receive: Receive
    send: Send  # to the client, past all layers: for the events of a stream
    path: str  # without the prefix that a proxy may have left
    request_id: str
    budget: BodyBudget
    arrival: float = field(default_factory=time.monotonic)
    status: int = 0  # of the answer; 0 before its head is sent
    complete: bool = False  # the whole answer is sent
    owner: str = ""  # names the API key without revealing it
    cache_owner: str = ""  # shares cached prompts with this owner only; "" with all
    model: str | None = None  # as the body names it
    generation: GenerationProgress | None = None
    reservation: Reservation | None = None

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
        # After a whole answer the server sends the same, although the client is still there.
        if message["type"] == "http.disconnect" and not self.complete:
            self.status = CLIENT_GONE
        return message

    async def respond(self, message: Message) -> None:
        """Send a part of the answer; its head gets the request id."""
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self.is_anthropic:
                headers["request-id"] = self.request_id
        await self.send(message)

    async def reserve(self, size: int) -> None:
        """Reserve bytes of the body budget, once per request; raise `EngineBusyError` if none get free in time."""
        if self.reservation is None:
            self.reservation = await self.budget.reserve(size)

    def release(self) -> None:
        """Release the reservation, if there is one; may be called again."""
        if self.reservation is not None:
            self.reservation.release()
