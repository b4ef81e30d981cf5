"""A step that failed, once more in parts: who of its sequences is to blame, and what the others get.

To compute a step again changes nothing: pages are written with what they hold already, a draw hangs on its seed and
position alone, and what is read of a prompt is read once. So the step's sequences are halved until those that fail
stand alone. Each such trial ends at least one request or finds the engine itself at fault, so failures come to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..messages import EngineRequest, SamplingParams
from .request import Request
from .runner import SampledToken
from .scheduler import ScheduledSequence

Execute = Callable[[Sequence[ScheduledSequence]], list[SampledToken]]


class Apart(NamedTuple):
    """A step in parts: the sequences that were computed, what they drew, in order, and the others."""

    sequences: list[ScheduledSequence]
    sampled: list[SampledToken]
    failed: list[tuple[Request, Exception]]


def run_apart(execute: Execute, sequences: list[ScheduledSequence], error: Exception) -> Apart:
    """Compute a step that failed with `error` in parts; raise `error` if the engine can compute nothing any more."""
    apart = Apart([], [], [])
    if len(sequences) == 1:  # it may have been bad luck
        _try(execute, sequences, apart)
    else:
        _try_halves(execute, sequences, error, apart)
    if apart.failed and not apart.sequences:
        try:
            execute([_harmless(sequences[-1])])
        except Exception:
            raise error from None
    return apart


def _try_halves(execute: Execute, sequences: list[ScheduledSequence], error: Exception, apart: Apart) -> None:
    """Compute the halves of sequences that failed together."""
    if len(sequences) == 1:
        apart.failed.append((sequences[0].request, error))
        return
    middle = len(sequences) // 2
    for half in (sequences[:middle], sequences[middle:]):
        if half:
            _try(execute, half, apart)


def _try(execute: Execute, sequences: list[ScheduledSequence], apart: Apart) -> None:
    """Compute sequences together, or those apart that it can be done for."""
    try:
        sampled = execute(sequences)
    except Exception as error:
        _try_halves(execute, sequences, error, apart)
    else:
        apart.sequences.extend(sequences)
        apart.sampled.extend(sampled)


def _harmless(sequence: ScheduledSequence) -> ScheduledSequence:
    """A sequence that asks for nothing, in the last page of one that has failed, which nobody else holds."""
    params = SamplingParams(temperature=0.0, seed=0)
    request = Request(EngineRequest(request_id="harmless", prompt_token_ids=[0], params=params), ())
    request.block_ids = sequence.request.block_ids[-1:]
    return ScheduledSequence(request, 1, True)
