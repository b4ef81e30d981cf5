"""What tests read in HTTP answers."""

from __future__ import annotations

from typing import Any

import httpx

from pyllm.server.api.fields import ErrorAnswer, ErrorBody


def error_of(response: httpx.Response) -> ErrorBody:
    """Return the error of a failed request, in the format that every failure has."""
    return ErrorAnswer.model_validate_json(response.content).error


def close(a: Any, b: Any) -> bool:
    """Equality, but of numbers up to what another batch may change in FP32."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-3 + 1e-3 * abs(a)
    return bool(a == b)
