"""The engine as the API process sees it: an asyncio client of the engine process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec

from .. import messages
from ..config import EngineConfig
from ..errors import EngineBusyError, EngineDeadError, EngineStartError, RequestError, describe
from .grammar_checks import GrammarChecks
from .launch import EngineProcess
from .output_processor import OutputProcessor, RequestStream, Wakeup
from .watchdog import wait_for_hang

if TYPE_CHECKING:
    from ...model.tokenizer import Tokenizer

logger = logging.getLogger("pyllm.engine")

_decoder: msgspec.msgpack.Decoder[messages.FromEngine] = msgspec.msgpack.Decoder(messages.FromEngine)
MAX_HELD_BYTES = 2**29  # of unfinished requests, in both processes together
EXIT_SECONDS = 1.0  # how long to wait for an engine that has closed its socket to exit


class Pipe(asyncio.Protocol):
    """Calls `on_message` with each message from the engine as it arrives; an exception in it closes the pipe."""

    def __init__(self, on_message: Callable[[messages.FromEngine], None]) -> None:
        self.on_message = on_message
        self.num_received = 0  # how many times data has arrived
        # Done, with an exception or None, when no more messages can arrive.
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to write to."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        """Handle every message that is now complete."""
        self.num_received += 1
        self._buffer += data
        start = 0
        try:
            while (body := start + messages.LENGTH_BYTES) <= len(self._buffer):
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
        """Note that the engine has closed its end."""
        self._transport = None
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or drop it if the engine has closed its end."""
        if self._transport is not None:
            self._transport.write(messages.encode_frame(message))

    def close(self) -> None:
        """Close the socket and drop unsent data."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class AsyncEngine:
    """Sends requests to the engine process and hands out its outputs, in the event loop that called `start`."""

    def __init__(
        self, process: EngineProcess, pipe: Pipe, info: messages.EngineInfo, config: EngineConfig, tokenizer: Tokenizer
    ) -> None:
        self.info = info
        self.stats = messages.EngineStats()  # after the last step
        self.step_listener: Callable[[messages.StepOutputs], None] | None = None  # called after each step
        self.error: str | None = None  # why the engine is dead
        self._process = process
        self._pipe = pipe
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, RequestStream] = {}
        self._clients: Counter[str] = Counter()  # how many unfinished requests each client has
        self._held: Counter[str] = Counter()  # and how many bytes those take
        self._grammars = GrammarChecks(pipe.send)
        self._config = config
        self._tokenizer = tokenizer
        # Finish times of recent requests since the engine was last idle.
        self._completions: deque[float] = deque(maxlen=64)
        self._num_running = info.config.max_num_seqs  # how many requests the next step can run, if others are waiting
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
        """Wait until `process`, or a new one, is ready; raises `EngineStartError`, one sentence to show the user."""
        if process is None:
            process = EngineProcess()
            process.configure(config)
        loop = asyncio.get_running_loop()
        first: asyncio.Future[messages.FromEngine] = loop.create_future()

        def receive(message: messages.FromEngine) -> None:
            if not isinstance(message, messages.Loading):
                first.set_result(message)
                return
            done, total = message.done / 1e9, message.total / 1e9
            logger.info("Loading the weights: %.2f of %.2f GB (%d%%)", done, total, 100 * done / total)

        pipe = Pipe(receive)
        try:
            await loop.create_connection(lambda: pipe, sock=process.socket)
            await asyncio.wait((first, pipe.ended), return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            pipe.close()
            process.kill()
            raise
        message = first.result() if first.done() else None
        if isinstance(message, messages.EngineInfo):
            return cls(process, pipe, message, config, tokenizer)
        pipe.close()
        code = await asyncio.to_thread(process.end, EXIT_SECONDS)
        if isinstance(message, messages.StartFailed):
            raise EngineStartError(message.message)
        raise EngineStartError(f"The engine process exited with code {code} while starting; its output is above.")

    @property
    def is_alive(self) -> bool:
        """Whether the engine can serve requests."""
        return self.error is None

    def check_room(self, count: int = 1, client: str = "") -> None:
        """Raise `EngineBusyError` if `count` more requests do not fit in the queue, `RequestError` if they never do.

        If clients have names, a client whose requests stay within its equal share of all places is accepted even if
        the queue is full. So each client can exceed the queue's limit by its share only.
        """
        queue, batch = self.info.config.max_num_queued_reqs, self.info.config.max_num_seqs
        if count > queue + batch:
            raise RequestError(f"This server accepts at most {queue + batch} sequences at once, but got {count}.")
        # If no request waited after the engine's last step, all those submitted since may start at once.
        running = self._num_running if self.stats.num_waiting else batch
        excess = len(self._streams) + count - running - queue
        own = self._clients[client]
        share = (queue + batch) // (len(self._clients) + (own == 0))
        if excess > 0 and not (client and own + count <= share):
            message = f"The queue is full (at most {queue} requests can wait). Retry later."
            raise EngineBusyError(message, retry_after=self._seconds_until(excess))

    def _check_bytes(self, count: int, client: str) -> None:
        """Raise `EngineBusyError` if `count` more bytes are too many for the memory of both processes."""
        share = MAX_HELD_BYTES // (len(self._clients) + (client not in self._clients))
        if self._held.total() + count > MAX_HELD_BYTES and not (client and self._held[client] + count <= share):
            message = f"The running and waiting requests take up too much memory (the limit is {MAX_HELD_BYTES} bytes)."
            raise EngineBusyError(f"{message} Retry later.", retry_after=self._seconds_until(1))

    def _seconds_until(self, count: int) -> int:
        """Estimate when `count` requests will have finished, from the recent rate: 1 to 60 seconds."""
        if not self._completions:
            return 1
        seconds_each = (time.monotonic() - self._completions[0]) / len(self._completions)
        return min(max(math.ceil(count * seconds_each), 1), 60)

    async def check_grammar(self, grammar: str, param: str | None = None) -> None:
        """Return if the engine can follow a grammar; raises `RequestError` about `param`, or an engine error."""
        if self.error is not None:
            raise EngineDeadError(self.error)
        await self._grammars.check(grammar, param)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: messages.SamplingParams,
        *,
        priority: int = 0,
        background: bool = False,
        client: str = "",
        cache_salt: str | None = None,
        pooling: messages.Pooling | None = None,
        wakeup: Wakeup | None = None,
    ) -> RequestStream:
        """Send an `EngineRequest` with these fields to the engine; its `request_id` need not be unique.

        `wakeup` is woken when there is something to `drain`, for a task that reads several streams. Raises
        `RequestError` if the request can never run, `EngineBusyError` if the queue is full, and `EngineDeadError`.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        self.check_room(client=client)
        # A fresh id: outputs in flight for an aborted request must not reach a later one with the same id.
        wire_id = f"{request_id}#{next(self._serial)}"
        message = messages.EngineRequest(
            request_id=wire_id, prompt_token_ids=prompt_token_ids, params=params,
            priority=priority, background=background, client=client, cache_salt=cache_salt, pooling=pooling,
        )  # fmt: skip
        message = messages.resolve_request(message, self.info, self._seeds)
        num_bytes = message.num_bytes
        self._check_bytes(num_bytes, client)
        stream = RequestStream(wire_id, wakeup or Wakeup(), self._abort, client, num_bytes)
        self._processor.add(wire_id, len(prompt_token_ids), message.params)
        self._streams[wire_id] = stream
        self._clients[client] += 1
        self._held[client] += num_bytes
        self._pipe.send(message)
        return stream

    async def wait_dead(self) -> str:
        """Wait until the engine dies without being shut down; return the reason."""
        await self._died.wait()
        return self.error or ""

    async def successor(self) -> AsyncEngine:
        """Start another engine with the same configuration and listener; raises `EngineStartError`."""
        engine = await AsyncEngine.start(self._config, self._tokenizer)
        engine.step_listener = self.step_listener
        return engine

    async def shutdown(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - the process gets this long to exit
        """End the engine process; requests that are still running get `EngineDeadError`."""
        self._closing = True
        if not self._watcher.done():
            self._pipe.send(messages.Shutdown())
            await asyncio.wait((self._watcher,), timeout=timeout)
        self._pipe.close()
        await asyncio.to_thread(self._process.end)
        await self._watcher

    def _pop_stream(self, wire_id: str) -> bool:
        """Remove a stream that has ended; return False if it is not there."""
        stream = self._streams.pop(wire_id, None)
        if stream is None:
            return False
        self._clients[stream.client] -= 1
        self._held[stream.client] -= stream.num_bytes
        if not self._clients[stream.client]:
            del self._clients[stream.client], self._held[stream.client]
        return True

    def _abort(self, wire_id: str) -> None:
        if self._pop_stream(wire_id):
            self._processor.abort(wire_id)
            if self.error is None:
                self._pipe.send(messages.Abort(request_ids=[wire_id]))

    async def _watch(self) -> None:
        """Wait until the engine process exits or hangs; then fail all requests, and kill it if it still runs."""
        timeout = self.info.config.engine_hang_timeout
        hang = asyncio.create_task(wait_for_hang(self._pipe, timeout), name="engine-watchdog")
        await asyncio.wait((self._pipe.ended, hang), return_when=asyncio.FIRST_COMPLETED)
        if not self._pipe.ended.done():
            reason = f"The engine hung: no progress for {timeout:g} s."
        elif (fault := self._pipe.ended.result()) is not None:
            # The exception may have lost outputs, so the engine counts as dead.
            reason = f"The engine's messages could not be handled ({fault!r})."
        else:
            self.error = "The engine process has exited."  # set at once; the exit code is known only after the wait
            code = await asyncio.to_thread(self._process.end, EXIT_SECONDS)
            reason = "The server is shutting down." if self._closing else f"The engine process exited with code {code}."
        hang.cancel()
        self.error = reason
        self.stats = msgspec.structs.replace(self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        for stream in self._streams.values():
            stream.die(reason)
        self._streams.clear()
        self._clients.clear()
        self._held.clear()
        self._grammars.die(reason)
        if not self._closing:
            self._died.set()
        self._pipe.close()
        await asyncio.to_thread(self._process.end)

    def _dispatch(self, message: messages.FromEngine) -> None:
        """Hand out one step's outputs, with one wakeup per reader."""
        if isinstance(message, messages.Alive):
            return
        if not isinstance(message, messages.StepOutputs):
            raise TypeError(f"unexpected message {type(message).__name__}")
        self.stats = message.stats
        for verdict in message.verdicts:
            self._grammars.resolve(verdict)
        if message.stats.step_tokens:  # waiting requests replace those that finished in this step
            finished = sum(output.finish_reason is not None for output in message.outputs)
            self._num_running = message.stats.num_running + finished
        now = time.monotonic()
        stopped = [output.request_id for output in message.outputs if self._deliver(output, now)]
        if not self._streams:
            self._completions.clear()  # idle time says nothing about the rate
        if stopped:
            self._pipe.send(messages.Abort(request_ids=stopped))
        if self.step_listener is not None:
            self.step_listener(message)

    def _deliver(self, token_output: messages.TokenOutput, now: float) -> bool:
        """Pass an output to its stream; return True if it ended here, by a stop string unknown to the engine."""
        wire_id = token_output.request_id
        stream = self._streams.get(wire_id)
        if stream is None:  # aborted while the step ran
            return False
        try:
            output = self._processor.process(token_output, now)
        except Exception as error:  # caused by one request's text: only that request ends
            output = self._processor.abort(wire_id, error=describe(error))
        if output is None:
            return False
        stream.put(output)
        if output.finish_reason is None:
            return False
        self._pop_stream(wire_id)
        self._completions.append(now)
        return token_output.finish_reason is None
