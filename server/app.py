"""The routes, and the state that they share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from .body import read_body
from .chat import create_chat_completion
from .completions import create_completion
from .config import ServerConfig
from .errors import JsonResponse, error_response, to_api_error, unavailable
from .middleware import RequestMiddleware
from .protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
)
from .served_model import ServedModel

REFERENCE = "#/components/schemas/{model}"


@dataclass(slots=True)
class Service:
    """What the routes share.

    Attributes:
        model: None until it is loaded.
        draining: no new work is taken, since the server is about to end.
        in_flight: HTTP requests that have not ended.
        idle: set while there is none.
    """

    config: ServerConfig
    model: ServedModel | None = None
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
        """False once the engine has died."""
        return self.model is None or self.model.engine.is_alive

    def ready_model(self) -> ServedModel:
        """The model; raise `ApiError` 503 while none can take requests."""
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down")
        if self.model is None:
            raise unavailable("The model is still loading.", "loading")
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
            CORSMiddleware,
            allow_origins=service.config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    _add_state_routes(app, service)
    _add_model_routes(app, service)
    _add_generation_routes(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _http_error(_: Request, error: Exception) -> Response:
    return error_response(to_api_error(error))


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

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        text = service.model.metrics.exposition() if service.model else b""
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


def _add_model_routes(app: FastAPI, service: Service) -> None:
    def card(model: ServedModel, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "pyllm",
            "max_model_len": model.engine.info.max_model_len,
        }

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """The served model under each of its names."""
        model = service.ready_model()
        return JsonResponse({"object": "list", "data": [card(model, name) for name in model.names]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def get_model(name: str) -> Response:
        """One served model; a name may contain slashes."""
        model = service.ready_model()
        return JsonResponse(card(model, model.check_name(name)))


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    keep_alive = service.config.sse_keep_alive_interval

    def described(body: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
        """The OpenAPI of a body that the route reads itself, and of its stream."""
        reference = {"$ref": REFERENCE.format(model=body.__name__)}
        stream = {"schema": {"type": "string", "description": f"Events of {chunk.__name__} objects, then [DONE]."}}
        return {
            "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
            "responses": {"200": {"content": {"text/event-stream": stream}}},
        }

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        openapi_extra=described(ChatCompletionRequest, ChatCompletionChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        model = service.ready_model()
        body = await read_body(request, ChatCompletionRequest)
        return await create_chat_completion(request, body, model, keep_alive)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        openapi_extra=described(CompletionRequest, Completion),
    )
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        model = service.ready_model()
        body = await read_body(request, CompletionRequest)
        return await create_completion(request, body, model, keep_alive)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page, and the models of the bodies, which it does not see since the routes read them themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models: list[type[BaseModel]] = [ChatCompletionRequest, CompletionRequest, ChatCompletionChunk]
        _, extra = models_json_schema([(m, "validation") for m in models], ref_template=REFERENCE)
        schema["components"]["schemas"] |= extra["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
