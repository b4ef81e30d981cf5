"""The routes, and the state that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from .. import __version__
from .api.chat.route import create_chat_completion
from .api.chat.wire import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from .api.completions.route import create_completion
from .api.completions.wire import Completion, CompletionRequest
from .api.embeddings import EmbeddingList, EmbeddingRequest, create_embedding
from .api.fields import ErrorAnswer
from .api.messages.route import count_tokens, create_message
from .api.messages.wire import (
    CountTokensRequest,
    MessageAnswer,
    MessageEvent,
    MessagesError,
    MessagesRequest,
    TokenCount,
)
from .api.models import add_model_routes
from .api.pages import add_page_routes
from .api.responses.route import create_response
from .api.responses.store import ResponseStore, add_store_routes
from .api.responses.wire import ResponseEvent, ResponseObject, ResponseRequest
from .api.tokenize.route import detokenize, tokenize
from .api.tokenize.wire import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from .flags import ServerConfig
from .generation.served_model import ServedModel
from .generation.tracing import Tracing
from .http.body import BodyRoom, read_body
from .http.errors import ApiError, JsonResponse, error_response, to_api_error, unavailable
from .http.middleware import RequestMiddleware

REFERENCE = "#/components/schemas/{model}"


@dataclass(slots=True)
class Service:
    """What the routes share.

    Attributes:
        model: None until it is loaded.
        tracing: None unless asked for.
        restarting: "waiting" before, and "loading" while a new engine takes the place of a dead one; else "".
        draining: no new work is taken, since the server is about to end.
        in_flight: HTTP requests that have not ended.
        idle: set while there is none.
    """

    config: ServerConfig
    model: ServedModel | None = None
    tracing: Tracing | None = None
    restarting: Literal["", "waiting", "loading"] = ""
    draining: bool = False
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def enter(self) -> None:
        """Count a request in."""
        self.in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """Count a request out."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()

    @property
    def alive(self) -> bool:
        """Whether there is an engine that works, or is being loaded."""
        return self.model is None or self.model.engine.is_alive or self.restarting == "loading"

    def ready_model(self) -> ServedModel:
        """The model; raise `ApiError` 503 while none can take requests."""
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down")
        if self.model is None:
            raise unavailable("The model is still loading.", "loading")
        if self.restarting:
            raise unavailable("The engine has stopped and is being started again.", "engine_restarting")
        if not self.alive:
            raise unavailable("The engine has stopped and cannot serve requests.", "engine_dead")
        return self.model


def create_app(service: Service) -> FastAPI:
    """The ASGI application around `service`."""
    app = FastAPI(
        title="PyLLM", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )  # fmt: skip
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestMiddleware, service=service)
    if service.config.allowed_origins:
        app.add_middleware(
            _Cors,
            allow_origins=service.config.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id"],
        )
    _add_state_routes(app, service)
    add_model_routes(app, service.ready_model)
    add_page_routes(app)
    app.state.body_room = BodyRoom(seconds=service.config.body_timeout)
    app.state.responses = ResponseStore()
    add_store_routes(app, app.state.responses)
    for endpoint in ENDPOINTS:
        _add_endpoint(app, service, endpoint)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class _Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        """As the library's; a refusal in our shape."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = "Pages of this origin may not call this server: see --allowed-origins."
        refusal = error_response(ApiError(response.status_code, message, code="cors"), {"path": ""})
        refusal.headers.update({name: value for name, value in response.headers.items() if name == "vary"})
        return refusal


async def _http_error(request: Request, error: Exception) -> Response:
    return error_response(to_api_error(error), request.scope)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine lives, or is still loading."""
        if not service.alive:
            raise unavailable("The engine has stopped.", "engine_dead")
        return JsonResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken now."""
        service.ready_model()
        return JsonResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> Response:
        """The server's version."""
        return JsonResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        text = service.model.metrics.exposition() if service.model else b""
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A route that takes a JSON body.

    Attributes:
        handle: answers a checked body, whose `model` is the name to answer with; its docstring describes the route.
        answer: the model of a whole answer, for the OpenAPI page.
        chunk: the model of one event of a stream, where there is one.
        error: the model of a failure.
    """

    path: str
    body: type[BaseModel]
    handle: Callable[[Request, Any, ServedModel], Awaitable[Response]]
    answer: type[BaseModel]
    chunk: type[BaseModel] | None = None
    error: type[BaseModel] = ErrorAnswer


ENDPOINTS = (
    Endpoint(
        path="/v1/chat/completions", body=ChatCompletionRequest, handle=create_chat_completion,
        answer=ChatCompletion, chunk=ChatCompletionChunk,
    ),
    Endpoint(
        path="/v1/responses", body=ResponseRequest, handle=create_response, answer=ResponseObject, chunk=ResponseEvent
    ),
    Endpoint(
        path="/v1/completions", body=CompletionRequest, handle=create_completion, answer=Completion, chunk=Completion
    ),
    Endpoint(path="/v1/embeddings", body=EmbeddingRequest, handle=create_embedding, answer=EmbeddingList),
    Endpoint(path="/tokenize", body=TokenizeRequest, handle=tokenize, answer=TokenizeAnswer),
    Endpoint(path="/detokenize", body=DetokenizeRequest, handle=detokenize, answer=DetokenizeAnswer),
    Endpoint(
        path="/v1/messages", body=MessagesRequest, handle=create_message, answer=MessageAnswer, chunk=MessageEvent,
        error=MessagesError,
    ),
    Endpoint(
        path="/v1/messages/count_tokens", body=CountTokensRequest, handle=count_tokens, answer=TokenCount,
        error=MessagesError,
    ),
)  # fmt: skip
"""Every route that generates or counts, with its body and its answer."""


def _add_endpoint(app: FastAPI, service: Service, endpoint: Endpoint) -> None:
    async def route(request: Request) -> Response:
        model = service.ready_model()
        body: Any = await read_body(request, endpoint.body)
        request.state.model = body.model
        try:
            body.model = model.check_name(body.model)
            return await endpoint.handle(request, body, model)
        finally:
            request.state.place.leave()

    # The route reads the body itself, so that FastAPI knows nothing of its shape.
    reference = {"$ref": REFERENCE.format(model=endpoint.body.__name__)}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
    if endpoint.chunk is not None:
        chunk = {"$ref": REFERENCE.format(model=endpoint.chunk.__name__)}
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
        event = {"type": "object", "description": "One event, if `stream` is true.", "properties": {
            "event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, data]}}}  # fmt: skip
        extra["responses"] = {"200": {"content": {"text/event-stream": {"schema": event}}}}
    name = endpoint.handle.__name__
    app.add_api_route(
        endpoint.path, route, methods=["POST"], response_model=endpoint.answer, openapi_extra=extra,
        name=name, operation_id=name, description=endpoint.handle.__doc__,
        responses={"4XX": {"model": endpoint.error}, "5XX": {"model": endpoint.error}},
    )  # fmt: skip


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page, and the models of the bodies, which it does not see since the routes read them themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = {e.body for e in ENDPOINTS} | {e.chunk for e in ENDPOINTS if e.chunk is not None}
        ordered = sorted(models, key=lambda model: model.__name__)
        _, extra = models_json_schema([(m, "validation") for m in ordered], ref_template=REFERENCE)
        schema["components"]["schemas"] |= extra["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
