"""What the engine reports about a request after a step."""

from __future__ import annotations

from ..errors import RequestError, describe
from ..messages import CheckGrammar, EngineRequest, GrammarVerdict, TokenOutput
from .request import Request
from .runner import SampledToken


def output_of(request: Request, draws: list[SampledToken]) -> TokenOutput:
    """Report the new tokens of a request, and what was read of its prompt."""
    last = draws[-1].token_id if draws else None
    by_stop_id = request.finish_reason == "stop" and last in request.stop_token_ids
    pooled = request.pooled
    if pooled is not None and request.pooling == "mean":
        pooled = pooled / request.num_prompt_tokens
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
        embedding=None if pooled is None else pooled.tolist(),
    )


def failure_of(request: Request | EngineRequest, error: Exception) -> TokenOutput:
    """End a request; the client sees the message of a `RequestError`, and only the log any other error."""
    refused = isinstance(error, RequestError)
    text = str(error) if refused else describe(error)
    return TokenOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error=text, refused=refused)


def verdict_of(check: CheckGrammar, result: object) -> GrammarVerdict:
    """Report what the compiler returned for a grammar."""
    match result:
        case RequestError():
            return GrammarVerdict(key=check.key, outcome="refused", reason=str(result))
        case TimeoutError():
            return GrammarVerdict(key=check.key, outcome="busy", reason=str(result))
        case Exception():
            return GrammarVerdict(key=check.key, outcome="failed", reason=describe(result))
    return GrammarVerdict(key=check.key, outcome="accepted")
