"""The one place where failures become HTTP answers, always in OpenAI's shape, to which Anthropic's adds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...engine.errors import EngineBusyError, EngineDeadError, RequestError
from .context import RequestContext, current_request

logger = logging.getLogger("pyllm.server")

encode_json = msgspec.json.Encoder().encode
"""Without checks, for the shapes are ours; NaN and infinities, which JSON lacks, become null."""
MAX_ECHO = 200
"""Characters of the client's own input that a message repeats at most."""
RETRY_AFTER_SECONDS = 5
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""What Anthropic calls errors of a status; of the others it is invalid_request_error or api_error."""


class ApiError(Exception):
    """A failure with its HTTP status and the members of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object, as it stands in a body or in a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode `content`."""
        return encode_json(content)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 that tells the client when to come back."""
    return ApiError(503, message, code=code, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


def shorten(text: str) -> str:
    """Cut the client's own words to what a message may repeat."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"


def to_api_error(error: Exception) -> ApiError:
    """Map any failure; what is not known is a 500 that says nothing of the inside, and is logged with its traceback."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code or "invalid_value")
        case EngineBusyError():
            return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)})
        case EngineDeadError():
            return unavailable("The engine has stopped, so this request cannot be finished.", "engine_dead")
        case HTTPException(status_code=404):
            return ApiError(404, "There is no such route.", code="unknown_url")
        case HTTPException(status_code=405):
            return ApiError(405, "This route has no such method.", code="method_not_allowed", headers=error.headers)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("A request failed inside the server. id=%s", current_request.get(), exc_info=error)
    return ApiError(500, "The server failed to answer this request.", code="internal_error")


def anthropic_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """The error object as Anthropic's clients read it; it has all that OpenAI's has."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": error.body["error"] | {"type": kind}, "request_id": request_id}


def error_response(error: ApiError, context: RequestContext | None = None) -> JsonResponse:
    """Make the whole HTTP answer for a failed request."""
    body = anthropic_error(error, context.request_id) if context and context.is_anthropic else error.body
    return JsonResponse(body, status_code=error.status, headers=error.headers)
