"""What routers ask a server: its limits, its model, and whether it still generates; in SGLang's shapes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from starlette.responses import Response

from ... import __version__
from ...engine.client.async_engine import AsyncEngine
from ...engine.client.output_processor import RequestStream
from ...engine.errors import EngineBusyError, EngineDeadError
from ...engine.messages import SamplingParams
from ..chat.served_model import ServedModel
from ..http.errors import JsonResponse, unavailable
from ..http.middleware import RequestContext
from .types import StrictModel

PROBE_SECONDS = 20.0  # within which a step must end
LOOK_SECONDS = 0.05  # between two looks at a busy engine


class ServerInfo(StrictModel):
    """Response body of `GET /server_info`."""

    version: str
    status: Literal["ready"]
    model_path: str
    served_model_name: str
    device: str
    dtype: str
    kv_cache_dtype: str
    context_length: int
    page_size: int
    max_total_num_tokens: int
    max_running_requests: int
    max_queued_requests: int
    tp_size: int
    dp_size: int


class ModelInfo(StrictModel):
    """Response body of `GET /get_model_info`."""

    model_path: str
    tokenizer_path: str
    is_generation: bool
    preferred_sampling_params: dict[str, Any] | None


class Health(StrictModel):
    """Response body of `GET /health_generate`."""

    status: Literal["ok"]


def add_info_routes(app: FastAPI, ready_model: Callable[[], ServedModel]) -> None:
    """Add the routes; `ready_model` returns the model or raises `ApiError`."""

    @app.get("/server_info", response_model=ServerInfo)
    async def server_info() -> Response:
        """The server's limits, with SGLang's names. Paths of the machine are not shown."""
        model = ready_model()
        info, config = model.engine.info, model.engine.info.config
        return JsonResponse(
            {
                "version": __version__, "status": "ready",
                "model_path": model.names[0], "served_model_name": model.names[0],
                "device": config.device, "dtype": config.dtype, "kv_cache_dtype": config.kv_cache_dtype,
                "context_length": config.max_model_len, "page_size": config.block_size,
                "max_total_num_tokens": info.kv_capacity_tokens, "max_running_requests": config.max_num_seqs,
                "max_queued_requests": config.max_num_queued_reqs, "tp_size": 1, "dp_size": 1,
            }
        )  # fmt: skip

    @app.get("/get_model_info", response_model=ModelInfo)
    async def get_model_info() -> Response:
        """The served model, with SGLang's names."""
        model = ready_model()
        return JsonResponse(
            {"model_path": model.names[0], "tokenizer_path": model.names[0], "is_generation": True}
            | {"preferred_sampling_params": model.defaults or None}
        )

    @app.get("/health_generate", response_model=Health)
    async def health_generate(request: Request) -> Response:
        """Whether the engine still computes: it generates one token, or is computing for other requests."""
        await _see_a_step(ready_model().engine, RequestContext.of(request.scope))
        return JsonResponse({"status": "ok"})


async def _see_a_step(engine: AsyncEngine, context: RequestContext) -> None:
    """Return after the next step of the engine, which one token is requested for; raise `ApiError` 503 if none ends."""
    before, stream = engine.stats, None
    with contextlib.suppress(EngineBusyError):  # then it has enough to compute
        token = min(engine.info.eos_token_ids, default=0)
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        stream = engine.submit(f"{context.request_id}-probe", [token], params, client=context.client)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await _wait(engine, before, stream)
    except EngineDeadError:
        raise unavailable("The engine has stopped.", "engine_dead") from None
    except TimeoutError:
        message = f"The engine has computed nothing for {PROBE_SECONDS:g} seconds."
        raise unavailable(message, "engine_stuck") from None
    finally:
        if stream is not None:
            stream.abort()


async def _wait(engine: AsyncEngine, before: object, stream: RequestStream | None) -> None:
    while True:
        if stream is not None and stream.drain():
            return
        if not engine.is_alive:
            raise EngineDeadError(engine.error or "")
        if engine.stats is not before and engine.stats.step_tokens:
            return
        await asyncio.sleep(LOOK_SECONDS)
