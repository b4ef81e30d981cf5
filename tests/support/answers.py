"""What tests read in HTTP answers."""

from __future__ import annotations

import httpx

from pyllm.server.api.fields import ErrorAnswer, ErrorBody


def error_of(response: httpx.Response) -> ErrorBody:
    """Return the error of a failed request, in the format that every failure has."""
    return ErrorAnswer.model_validate_json(response.content).error
