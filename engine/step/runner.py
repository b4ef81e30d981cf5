"""What the engine wants of whatever computes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..runner.sampler import SampledToken
from .scheduler import ScheduledSequence


class Launched(Protocol):
    """A step that is being computed."""

    def read(self) -> list[SampledToken]:
        """Wait for it; a sampled token for each sequence that samples, in order."""
        ...


class Runner(Protocol):
    """What computes a step: the model runner, or a stand-in without weights."""

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return a sampled token for each sequence that samples, in order."""
        ...

    def launch(self, sequences: Sequence[ScheduledSequence]) -> Launched:
        """Begin a step behind the last one. Tokens that are awaited by then are taken from that one's draws."""
        ...

    def relieve(self) -> None:
        """Give back memory that is only kept in reserve."""
        ...
