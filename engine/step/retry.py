"""Retry a failed step by bisection to isolate the failing requests.

Recomputing a step changes nothing: blocks are overwritten with the same contents, a draw depends on its seed and
position alone, and a prompt's hidden states are read only once. So the step is halved until the sequences that fail are
alone. Each retry ends at least one request or finds that the engine itself has failed, so retries come to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..messages import EngineRequest, SamplingParams
from .request import Request, SampledToken, ScheduledSequence

Execute = Callable[[Sequence[ScheduledSequence]], list[SampledToken]]


class RetryResult(NamedTuple):
    """The computed sequences, their drawn tokens in order, and the requests that failed."""

    sequences: list[ScheduledSequence]
    sampled: list[SampledToken]
    failed: list[tuple[Request, Exception]]


def retry_by_halves(execute: Execute, sequences: list[ScheduledSequence], error: Exception) -> RetryResult:
    """Compute a step that failed with `error` in parts; raise `error` if the engine cannot compute anything."""
    result = RetryResult([], [], [])
    # A single sequence is tried again: the failure may have been temporary.
    parts = [sequences] if len(sequences) == 1 else _halves(sequences)
    while parts:
        part = parts.pop()
        try:
            sampled = execute(part)
        except Exception as fault:
            if len(part) == 1:
                result.failed.append((part[0].request, fault))
            parts += _halves(part)
        else:
            result.sequences.extend(part)
            result.sampled.extend(sampled)
    if result.failed and not result.sequences:
        try:
            execute([_harmless(sequences[-1])])
        except Exception:
            raise error from None
    return result


def _halves(sequences: list[ScheduledSequence]) -> list[list[ScheduledSequence]]:
    """Return the halves of two or more sequences, the first half last."""
    middle = len(sequences) // 2
    return [sequences[middle:], sequences[:middle]] if middle else []


def _harmless(sequence: ScheduledSequence) -> ScheduledSequence:
    """Make a minimal sequence in the last block of a failed one, which no other request shares."""
    params = SamplingParams(temperature=0.0, seed=0)
    request = Request(EngineRequest(request_id="harmless", prompt_token_ids=[0], params=params))
    request.block_ids = sequence.request.block_ids[-1:]
    return ScheduledSequence(request, 1, True)
