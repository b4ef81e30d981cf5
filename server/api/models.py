"""The models endpoint: lists the served model under each of its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI
from starlette.responses import Response

from ..chat.served_model import ServedModel
from ..http.errors import JsonResponse
from .types import StrictModel


class ModelCard(StrictModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(StrictModel):
    """Response body of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


def add_model_routes(app: FastAPI, ready_model: Callable[[], ServedModel]) -> None:
    """Add the routes; `ready_model` returns the model or raises `ApiError`."""

    def card(model: ServedModel, name: str) -> dict[str, Any]:
        length = model.engine.info.config.max_model_len
        return {"id": name, "object": "model", "created": model.created, "owned_by": "pyllm", "max_model_len": length}

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """The served model under each of its names."""
        model = ready_model()
        return JsonResponse({"object": "list", "data": [card(model, name) for name in model.names]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def get_model(name: str) -> Response:
        """One served model; a name may contain slashes."""
        model = ready_model()
        return JsonResponse(card(model, model.resolve_name(name)))
