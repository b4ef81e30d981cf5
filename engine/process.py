"""The engine process: owns the model, the KV cache and all compute, and exchanges messages over a socket.

Started by `EngineProcess` as `python -m pyllm.engine.process FD`. It exits when the API process closes its end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from .client.launch import IGNORED_SIGNALS
from .config import EngineConfig
from .errors import START_FAILURES, EngineStartError, RequestError, reason_of
from .host import return_free_memory
from .messages import (
    Abort,
    Alive,
    CheckGrammar,
    EngineRequest,
    Loading,
    Ping,
    Shutdown,
    StartFailed,
    StepOutputs,
    ToEngine,
    TokenOutput,
    encode_frame,
    read_frames,
)

if TYPE_CHECKING:  # large modules are imported where a failure becomes a sentence
    from .step.core import EngineCore
    from .step.kv_events import KVEventPublisher

_GRAMMAR_READY = Abort(request_ids=[])  # wakes the loop, and aborts nothing
IDLE_SECONDS = 0.1  # an engine without work for this long is idle; shorter gaps are normal between a client's requests
FIRST_REPORT_SECONDS, REPORT_SECONDS = 1.0, 10.0  # until the first report of loading, and between two
PULSE_SECONDS = 0.25  # the shortest time between two reports of a long step's finished layers


class LoadReports:
    """Reports how much of the weights is loaded: after a second, as a small model needs no report, then regularly."""

    def __init__(self, send: Callable[[msgspec.Struct], object]) -> None:
        self._send = send
        self._due = time.monotonic() + FIRST_REPORT_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Report, if it is time."""
        if done < total and (now := time.monotonic()) >= self._due:
            self._send(Loading(done=done, total=total))
            self._due = now + REPORT_SECONDS


class Outbox:
    """Sends messages to the API process, only from the thread that steps, so that silence reveals a hang."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._last_sent = time.monotonic()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message."""
        self._socket.sendall(encode_frame(message))
        self._last_sent = time.monotonic()

    def on_layer(self) -> None:
        """Report progress in a long step; it has a limited number of layers, so this cannot hide a hang."""
        if time.monotonic() - self._last_sent > PULSE_SECONDS:
            self.send(Alive())


Inbox = queue.SimpleQueue[ToEngine | None]
"""Messages from the API process; None once it has closed its end."""


def receive(frames: Iterator[bytes]) -> Inbox:
    """Decode messages in a thread, as they arrive."""
    inbox: Inbox = queue.SimpleQueue()
    decoder = msgspec.msgpack.Decoder(ToEngine)

    def read() -> None:
        try:
            for frame in frames:
                inbox.put(decoder.decode(frame))
        finally:
            inbox.put(None)

    threading.Thread(target=read, name="receive", daemon=True).start()
    return inbox


def serve(core: EngineCore, sock: socket.socket, inbox: Inbox) -> None:
    """Step while there is work, reading messages between steps, until `Shutdown` or the other side closes."""
    outbox = Outbox(sock)
    if core.observer is not None:
        core.observer.on_layer = outbox.on_layer
    core.grammars.on_ready = lambda: inbox.put(_GRAMMAR_READY)
    while True:
        # Wait for a message only when there is nothing to compute.
        while not inbox.empty() or not core.has_work:
            message = _next_message(inbox, core)
            if message is None or isinstance(message, Shutdown):
                return
            if message is _GRAMMAR_READY:
                continue
            if isinstance(message, Ping):
                outbox.send(Alive())
                continue
            failure = _handle(core, message)
            if failure is not None or not core.has_work:
                outputs = [failure] if failure is not None else []
                outbox.send(StepOutputs(outputs=outputs, stats=core.stats()))
        outbox.send(core.step())


def _next_message(inbox: Inbox, core: EngineCore) -> ToEngine | None:
    """Wait for the next message; an idle engine first checks that it holds nothing, and returns freed memory."""
    if not core.has_work:
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=IDLE_SECONDS)
        core.check_idle()
        return_free_memory()
    return inbox.get()


def _handle(core: EngineCore, message: EngineRequest | Abort | CheckGrammar) -> TokenOutput | None:
    """Pass a message to the engine; return the failure of a request that cannot be added."""
    if isinstance(message, Abort):
        core.abort(message.request_ids)
    elif isinstance(message, CheckGrammar):
        core.check_grammar(message)
    else:
        from .step.request import failure_of

        try:
            core.add_request(message)
        except RequestError as error:
            return failure_of(message, error)
        except Exception as error:
            core.abort([message.request_id])
            return failure_of(message, error)
    return None


def _open_publisher(config: EngineConfig) -> KVEventPublisher | None:
    """Listen for subscribers before the model is loaded, so that those of an engine that died have time to return."""
    if config.kv_events_config is None or not config.kv_events_config.enabled:
        return None
    from .step.kv_events import KVEventPublisher

    return KVEventPublisher(config.kv_events_config)


def _end_with_api_process(sock: socket.socket) -> None:
    """End this process when the API process has closed its end, even in the middle of loading or of a long step."""
    poll = select.poll()
    poll.register(sock, 0)  # only hang-ups, not data
    poll.poll()
    os._exit(0)


def main(prepare: Callable[[EngineCore], None] = lambda core: None) -> None:
    """Read the configuration from the socket, build the engine, `prepare` it (for tests), report and serve."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[-1])) as sock:
        frames = read_frames(sock.makefile("rb"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the API process has exited
            try:
                threading.Thread(target=_end_with_api_process, args=(sock,), name="hangup", daemon=True).start()
                # Slow, so the API process prepares the configuration meanwhile. Loaded objects stay, so the garbage
                # collector need not scan them again and again.
                gc.disable()
                from .build import build_engine

                gc.freeze()
                gc.enable()
                if (first := next(frames, None)) is None:
                    return
                # On a terminal there is a progress bar.
                reports = LoadReports(lambda message: sock.sendall(encode_frame(message)))
                config = msgspec.msgpack.decode(first, type=EngineConfig)
                publisher = _open_publisher(config)
                core = build_engine(config) if sys.stderr.isatty() else build_engine(config, reports)
                inbox = receive(frames)
            except EngineStartError as error:
                sock.sendall(encode_frame(StartFailed(message=str(error))))
                return
            except START_FAILURES as error:
                sock.sendall(encode_frame(StartFailed(message=f"The engine cannot start ({reason_of(error)}).")))
                return
            prepare(core)
            info = core.info
            if publisher is not None:
                core.publish_kv_events(publisher)
                info = msgspec.structs.replace(info, kv_event_endpoints=publisher.endpoints)
            sock.sendall(encode_frame(info))
            try:
                serve(core, sock, inbox)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except BaseException:
                # Exit at once: clients are waiting, and tearing down a broken engine takes time, or never ends.
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)


if __name__ == "__main__":
    main()
