"""Retry a failed step by bisection to isolate the failing requests.

Computing a step again changes nothing: blocks are written with what they already hold, a draw depends on its seed and
position alone, and what is read of a prompt is read once. So the step's sequences are halved until those that fail are
alone. Each retry ends at least one request or finds that the engine itself has failed, so retries come to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..messages import EngineRequest, SamplingParams
from .request import Request
from .runner import SampledToken
from .scheduler import ScheduledSequence

Execute = Callable[[Sequence[ScheduledSequence]], list[SampledToken]]


class RetryResult(NamedTuple):
    """The sequences that were computed, what they drew, in order, and the requests that failed."""

    sequences: list[ScheduledSequence]
    sampled: list[SampledToken]
    failed: list[tuple[Request, Exception]]


def retry_by_halves(execute: Execute, sequences: list[ScheduledSequence], error: Exception) -> RetryResult:
    """Compute a step that failed with `error` in parts; raise `error` if the engine cannot compute anything."""
    result = RetryResult([], [], [])
    if len(sequences) == 1:  # the failure may have been temporary
        _try(execute, sequences, result)
    else:
        _try_halves(execute, sequences, error, result)
    if result.failed and not result.sequences:
        try:
            execute([_harmless(sequences[-1])])
        except Exception:
            raise error from None
    return result


def _try_halves(execute: Execute, sequences: list[ScheduledSequence], error: Exception, result: RetryResult) -> None:
    """Compute the halves of sequences that failed together."""
    if len(sequences) == 1:
        result.failed.append((sequences[0].request, error))
        return
    middle = len(sequences) // 2
    for half in (sequences[:middle], sequences[middle:]):
        if half:
            _try(execute, half, result)


def _try(execute: Execute, sequences: list[ScheduledSequence], result: RetryResult) -> None:
    """Compute sequences together, or by halves if that fails."""
    try:
        sampled = execute(sequences)
    except Exception as error:
        _try_halves(execute, sequences, error, result)
    else:
        result.sequences.extend(sequences)
        result.sampled.extend(sampled)


def _harmless(sequence: ScheduledSequence) -> ScheduledSequence:
    """Make a minimal sequence in the last block of a failed one, which no other request shares."""
    params = SamplingParams(temperature=0.0, seed=0)
    request = Request.from_message(EngineRequest(request_id="harmless", prompt_token_ids=[0], params=params))
    request.block_ids = sequence.request.block_ids[-1:]
    return ScheduledSequence(request, 1, True)
