"""The engine process: owns the model, the KV cache and all compute, and speaks messages over a socket.

Started by `EngineProcess` as `python -m pyllm.engine.process FD`. It ends when the other side is gone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import msgspec

from .config import EngineConfig
from .errors import EngineStartError, RequestError
from .messages import (
    Abort,
    Alive,
    CheckGrammar,
    EngineInfo,
    EngineRequest,
    Ping,
    Shutdown,
    StartFailed,
    StepOutputs,
    ToEngine,
    TokenOutput,
    encode_frame,
    read_frames,
)
from .step.core import EngineCore
from .step.outputs import failure_of

_GRAMMAR_READY = Abort(request_ids=[])
"""Wakes the loop up, and asks for nothing."""
IDLE_SECONDS = 0.1
"""An engine without work for so long is idle, and not between two requests of a busy client."""
PULSE_SECONDS = 0.25
"""How often a long step says that another of its layers is done."""


class _Voice:
    """Our side of the conversation. One thread speaks, the one that steps: its silence is the sign of a hang."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._spoke = time.monotonic()

    def say(self, message: msgspec.Struct) -> None:
        """Send a message."""
        self._socket.sendall(encode_frame(message))
        self._spoke = time.monotonic()

    def on_layer(self) -> None:
        """In a step that takes long, say that it moves on. It has so many layers, so that it cannot say so for ever."""
        if time.monotonic() - self._spoke > PULSE_SECONDS:
            self.say(Alive())


def serve(core: EngineCore, sock: socket.socket, frames: Iterator[bytes]) -> None:
    """Step while there is work, taking in messages between steps; return when asked to or when left alone."""
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()  # None: the other side is gone
    decoder = msgspec.msgpack.Decoder(ToEngine)

    def receive() -> None:
        try:
            for frame in frames:
                inbox.put(decoder.decode(frame))
        finally:
            inbox.put(None)

    voice = _Voice(sock)
    if core.expert_stats is not None:
        core.expert_stats.on_layer = voice.on_layer
    core.grammars.on_ready = lambda: inbox.put(_GRAMMAR_READY)
    threading.Thread(target=receive, name="receive", daemon=True).start()
    while True:
        # Wait for a message only when there is nothing to compute.
        while not inbox.empty() or not core.has_work:
            message = _next_message(inbox, core)
            if message is None or isinstance(message, Shutdown):
                return
            if message is _GRAMMAR_READY:
                continue
            if isinstance(message, Ping):
                voice.say(Alive())
                continue
            refusal = _take(core, message)
            if refusal is not None or not core.has_work:
                outputs = [refusal] if refusal is not None else []
                voice.say(StepOutputs(outputs=outputs, stats=core.stats()))
        voice.say(core.step())


def _next_message(inbox: queue.SimpleQueue[ToEngine | None], core: EngineCore) -> ToEngine | None:
    """The next message; an engine that waits for it in vain for a moment uses the time to check its books."""
    if not core.has_work:
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=IDLE_SECONDS)
        core.check_idle()
    return inbox.get()


def _take(core: EngineCore, message: EngineRequest | Abort | CheckGrammar) -> TokenOutput | None:
    """Add or abort; the answer of a request that the engine refuses or fails to take in, else None."""
    if isinstance(message, Abort):
        core.abort(message.request_ids)
    elif isinstance(message, CheckGrammar):
        core.check_grammar(message)
    else:
        try:
            core.add_request(message)
        except RequestError as error:
            return failure_of(message, error)
        except Exception as error:
            core.abort([message.request_id])
            return failure_of(message, error)
    return None


def main(prepare: Callable[[EngineCore], None] = lambda core: None) -> None:
    """Read the configuration from the socket, build the engine, `prepare` it (for tests), report, serve."""
    # A supervisor's SIGTERM may reach every process; the API process decides when this one ends, after draining.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[-1])) as sock:
        frames = read_frames(sock.makefile("rb"))
        from .build import build_engine  # takes its time, in which the other side finds out what to ask for

        if (first := next(frames, None)) is None:
            return
        try:
            core = build_engine(msgspec.msgpack.decode(first, type=EngineConfig))
        except EngineStartError as error:
            answer: EngineInfo | StartFailed = StartFailed(message=str(error))
        else:
            answer = core.info
            prepare(core)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the API process is gone, and all who waited
            sock.sendall(encode_frame(answer))
            if isinstance(answer, EngineInfo):
                try:
                    serve(core, sock, frames)
                except (BrokenPipeError, ConnectionResetError):
                    raise
                except BaseException:
                    # At once: everybody waits, and to take a broken engine apart takes time, if it ends at all.
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)


if __name__ == "__main__":
    main()
