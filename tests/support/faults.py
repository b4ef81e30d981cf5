"""Faults on demand in a real engine process, so that tests can see what they do to other requests.

python faults.py serve FAULTS ...    # `pyllm serve ...` with an engine process that has these faults
python faults.py engine FAULTS FD    # that engine process

FAULTS names faults as `kind@marker`, separated by commas. A fault strikes in steps with a request whose id contains
the marker. A client sets the id with the header `x-request-id`. Ids made by the server are hexadecimal, so a marker
must not be, or the fault would strike any request.

- `prepare`, `sample`: the step raises before or after everything else is computed; `once`: before, the first time only.
- `append`: adding the request's token raises. `text`: its token has no text, so that decoding it raises.
- `memory`: an allocation that no machine can satisfy.
- `slow`: each layer takes SLOW_SECONDS. `hang`: the step never ends.
- `broken`: every step raises from now on, whatever requests are in it.
- `exit`, `crash`: the process exits, or ends by a signal.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
import torch

from pyllm.engine import process
from pyllm.engine.client.launch import EngineProcess
from pyllm.engine.messages import StepOutputs
from pyllm.engine.runner.model_runner import LayerObserver
from pyllm.engine.step.core import EngineCore
from pyllm.engine.step.request import Request, SampledToken, ScheduledSequence
from pyllm.engine.step.runner import LaunchedStep, Runner
from pyllm.model.network import LayerState
from pyllm.server.cli import main as cli

KINDS = ("prepare", "sample", "once", "append", "text", "memory", "slow", "hang", "broken", "exit", "crash")
SLOW_SECONDS = 0.8
NO_TOKEN = -(1 << 40)
_MADE_UP = re.compile("[0-9a-f#]*")
"""What the id of any request may contain: one made by the server, followed by # and a number."""


class PlantedError(RuntimeError):
    """Raised on demand."""


def plant(core: EngineCore, text: str) -> None:
    """Plant the faults that `text` names in `core`; raise `ValueError` if it names none."""
    faults = FaultyRunner(core.runner, text)
    core.runner = faults
    step, watch, append = core.step, LayerObserver.__call__, Request.append

    def marked_step() -> StepOutputs:
        outputs = step()
        marked = [
            msgspec.structs.replace(output, token_ids=[NO_TOKEN])
            if faults.strikes("text", output.request_id)
            else output
            for output in outputs.outputs
        ]
        return msgspec.structs.replace(outputs, outputs=marked)

    def slow_watch(self: LayerObserver, state: LayerState) -> None:
        if faults.is_slow:
            time.sleep(SLOW_SECONDS)
        watch(self, state)

    def failing_append(self: Request, token_id: int) -> None:
        append(self, token_id)
        if faults.strikes("append", self.request_id):
            raise PlantedError("append")

    core.step = marked_step  # type: ignore[method-assign]
    LayerObserver.__call__ = slow_watch  # type: ignore[method-assign]
    Request.append = failing_append  # type: ignore[method-assign]


class FaultyRunner:
    """A runner around the real one, which raises, hangs or exits in steps with a marked request."""

    def __init__(self, runner: Runner, text: str) -> None:
        self._runner = runner
        self._faults = [fault.split("@") for fault in text.split(",")]
        if not all(len(own) == 2 and own[0] in KINDS and not _MADE_UP.fullmatch(own[1]) for own in self._faults):
            raise ValueError(
                f"got {text!r}: a fault is kind@marker, with one of the kinds {KINDS} "
                "and a marker of more than hexadecimal digits and #"
            )
        self._spent = False
        self._broken = False
        self.is_slow = False  # whether the current step makes its layers slow

    def strikes(self, kind: str, *request_ids: str) -> bool:
        """Whether a fault of that kind is planted for one of the requests."""
        return any(kind == own and marker in name for own, marker in self._faults for name in request_ids)

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute as the real one, apart from the faults."""
        self._strike_before(sequences)
        sampled = self._runner.execute(sequences)
        self._strike_after(sequences)
        return sampled

    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """Compute as the real one, apart from the faults."""
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


def main(role: str, faults: str, *arguments: str) -> None:
    """Run `pyllm serve`, or the engine process that it starts."""
    if role == "serve":
        EngineProcess.command = (__file__, "engine", faults)
        cli.main(["serve", *arguments])
    else:
        process.main(lambda core: plant(core, faults))


if __name__ == "__main__":
    main(*sys.argv[1:])
