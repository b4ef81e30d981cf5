"""The engine as the API process sees it: an asyncio client of the engine process."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec

from .config import EngineConfig
from .errors import EngineBusyError, EngineDeadError, EngineStartError, RequestError
from .launch import EngineProcess
from .messages import (
    LENGTH_BYTES,
    Abort,
    EngineInfo,
    EngineStats,
    FromEngine,
    Pooling,
    SamplingParams,
    Shutdown,
    StartFailed,
    StepOutputs,
    encode_frame,
)
from .output_processor import OutputProcessor, RequestOutput
from .request import resolve_request

if TYPE_CHECKING:
    from ..model.tokenizer import Tokenizer


_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Bell:
    """Rung by streams, heard by one task: `asyncio.Event` without what it costs to let several wait."""

    __slots__ = ("_loop", "_rung", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        else:
            self._rung = True

    def heard(self) -> asyncio.Future[None]:
        """Done when it has been rung since the last time that this was asked."""
        self._waiter = waiter = self._loop.create_future()
        if self._rung:
            waiter.set_result(None)
        self._rung = False
        return waiter


class RequestStream:
    """The outputs of one request, as they come: `async for output in stream`.

    Iteration ends after the output with a `finish_reason`, and raises `EngineDeadError` if the engine dies first.
    Whoever stops reading earlier calls `abort`. One task reads several streams by giving all of them one bell.
    """

    def __init__(self, engine: AsyncEngine, wire_id: str, bell: Bell) -> None:
        self._engine = engine
        self._wire_id = wire_id
        self._bell = bell
        self._outputs: list[RequestOutput] = []
        self._finished = False
        self._dead: str | None = None

    def take(self) -> list[RequestOutput]:
        """All that has come since the last time, at once; raise `EngineDeadError` if nothing ever will again."""
        if not self._outputs and self._dead is not None:
            raise EngineDeadError(self._dead)
        outputs, self._outputs = self._outputs, []
        if outputs and self._dead is not None:
            self._bell.ring()  # the next look says so
        return outputs

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            if self._finished:
                raise StopAsyncIteration
            await self._bell.heard()
        return self._outputs.pop(0)

    def abort(self) -> None:
        """Stop generating; harmless when the request is over already."""
        if not self._finished:
            self._finished = True
            self._bell.ring()
            self._engine._forget(self._wire_id)

    def _put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._finished = output.finish_reason is not None
        self._bell.ring()

    def _die(self, message: str) -> None:
        self._dead = message
        self._finished = True
        self._bell.ring()


class _Pipe(asyncio.Protocol):
    """Our end of the socket: what the engine says is handed out as it arrives, without waking a task.

    Attributes:
        on_message: gets each message; whatever it raises ends the conversation.
        ended: done, with that exception or None, when nothing will come any more.
    """

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self.on_message = on_message
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        try:
            while (body := start + LENGTH_BYTES) <= len(self._buffer):
                end = body + int.from_bytes(self._buffer[start:body], "little")
                if end > len(self._buffer):
                    break
                message = _decoder.decode(self._buffer[body:end])
                start = end
                self.on_message(message)
        except Exception as error:
            self._end(error)
            self.close()
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def send(self, message: msgspec.Struct) -> None:
        """Write a message; nothing happens where the other side is gone."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        """Let go of the socket, whatever still waits to be sent."""
        if self._transport is not None:
            self._transport.abort()


class AsyncEngine:
    """Starts the engine process, sends it requests and hands out what comes back.

    Made by `AsyncEngine.start`; all methods belong to the event loop that called it.

    Attributes:
        info: sizes and limits of the engine.
        stats: its state after the last step.
        step_listener: called with each step's outputs, for metrics.
    """

    def __init__(
        self, process: EngineProcess, pipe: _Pipe, info: EngineInfo, config: EngineConfig, tokenizer: Tokenizer
    ) -> None:
        self.info = info
        self.stats = EngineStats()
        self.step_listener: Callable[[StepOutputs], None] | None = None
        self.error: str | None = None
        self._process = process
        self._pipe = pipe
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, RequestStream] = {}
        self._max_queued = config.max_num_queued_reqs
        self._ends: deque[float] = deque(maxlen=64)
        self._seeds = random.Random(config.seed)
        self._serial = itertools.count()
        self._closing = False
        self._died = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watcher")
        pipe.on_message = self._dispatch

    @classmethod
    async def start(
        cls, config: EngineConfig, tokenizer: Tokenizer, process: EngineProcess | None = None
    ) -> AsyncEngine:
        """Wait until an engine process is ready.

        Args:
            config: what the engine is told.
            tokenizer: makes text of its tokens.
            process: one that has been told `config`; None starts one.

        Raises:
            EngineStartError: it could not start; one plain sentence.
        """
        if process is None:
            process = EngineProcess()
            process.configure(config)
        loop = asyncio.get_running_loop()
        first: asyncio.Future[FromEngine] = loop.create_future()
        pipe = _Pipe(first.set_result)
        try:
            await loop.create_connection(lambda: pipe, sock=process.socket)
            await asyncio.wait((first, pipe.ended), return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            pipe.close()
            process.kill()
            raise
        message = first.result() if first.done() else None
        if isinstance(message, EngineInfo):
            return cls(process, pipe, message, config, tokenizer)
        pipe.close()
        code = await asyncio.to_thread(process.wait)
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        raise EngineStartError(f"The engine process ended with code {code} while starting; its messages are above.")

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self.error is None

    def check_room(self, count: int = 1) -> None:
        """See whether `count` more requests may come now.

        Raises:
            RequestError: so many can never be taken at once.
            EngineBusyError: more requests would wait for their turn than the queue holds.
        """
        most = self._max_queued + self.info.max_num_seqs
        if count > most:
            raise RequestError(f"This server takes at most {most} sequences at once, but {count} were asked for.")
        # What was sent after the engine's last word may run at once if nobody waited then.
        running = self.stats.num_running if self.stats.num_waiting else self.info.max_num_seqs
        excess = len(self._streams) + count - running - self._max_queued
        if excess > 0:
            message = f"{self._max_queued} requests wait already, as many as this server lets wait: ask again later."
            raise EngineBusyError(message, retry_after=self._seconds_until(excess))

    def _seconds_until(self, count: int) -> int:
        """How long it will take until so many requests end, at the pace of the last ones: 1 to 60 seconds."""
        if not self._ends:
            return 1
        pace = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(max(math.ceil(count * pace), 1), 60)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
        bell: Bell | None = None,
    ) -> RequestStream:
        """Send a request to the engine at once.

        Args:
            request_id: for people; need not be unique.
            prompt_token_ids: at least one token.
            params: `max_tokens` None takes the rest of the context; `seed` None draws one.
            priority: lower goes first, under the scheduling policy `priority`.
            cache_salt: only requests of one salt share computed prefixes.
            pooling: generate nothing and answer with the prompt's final hidden states, in one output's `embedding`.
            bell: rung when there is something to `take`, for a reader of several streams.

        Raises:
            RequestError: the request can never run.
            EngineBusyError: too many wait already.
            EngineDeadError: the engine is gone.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        self.check_room()
        # Never used twice: what is still under way for an aborted request must not reach one of the same name.
        wire_id = f"{request_id}#{next(self._serial)}"
        message = resolve_request(
            wire_id, prompt_token_ids, params, self.info, self._seeds,
            priority=priority, cache_salt=cache_salt, pooling=pooling,
        )  # fmt: skip
        stream = RequestStream(self, wire_id, bell or Bell())
        self._processor.add(wire_id, len(prompt_token_ids), message.params)
        self._streams[wire_id] = stream
        self._pipe.send(message)
        return stream

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died of itself."""
        await self._died.wait()
        return self.error or ""

    async def shutdown(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109  (the process gets this long to end)
        """End the engine process; requests that still run get `EngineDeadError`."""
        self._closing = True
        if not self._watcher.done():
            self._pipe.send(Shutdown())
            await asyncio.wait((self._watcher,), timeout=timeout)
        self._pipe.close()
        # Also for one that nobody listens to any more: after a fault of ours it may still run.
        self._process.kill()
        await self._watcher

    def _forget(self, wire_id: str) -> None:
        if self._streams.pop(wire_id, None) is not None:
            self._processor.abort(wire_id)
            if self.error is None:
                self._pipe.send(Abort(request_ids=[wire_id]))

    async def _watch(self) -> None:
        """When the engine process is gone, tell everyone who waits."""
        fault = await self._pipe.ended
        if fault is not None:
            # Whatever went wrong here, nobody would ever be answered again: that is a dead engine.
            reason = f"The engine's messages could not be handled ({fault!r})."
        else:
            code = await asyncio.to_thread(self._process.wait)
            reason = "The server is shutting down." if self._closing else f"The engine process has ended (code {code})."
        self.error = reason
        for stream in self._streams.values():
            stream._die(reason)
        self._streams.clear()
        if not self._closing:
            self._died.set()

    def _dispatch(self, message: FromEngine) -> None:
        """Hand out what a step has brought; one call, and one wake-up of each reader, for all of it."""
        if not isinstance(message, StepOutputs):
            raise TypeError(f"{type(message).__name__} in the middle of the conversation")
        self.stats = message.stats
        now = time.monotonic()
        aborts: list[str] = []
        for token_output in message.outputs:
            wire_id = token_output.request_id
            stream = self._streams.get(wire_id)
            if stream is None:
                continue  # aborted while the step ran
            try:
                output = self._processor.process(token_output, now)
            except Exception as error:
                # A fault in one request's text ends that request and nobody else's.
                output = self._processor.abort(wire_id, error=f"Its text could not be made: {error!r}.")
            if output is None:
                continue
            stream._put(output)
            if output.finish_reason is not None:
                del self._streams[wire_id]
                self._ends.append(now)
                if token_output.finish_reason is None:  # a stop string ended it: the engine does not know yet
                    aborts.append(wire_id)
        if not self._streams:
            self._ends.clear()  # the time without work is no pace
        if aborts:
            self._pipe.send(Abort(request_ids=aborts))
        if self.step_listener is not None:
            self.step_listener(message)
