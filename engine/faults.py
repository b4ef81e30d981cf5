"""Faults on demand, so that tests can see what becomes of everybody else. Nothing here is imported otherwise.

The environment variable `PYLLM_ENGINE_FAULT` names faults as `kind@marker`, with commas between. A fault strikes in
steps with a request whose id has the marker. A client sets it with the header `x-request-id`; ids made here are
hexadecimal, so that a marker must not be, or it would strike anybody.

- `prepare`, `sample`: the step raises before or after all else was computed; `once`: before, the first of them only.
- `take`: taking the request's token raises. `text`: its token has no text, so that making some raises.
- `memory`: an allocation that no machine can satisfy.
- `slow`: each layer takes SLOW_SECONDS. `hang`: the step never ends.
- `broken`: every step raises from now on, whoever is in it.
- `exit`, `crash`: the process ends by itself, or by a signal.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence

import msgspec
import torch

from ..model.network import LayerState
from .messages import StepOutputs
from .runner.expert_stats import ExpertStats
from .step.core import EngineCore
from .step.request import Request
from .step.runner import LaunchedStep, Runner, SampledToken
from .step.scheduler import ScheduledSequence

KINDS = ("prepare", "sample", "once", "take", "text", "memory", "slow", "hang", "broken", "exit", "crash")
SLOW_SECONDS = 0.8
NO_TOKEN = -(1 << 40)
_MADE_UP = re.compile("[0-9a-f#]*")
"""What may be in any request's id: one that is made here, and behind it a # and a number."""


class PlantedError(RuntimeError):
    """Raised on demand."""


def plant(core: EngineCore, text: str) -> None:
    """Let the faults that `text` names strike in the steps of `core`; `ValueError` for what names none."""
    faults = FaultyRunner(core.runner, text)
    core.runner = faults
    step, watch, append = core.step, ExpertStats.__call__, Request.append

    def marked_step() -> StepOutputs:
        outputs = step()
        marked = [
            msgspec.structs.replace(output, token_ids=[NO_TOKEN])
            if faults.strikes("text", output.request_id)
            else output
            for output in outputs.outputs
        ]
        return msgspec.structs.replace(outputs, outputs=marked)

    def slow_watch(self: ExpertStats, state: LayerState) -> None:
        if faults.is_slow:
            time.sleep(SLOW_SECONDS)
        watch(self, state)

    def failing_append(self: Request, token_id: int) -> None:
        append(self, token_id)
        if faults.strikes("take", self.request_id):
            raise PlantedError("take")

    core.step = marked_step  # type: ignore[method-assign]
    ExpertStats.__call__ = slow_watch  # type: ignore[method-assign]
    Request.append = failing_append  # type: ignore[method-assign]


class FaultyRunner:
    """A runner around the real one.

    Attributes:
        is_slow: whether a request is in the step that makes its layers slow.
    """

    def __init__(self, runner: Runner, text: str) -> None:
        self._runner = runner
        self._faults = [fault.split("@") for fault in text.split(",")]
        if not all(len(own) == 2 and own[0] in KINDS and not _MADE_UP.fullmatch(own[1]) for own in self._faults):
            raise ValueError(
                f"PYLLM_ENGINE_FAULT names {text!r}; it takes kind@marker, of the kinds {KINDS}, "
                "and a marker of more than hexadecimal digits and #"
            )
        self._spent = False
        self._broken = False
        self.is_slow = False

    def strikes(self, kind: str, *request_ids: str) -> bool:
        """Whether a fault of that kind is meant for one of the requests."""
        return any(kind == own and marker in name for own, marker in self._faults for name in request_ids)

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """As the real one, but for the faults."""
        self._strike_before(sequences)
        sampled = self._runner.execute(sequences)
        self._strike_after(sequences)
        return sampled

    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """As the real one, but for the faults."""
        self._strike_before(sequences)
        launched = self._runner.launch(sequences)
        self._strike_after(sequences)
        return launched

    def release_cached_memory(self) -> None:
        """As the real one."""
        self._runner.release_cached_memory()

    def _strike_before(self, sequences: Sequence[ScheduledSequence]) -> None:
        names = [sequence.request.request_id for sequence in sequences]
        self.is_slow = self.strikes("slow", *names)
        if self.strikes("prepare", *names):
            raise PlantedError("prepare")
        if self.strikes("once", *names) and not self._spent:
            self._spent = True
            raise PlantedError("once")
        if self.strikes("memory", *names):
            torch.empty(1 << 50, dtype=torch.uint8)
        if self.strikes("hang", *names):
            signal.pause()
        if self.strikes("exit", *names):
            raise SystemExit(3)
        if self.strikes("crash", *names):
            os.kill(os.getpid(), signal.SIGSEGV)
        self._broken = self._broken or self.strikes("broken", *names)
        if self._broken:
            raise PlantedError("broken")

    def _strike_after(self, sequences: Sequence[ScheduledSequence]) -> None:
        if self.strikes("sample", *[sequence.request.request_id for sequence in sequences]):
            raise PlantedError("sample")
