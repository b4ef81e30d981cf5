"""The interface of the code that computes the engine core's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from .request import SampledToken, ScheduledSequence

LaunchedStep = Callable[[], list[SampledToken]]
"""Waits for a step being computed; returns a sampled token for each sequence that samples, in order."""


class Runner(Protocol):
    """Computes steps: the model runner, or a mock without weights."""

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return a sampled token for each sequence that samples, in order."""

    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """Begin a step after the one in flight, whose draws replace the pending tokens."""

    def release_cached_memory(self) -> None:
        """Return memory that is only kept for reuse to the device."""


class StepObserver(Protocol):
    """Sees each layer of each step, and counts the tokens that each expert has computed."""

    on_layer: Callable[[], None] | None  # called after each layer of a step

    def count(self) -> tuple[list[list[int]], list[int]]:
        """Return each layer's tokens by expert, and by layer the tokens that mu rerouted; empty without experts."""
