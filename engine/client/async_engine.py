"""The engine as the API process sees it: an asyncio client of the engine process."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ..checks import resolve_request
from ..config import EngineConfig
from ..errors import EngineBusyError, EngineDeadError, EngineStartError, RequestError, describe
from ..messages import (
    Abort,
    Alive,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FromEngine,
    Ping,
    Pooling,
    SamplingParams,
    Shutdown,
    StartFailed,
    StepOutputs,
)
from .grammar_checks import GrammarChecks
from .launch import EngineProcess
from .output_processor import OutputProcessor, RequestOutput
from .pipe import Pipe

if TYPE_CHECKING:
    from ...model.tokenizer import Tokenizer

LOOKS = 30
"""How often the engine's silence is looked at before it counts as a hang."""
EXIT_SECONDS = 1.0
"""How long an engine that has closed its socket gets to exit, so that its exit code can be told."""


class Wakeup:
    """An event that streams set and one task waits for: cheaper than `asyncio.Event`, which serves several."""

    __slots__ = ("_loop", "_pending", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending = False
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the waiting task, or the next one to wait."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        else:
            self._pending = True

    def wait(self) -> asyncio.Future[None]:
        """Return a future that is done once `wake` has been called since the last wait."""
        self._waiter = waiter = self._loop.create_future()
        if self._pending:
            waiter.set_result(None)
        self._pending = False
        return waiter


class RequestStream:
    """The outputs of one request, as they come: `async for output in stream`.

    Iteration ends after the output with a `finish_reason`, and raises `EngineDeadError` if the engine dies first.
    To stop reading earlier, call `abort`. One task can read several streams that share one `Wakeup`.
    """

    def __init__(self, engine: AsyncEngine, wire_id: str, wakeup: Wakeup) -> None:
        self._engine = engine
        self._wire_id = wire_id
        self._wakeup = wakeup
        self._outputs: list[RequestOutput] = []
        self._finished = False
        self._dead: str | None = None

    @property
    def unread(self) -> int:
        """Tokens that have arrived and not been read."""
        return sum(len(output.token_ids) for output in self._outputs)

    def drain(self) -> list[RequestOutput]:
        """Return all unread outputs at once; raise `EngineDeadError` if there are none and the engine is dead."""
        if not self._outputs and self._dead is not None:
            raise EngineDeadError(self._dead)
        outputs, self._outputs = self._outputs, []
        if outputs and self._dead is not None:
            self._wakeup.wake()  # the next drain raises
        return outputs

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            if self._finished:
                raise StopAsyncIteration
            await self._wakeup.wait()
        return self._outputs.pop(0)

    def abort(self) -> None:
        """Stop generating; harmless when the request is over already."""
        if not self._finished:
            self._finished = True
            self._wakeup.wake()
            self._engine._forget(self._wire_id)

    def _put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._finished = output.finish_reason is not None
        self._wakeup.wake()

    def _die(self, message: str) -> None:
        self._dead = message
        self._finished = True
        self._wakeup.wake()


class AsyncEngine:
    """Starts the engine process, sends it requests and hands out what comes back.

    Made by `AsyncEngine.start`; all methods belong to the event loop that called it.

    Attributes:
        info: sizes and limits of the engine.
        stats: its state after the last step.
        step_listener: called with each step's outputs, for metrics.
    """

    def __init__(
        self, process: EngineProcess, pipe: Pipe, info: EngineInfo, config: EngineConfig, tokenizer: Tokenizer
    ) -> None:
        self.info = info
        self.stats = EngineStats()
        self.step_listener: Callable[[StepOutputs], None] | None = None
        self.error: str | None = None
        self._process = process
        self._pipe = pipe
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, RequestStream] = {}
        self._grammars = GrammarChecks(pipe.send)
        self._config = config
        self._tokenizer = tokenizer
        self._ends: deque[float] = deque(maxlen=64)
        self._places = info.config.max_num_seqs
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
        pipe = Pipe(first.set_result)
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
        code = await asyncio.to_thread(process.end, EXIT_SECONDS)
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
        queued = self.info.config.max_num_queued_reqs
        most = queued + self.info.config.max_num_seqs
        if count > most:
            raise RequestError(f"This server takes at most {most} sequences at once, but {count} were asked for.")
        # What was sent after the engine's last word may run at once if nobody waited then.
        running = self._places if self.stats.num_waiting else self.info.config.max_num_seqs
        excess = len(self._streams) + count - running - queued
        if excess > 0:
            message = f"{queued} requests wait already, as many as this server lets wait: ask again later."
            raise EngineBusyError(message, retry_after=self._seconds_until(excess))

    def _seconds_until(self, count: int) -> int:
        """How long it will take until so many requests end, at the pace of the last ones: 1 to 60 seconds."""
        if not self._ends:
            return 1
        pace = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(max(math.ceil(count * pace), 1), 60)

    async def check_grammar(self, grammar: str, param: str | None = None) -> None:
        """Return if the engine can follow a grammar.

        Raises:
            RequestError: it is invalid, nothing satisfies it, or it takes too long; `param` is the field at fault.
            EngineBusyError: too many others are being compiled, or the machine is too busy.
            EngineDeadError: the engine is gone.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        await self._grammars.check(grammar, param)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
        wakeup: Wakeup | None = None,
    ) -> RequestStream:
        """Send a request to the engine at once.

        Args:
            request_id: for people; need not be unique.
            prompt_token_ids: at least one token.
            params: `max_tokens` None takes the rest of the context; `seed` None draws one.
            priority: lower goes first, under the scheduling policy `priority`.
            cache_salt: only requests of one salt share computed prefixes.
            pooling: generate nothing and answer with the prompt's final hidden states, in one output's `embedding`.
            wakeup: set when there is something to `drain`, for a task that reads several streams.

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
        message = EngineRequest(
            request_id=wire_id, prompt_token_ids=prompt_token_ids, params=params,
            priority=priority, cache_salt=cache_salt, pooling=pooling,
        )  # fmt: skip
        message = resolve_request(message, self.info, self._seeds)
        stream = RequestStream(self, wire_id, wakeup or Wakeup())
        self._processor.add(wire_id, len(prompt_token_ids), message.params)
        self._streams[wire_id] = stream
        self._pipe.send(message)
        return stream

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died of itself."""
        await self._died.wait()
        return self.error or ""

    async def successor(self) -> AsyncEngine:
        """A new engine for the same configuration, with the same listener; raises `EngineStartError`."""
        engine = await AsyncEngine.start(self._config, self._tokenizer)
        engine.step_listener = self.step_listener
        return engine

    async def shutdown(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109  (the process gets this long to end)
        """End the engine process; requests that still run get `EngineDeadError`."""
        self._closing = True
        if not self._watcher.done():
            self._pipe.send(Shutdown())
            await asyncio.wait((self._watcher,), timeout=timeout)
        self._pipe.close()
        await asyncio.to_thread(self._process.end)
        await self._watcher

    def _forget(self, wire_id: str) -> None:
        if self._streams.pop(wire_id, None) is not None:
            self._processor.abort(wire_id)
            if self.error is None:
                self._pipe.send(Abort(request_ids=[wire_id]))

    async def _watch(self) -> None:
        """When the engine process is gone, or hangs, tell everyone who waits, and make sure that it is gone."""
        hang = asyncio.create_task(self._silence(), name="engine-silence")
        await asyncio.wait((self._pipe.ended, hang), return_when=asyncio.FIRST_COMPLETED)
        if not self._pipe.ended.done():
            reason = f"The engine has made no progress for {self.info.config.engine_hang_timeout:g} s (a hang)."
        elif (fault := self._pipe.ended.result()) is not None:
            # Whatever went wrong here, nobody would ever be answered again: that is a dead engine.
            reason = f"The engine's messages could not be handled ({fault!r})."
        else:
            self.error = "The engine process has ended."  # seen at once, and told in full when it has exited
            code = await asyncio.to_thread(self._process.end, EXIT_SECONDS)
            reason = "The server is shutting down." if self._closing else f"The engine process has ended (code {code})."
        hang.cancel()
        self.error = reason
        self.stats = msgspec.structs.replace(self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        for stream in self._streams.values():
            stream._die(reason)
        self._streams.clear()
        self._grammars.die(reason)
        if not self._closing:
            self._died.set()
        self._pipe.close()
        await asyncio.to_thread(self._process.end)

    async def _silence(self) -> None:
        """Return when the engine has said nothing for `engine_hang_timeout`, although it was asked to.

        A word of the engine is a sign that its main loop moves on: a step's outputs, an answer to a ping, or that
        another layer of a long step is done. Time is counted in looks, so that a pause of this process is not held
        against the engine, whose words have piled up meanwhile.
        """
        heard, silent = self._pipe.num_heard, 0
        while silent < LOOKS - 1:  # its last word may be up to one look older than the first of these
            await asyncio.sleep(self.info.config.engine_hang_timeout / LOOKS)
            silent = silent + 1 if self._pipe.num_heard == heard else 0
            heard = self._pipe.num_heard
            if silent == LOOKS // 3:
                self._pipe.send(Ping())

    def _dispatch(self, message: FromEngine) -> None:
        """Hand out what a step has brought; one call, and one wake-up of each reader, for all of it."""
        if isinstance(message, Alive):
            return
        if not isinstance(message, StepOutputs):
            raise TypeError(f"{type(message).__name__} in the middle of the conversation")
        self.stats = message.stats
        for verdict in message.verdicts:
            self._grammars.resolve(verdict)
        now = time.monotonic()
        aborts: list[str] = []
        if message.stats.step_tokens:  # who has ended in this step leaves a place that the next step gives away
            ended = sum(output.finish_reason is not None for output in message.outputs)
            self._places = message.stats.num_running + ended
        for token_output in message.outputs:
            wire_id = token_output.request_id
            stream = self._streams.get(wire_id)
            if stream is None:
                continue  # aborted while the step ran
            try:
                output = self._processor.process(token_output, now)
            except Exception as error:
                # A fault in one request's text ends that request and nobody else's.
                output = self._processor.abort(wire_id, error=describe(error))
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
