"""What the engine says of a request after a step."""

from __future__ import annotations

from ..messages import EngineRequest, TokenOutput
from .request import Request
from .runner import SampledToken


def output_of(request: Request, draws: list[SampledToken]) -> TokenOutput:
    """What the request's new tokens, which it has taken already, add to its answer."""
    last = draws[-1].token_id
    by_stop_id = request.finish_reason == "stop" and last in request.stop_token_ids
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[draw.token_id for draw in draws],
        logprobs=[draw.logprobs for draw in draws if draw.logprobs is not None],
        finish_reason=request.finish_reason,
        stop_token_id=last if by_stop_id else None,
        num_cached_tokens=request.num_cached_tokens,
        scheduled_time=request.scheduled_time,
        prompt_logprobs=request.prompt_logprobs,
        dynamics=[draw.dynamics for draw in draws if draw.dynamics is not None],
    )


def failure_of(request: Request | EngineRequest, error: str, *, refused: bool = True) -> TokenOutput:
    """The end of a request; `refused` is for what it has brought upon itself, and may know."""
    return TokenOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error=error, refused=refused)
