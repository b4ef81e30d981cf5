"""The ASGI application: every route, from one table of endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Route

from .. import __version__
from .api.batches.route import add_batch_routes
from .api.batches.wire import BatchRequest
from .api.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest, create_chat_completion
from .api.completions import Completion, CompletionRequest, create_completion
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
from .api.openapi import REFERENCE, write_document
from .api.pages import PAGE_PATHS, add_base_route, add_page_routes, methods_of
from .api.responses.route import create_response
from .api.responses.store import add_store_routes
from .api.responses.wire import ResponseEvent, ResponseObject, ResponseRequest
from .api.server_info import add_info_routes
from .api.tokenize import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    add_tokenizer_route,
    detokenize,
    tokenize,
)
from .http.errors import MAX_ECHO, ApiError, JsonResponse, shorten, to_api_error, unavailable
from .http.middleware import RequestContext, RequestMiddleware, error_response
from .service import Endpoint, Service

REFUSED_ORIGIN = "Pages of this origin may not call this server: see --allowed-origins."


def create_app(service: Service) -> FastAPI:
    """Build the ASGI application around `service`."""
    app = FastAPI(
        title="PyLLM", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses=_error_schemas(ErrorAnswer), generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    _add_state_routes(app, service)
    add_model_routes(app, service.ready_model)
    add_tokenizer_route(app, service.ready_model)
    add_info_routes(app, service.ready_model)
    add_batch_routes(app, lambda: service.batches)
    add_page_routes(app)
    add_store_routes(app, service.responses)
    for endpoint in ENDPOINTS:
        _add_endpoint(app, service, endpoint)
    app.openapi = lambda: _document(app, with_batches=bool(service.config.batch_dir))  # type: ignore[method-assign]
    add_base_route(app, [route for route in app.routes if isinstance(route, Route)], service.config.root_path)
    routes = [route for route in app.routes if isinstance(route, Route)]
    app.add_exception_handler(HTTPException, partial(_http_error, routes))
    app.add_middleware(RequestMiddleware, service=service, public_paths=PAGE_PATHS, is_route=partial(_is_route, routes))
    if origins := service.config.allowed_origins:
        app.add_middleware(
            _Cors, allow_origins=origins, allow_methods=["GET", "HEAD", "POST", "DELETE"], allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "x-pyllm-ignored"], allow_private_network=True,
        )  # fmt: skip
    return app


class _Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        """Refuse in OpenAI's error format, and name the refused origin, method or header."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = REFUSED_ORIGIN
        if self.is_allowed_origin(request_headers["origin"]):
            method = shorten(request_headers["access-control-request-method"])
            message = f"Pages may send {', '.join(self.allow_methods)} to this server, but not {method!r}."
        refusal = error_response(ApiError(response.status_code, message, code="cors"))
        refusal.headers.update({name: value for name, value in response.headers.items() if name == "vary"})
        return refusal


def _is_route(routes: Sequence[Route], path: str) -> bool:
    """Whether an endpoint has this path; pages, and names with any slashes, need it to the letter."""
    return any(
        isinstance(route, APIRoute) and ":path}" not in route.path and route.path_regex.match(path) for route in routes
    )


async def _http_error(routes: Sequence[Route], request: Request, error: Exception) -> Response:
    """Answer an unknown route or method with the known ones nearest to it."""
    failure, context = to_api_error(error), RequestContext.of(request.scope)
    if failure.code == "unknown_url":
        failure.message = f"This route does not exist: {_nearest(routes, context.path)}"
    elif failure.code == "method_not_allowed":
        found = {m for r in routes if r.matches(request.scope)[0] is not Match.NONE for m in methods_of(r)}
        allowed = ", ".join(sorted(found))
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            return error_response(ApiError(400, REFUSED_ORIGIN, code="cors"))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        failure.message = f"This route takes {allowed}, but not {shorten(request.method)}."
        failure.headers = {"allow": allowed}
    return error_response(failure, context)


def _nearest(routes: Sequence[Route], path: str) -> str:
    """Hint at the route that a wrong path may mean."""
    path = path[:MAX_ECHO].lower().rstrip("/")
    names = {r.path: f"{'/'.join(methods_of(r)[:1])} {r.path}" for r in routes if "{" not in r.path and r.path[4:]}
    same_end = [name for name in names if path.endswith(name.removeprefix("/v1"))]
    if near := max(same_end, key=len, default="") or next(iter(get_close_matches(path, names, 1, 0.8)), ""):
        return f"did you mean {names[near]}?"
    return "GET /v1 lists those that do."


def _error_schemas(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {"4XX": {"model": model}, "5XX": {"model": model}}


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/ping", name="ping", description="The same as `/health`, under the name that Amazon SageMaker asks for.")
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine is running or loading."""
        if not service.alive:
            raise unavailable("The engine has stopped.", "engine_dead")
        return JsonResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether the server accepts requests now."""
        service.ready_model()
        return JsonResponse({"status": "ready"})

    @app.get("/is_sleeping")
    async def is_sleeping() -> Response:
        """Whether the model is unloaded for a while, as vLLM can do; always false."""
        return JsonResponse({"is_sleeping": False})

    @app.get("/version")
    async def version() -> Response:
        """The server's version."""
        return JsonResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        accounts = service.keys.accounts.values()
        text = service.model.metrics.exposition(service.budget, accounts) if service.model else b""
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions", ChatCompletionRequest, create_chat_completion, ChatCompletion, ChatCompletionChunk
    ),
    Endpoint("/v1/responses", ResponseRequest, create_response, ResponseObject, ResponseEvent, uses_store=True),
    Endpoint("/v1/completions", CompletionRequest, create_completion, Completion, Completion),
    Endpoint("/v1/embeddings", EmbeddingRequest, create_embedding, EmbeddingList),
    Endpoint("/tokenize", TokenizeRequest, tokenize, TokenizeAnswer),
    Endpoint("/detokenize", DetokenizeRequest, detokenize, DetokenizeAnswer),
    Endpoint("/v1/messages", MessagesRequest, create_message, MessageAnswer, MessageEvent, MessagesError),
    Endpoint("/v1/messages/count_tokens", CountTokensRequest, count_tokens, TokenCount, error=MessagesError),
)
"""Every route that generates text or counts tokens."""


def _add_endpoint(app: FastAPI, service: Service, endpoint: Endpoint) -> None:
    # FastAPI does not know the body's schema, because the service reads the body itself.
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
        endpoint.path, partial(service.answer, endpoint), methods=["POST"], response_model=endpoint.answer, name=name,
        description=endpoint.handle.__doc__, openapi_extra=extra,
        responses=_error_schemas(endpoint.error),
    )  # fmt: skip


def _document(app: FastAPI, *, with_batches: bool) -> dict[str, Any]:
    """Return the OpenAPI document, written once."""
    if app.openapi_schema is None:
        models: set[type[BaseModel]] = {BatchRequest, *(e.body for e in ENDPOINTS)}
        models |= {e.chunk for e in ENDPOINTS if e.chunk is not None}
        app.openapi_schema = write_document(app, models, with_batches=with_batches)
    return app.openapi_schema
