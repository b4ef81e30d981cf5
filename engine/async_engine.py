"""The engine as the API process sees it: an asyncio client of the engine process."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from .config import EngineConfig
from .errors import EngineDeadError, EngineStartError
from .messages import (
    LENGTH_BYTES,
    Abort,
    EngineInfo,
    EngineStats,
    FromEngine,
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


# Compute threads that spin while they wait take the processor from the very thread they wait for as soon as anything
# else runs: beside one busy process a step took 280 ms so. Threads that spin for a moment and then sleep lose little
# when the machine is quiet (17 ms a step against 14) and keep going when it is not (29). Only OpenMP's own start can be
# told; what the user has set wins, and a spin count would silence the user's wait policy.
THREAD_SETTINGS = {"GOMP_SPINCOUNT": "1000"}


class RequestStream:
    """The outputs of one request, as they come: `async for output in stream`.

    Iteration ends after the output with a `finish_reason`, and raises `EngineDeadError` if the engine dies first.
    Whoever stops reading earlier calls `abort`.
    """

    def __init__(self, engine: AsyncEngine, wire_id: str) -> None:
        self._engine = engine
        self._wire_id = wire_id
        self._outputs: deque[RequestOutput] = deque()
        self._arrived = asyncio.Event()
        self._finished = False
        self._dead: str | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            if self._finished:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._outputs.popleft()

    def abort(self) -> None:
        """Stop generating; harmless when the request is over already."""
        if not self._finished:
            self._finished = True
            self._arrived.set()
            self._engine._forget(self._wire_id)

    def _put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._finished = output.finish_reason is not None
        self._arrived.set()

    def _die(self, message: str) -> None:
        self._dead = message
        self._finished = True
        self._arrived.set()


class AsyncEngine:
    """Starts the engine process, sends it requests and hands out what comes back.

    Made by `AsyncEngine.start`; all methods belong to the event loop that called it.

    Attributes:
        info: sizes and limits of the engine.
        stats: its state after the last step.
        step_listener: called with each step's outputs, for metrics.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
        tokenizer: Tokenizer,
        seed: int | None,
    ) -> None:
        self.info = info
        self.stats = EngineStats()
        self.step_listener: Callable[[StepOutputs], None] | None = None
        self.error: str | None = None
        self._process = process
        self._reader = reader
        self._writer = writer
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, RequestStream] = {}
        self._seeds = random.Random(seed)
        self._serial = itertools.count()
        self._closing = False
        self._died = asyncio.Event()
        self._receiver = asyncio.create_task(self._receive(), name="engine-receiver")

    @classmethod
    async def start(cls, config: EngineConfig, tokenizer: Tokenizer) -> AsyncEngine:
        """Spawn the engine process and wait until it is ready.

        Raises:
            EngineStartError: it could not start; one plain sentence.
        """
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        with theirs:
            try:
                # -P: a file of the user's folder must not be taken for a module. A session of its own: Ctrl-C in a
                # terminal is for this process, which then decides.
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "pyllm.engine.process", str(theirs.fileno()),
                    pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
                    env=({} if "OMP_WAIT_POLICY" in os.environ else THREAD_SETTINGS) | os.environ,
                )  # fmt: skip
            except BaseException:
                writer.close()
                raise
        try:
            writer.write(encode_frame(config))
            message = await _read_message(reader)
        except BaseException:
            process.kill()
            await process.wait()
            writer.close()
            raise
        if isinstance(message, EngineInfo):
            return cls(process, reader, writer, message, tokenizer, config.seed)
        code = await process.wait()
        writer.close()
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        raise EngineStartError(f"The engine process ended with code {code} while starting; its messages are above.")

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self.error is None

    def submit(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Send a request to the engine at once.

        Args:
            request_id: for people; need not be unique.
            prompt_token_ids: at least one token.
            params: `max_tokens` None takes the rest of the context; `seed` None draws one.

        Raises:
            RequestError: the request can never run.
            EngineDeadError: the engine is gone.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        # Never used twice: what is still under way for an aborted request must not reach one of the same name.
        wire_id = f"{request_id}#{next(self._serial)}"
        message = resolve_request(wire_id, prompt_token_ids, params, self.info, self._seeds)
        stream = RequestStream(self, wire_id)
        self._processor.add(wire_id, len(prompt_token_ids), message.params)
        self._streams[wire_id] = stream
        self._writer.write(encode_frame(message))
        return stream

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died of itself."""
        await self._died.wait()
        return self.error or ""

    async def shutdown(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109  (the process gets this long to end)
        """End the engine process; requests that still run get `EngineDeadError`."""
        self._closing = True
        if self._process.returncode is None:
            self._writer.write(encode_frame(Shutdown()))
            try:
                await asyncio.wait_for(self._process.wait(), timeout)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._receiver
        self._writer.close()

    def _forget(self, wire_id: str) -> None:
        if self._streams.pop(wire_id, None) is not None:
            self._processor.abort(wire_id)
            if self.error is None:
                self._writer.write(encode_frame(Abort(request_ids=[wire_id])))

    async def _receive(self) -> None:
        """Hand out outputs until the engine process is gone; then tell everyone who waits."""
        try:
            while isinstance(message := await _read_message(self._reader), StepOutputs):
                self._dispatch(message)
            code = await self._process.wait()
            reason = "The server is shutting down." if self._closing else f"The engine process has ended (code {code})."
        except Exception as error:
            # Whatever went wrong here, nobody would ever be answered again: that is a dead engine.
            reason = f"The engine's messages could not be handled ({error!r})."
        self.error = reason
        for stream in self._streams.values():
            stream._die(reason)
        self._streams.clear()
        if not self._closing:
            self._died.set()

    def _dispatch(self, message: StepOutputs) -> None:
        self.stats = message.stats
        aborts: list[str] = []
        for token_output in message.outputs:
            stream = self._streams.get(token_output.request_id)
            if stream is None:
                continue  # aborted while the step ran
            try:
                output = self._processor.process(token_output)
            except Exception as error:
                # A fault in one request's text ends that request and nobody else's.
                output = self._processor.abort(token_output.request_id, error=f"Its text could not be made: {error!r}.")
            if output is None:
                continue
            stream._put(output)
            if output.finish_reason is not None:
                del self._streams[token_output.request_id]
                if token_output.finish_reason is None:  # a stop string ended it: the engine does not know yet
                    aborts.append(token_output.request_id)
        if aborts:
            self._writer.write(encode_frame(Abort(request_ids=aborts)))
        if self.step_listener is not None:
            self.step_listener(message)


_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


async def _read_message(reader: asyncio.StreamReader) -> FromEngine | None:
    """The next message; None when the engine process has closed its end."""
    try:
        head = await reader.readexactly(LENGTH_BYTES)
        return _decoder.decode(await reader.readexactly(int.from_bytes(head, "little")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
