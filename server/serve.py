"""`pyllm serve`: owns the event loop, the listening sockets, the engine's lifetime and the signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio.lowlevel
import uvicorn
import uvloop

from .. import __version__
from ..engine.client.launch import EngineProcess
from ..engine.host import start_pool, start_threads
from ..engine.messages import EngineInfo
from .api.batches.store import BatchStore
from .api.batches.worker import BatchWorker
from .app import create_app
from .chat.served_model import ServedModel, load
from .flags import ServerConfig
from .generation.tracing import Tracing
from .http.body import POOL, POOL_THREADS
from .http.connection_monitor import ConnectionLimits, ConnectionMonitor
from .http.errors import ApiError
from .http.protocol import HttpProtocol
from .lifetime import Lifetime
from .listen import listen_on_addresses, listen_on_file
from .restarts import Restarts
from .service import Service

logger = logging.getLogger("pyllm.server")

THREADS = 8  # for slow work other than large requests: files, and waiting for the engine to exit
KEEP_ALIVE_SECONDS = 60
PURGE_SECONDS = 60.0  # between two looks for stored responses whose time is over
LAST_ERRORS_SECONDS = 2.0  # to send errors to the requests still running when the server stops
TLS_CLOSE_SECONDS = 1.0  # for the peer's TLS close_notify: many never send it, and stay connected until then
SIGNAL_NAMES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGHUP: "SIGHUP (which reloads nothing)"}
KERNELS = {"native": "compiled kernels", "triton": "Triton kernels", "torch": "plain torch"}


def serve(config: ServerConfig, process: EngineProcess, lifetime: Lifetime) -> NoReturn:
    """Serve with the engine of `process` until a signal arrives or the engine dies; then exit.

    Raises `ConfigError` or an error of `load` if it cannot start; the message is one sentence to show the user.
    """
    batches = None
    if config.batch_dir:
        shared = len(config.api_key) > 1 or config.api_key_file is not None
        batches = BatchStore(Path(config.batch_dir).expanduser(), config.batch_dir_size, shared=shared)
    threads = start_pool(THREADS, "work")
    start_threads(POOL, POOL_THREADS)
    tracing = Tracing(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_default_executor(threads)
        code = runner.run(_ServerProcess(config, process, lifetime, tracing, batches).run())
        if tracing is not None:
            tracing.close()
        # A download or a tokenizer may still run in a thread, for which the loop and the interpreter would wait.
        lifetime.exit(code)


class _HttpServer(uvicorn.Server):
    handshake_timeout: float

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `_ServerProcess`: uvicorn would stop listening at the first one."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with shorter TLS timeouts than uvicorn's 60 s for the handshake and 30 s for the close."""
        config, loop = self.config, asyncio.get_running_loop()
        make: Any = config.http_protocol_class
        state = self.lifespan.state
        protocol = functools.partial(make, config=config, server_state=self.server_state, app_state=state)
        options: Any = {"ssl": config.ssl, "backlog": config.backlog}
        if config.ssl is not None:
            options |= {"ssl_handshake_timeout": self.handshake_timeout, "ssl_shutdown_timeout": TLS_CLOSE_SECONDS}
        self.servers = []
        for listener in sockets or ():
            serve = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
            self.servers.append(await serve(protocol, sock=listener, **options))
        self.started = True


class _ServerProcess:
    """Listens, loads the model, serves and shuts down, in this order."""

    def __init__(
        self, config: ServerConfig, process: EngineProcess, lifetime: Lifetime, tracing: Tracing | None = None,
        batches: BatchStore | None = None,
    ) -> None:  # fmt: skip
        self.sockets: list[socket.socket] = []  # the listening ones
        self._config, self._process, self._lifetime = config, process, lifetime
        self._service = Service(config, tracing=tracing, batches=batches)
        self._app = create_app(self._service)
        self._monitor = ConnectionMonitor(ConnectionLimits.from_config(config), self._service.budget)
        self._http = _HttpServer(
            uvicorn.Config(
                self._app,
                http=functools.partial(HttpProtocol, monitor=self._monitor), ws="none",  # type: ignore[arg-type]  # it is only called
                ssl_keyfile=config.ssl_keyfile, ssl_certfile=config.ssl_certfile, lifespan="off",
                log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._http.handshake_timeout = config.header_timeout
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._stopped_by = ""

    async def run(self) -> int:
        """Run until the end; return the exit code."""
        loop = asyncio.get_running_loop()
        self._lifetime.on_stop = lambda number: loop.call_soon_threadsafe(self._on_signal, number)
        store = self._service.responses
        try:
            await _first_of(opening := asyncio.create_task(store.open()), self._stop.wait())
            if not opening.done():
                opening.cancel()
                return 0
            opening.result()
            # Resolving a name may take long.
            await _first_of(listening := asyncio.create_task(asyncio.to_thread(self._listen)), self._stop.wait())
            if not listening.done():
                return 0
            self.sockets = listening.result()
            return await self._run()
        finally:
            self._lifetime.on_stop = None
            await _first_of(store.close(), seconds=LAST_ERRORS_SECONDS)

    async def _run(self) -> int:
        http = asyncio.create_task(self._http.serve(sockets=self.sockets))
        connections: Any = self._http.server_state.connections  # each is an `HttpProtocol`
        self._monitor.watch(connections)
        try:
            model = await self._load(http)
            if model is None:
                return 0 if self._stop.is_set() else _http_ended(http)
            return await self._serve_until_end(model, http)
        finally:
            self._http.should_exit = True
            self._http.force_exit = self._force.is_set()
            await asyncio.wait([http])

    def _listen(self) -> list[socket.socket]:
        if not self._config.uds:
            return listen_on_addresses(self._config.host, self._config.port)
        listener, remove = listen_on_file(str(Path(self._config.uds).expanduser()))
        self._lifetime.defer(remove)
        return [listener]

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._force.set()
        self._stopped_by = self._stopped_by or SIGNAL_NAMES.get(number, number.name)
        self._stop.set()

    async def _load(self, http: asyncio.Task[None]) -> ServedModel | None:
        """Load the model; return None if a signal or the end of the HTTP server came first."""
        loading = asyncio.create_task(load(self._config, self._process, names=self._config.served_model_name))
        await anyio.lowlevel.checkpoint()  # imports anyio's backend now rather than during the first stream
        await _first_of(loading, http, self._stop.wait())
        if not loading.done():
            loading.cancel()
            if self._stop.is_set():
                logger.info("Stopping on %s while loading.", self._stopped_by)
            with contextlib.suppress(asyncio.CancelledError):
                await loading
            return None
        self._service.model = model = loading.result()
        if (output := self._lifetime.output) is not None:
            model.metrics.log_lines_dropped = lambda: output.num_dropped
        model.metrics.store_is_available = lambda: self._service.responses.is_available
        gc.freeze()  # loaded objects stay, so the garbage collector need not scan them again and again
        self._announce(model)
        return model

    def _announce(self, model: ServedModel) -> None:
        info, config = model.engine.info, model.engine.info.config
        source = f"read from {'/'.join(info.file_dtypes)} files" if info.file_dtypes else "randomly initialized"
        kernels = KERNELS[info.kernels] + (f" for {info.instruction_set}" if info.instruction_set else "")
        dtype = config.dtype if config.quantization == "none" else f"{config.quantization} and {config.dtype}"
        logger.info(
            f"PyLLM {__version__} serves {', '.join(model.names)}: era {info.era}, {info.parameters:,} parameters, "
            f"{source} in {info.load_seconds:.1f} s, computed in {dtype} on {config.device} by {kernels}"
            f"; {info.active_parameters:,} parameters are active for a token: {info.sizes}"
        )
        size, length = info.kv_capacity_tokens, config.max_model_len
        fp8 = " in FP8" if config.kv_cache_dtype == "fp8" else ""
        logger.info(
            f"The KV cache holds {size:,} tokens{fp8}, or {size / length:.1f} requests of {length:,} tokens; "
            f"at most {config.max_num_seqs} sequences run at a time"
        )
        if graphs := info.graphs:
            logger.info(
                f"CUDA graphs for decode steps in {len(graphs.sizes)} sizes up to {graphs.sizes[-1]} and other steps "
                f"of up to {max(graphs.mixed_sizes, default=0)} tokens, captured in {graphs.seconds:.1f} s with "
                f"{graphs.bytes >> 20} MiB"
            )
        self._announce_events(info)
        pages = ""
        if self._config.uds:
            url = f"the socket {self._config.uds}"
        else:
            host, port = self.sockets[0].getsockname()[:2]
            scheme = "https" if self._config.ssl_certfile else "http"
            base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self._config.root_path}"
            pages, url = f": chat page {base}/, reference {base}/docs, API", f"{base}/v1"
        logger.info(f"Ready after {time.monotonic() - self._process.started:.1f} s{pages} on {url}")

    def _announce_events(self, info: EngineInfo) -> None:
        """Log where the events of the KV cache are published, and who can read them."""
        if (events := self._config.kv_events_config) is None:
            return
        if not events.enabled:
            logger.warning("--kv-events-config publishes nothing, since it does not set enable_kv_cache_events to true")
            return
        where, *replay = info.kv_event_endpoints
        logger.info(f"The KV cache's events are published on {where}{''.join(f', with replay on {r}' for r in replay)}")
        if exposed := events.exposed:
            logger.warning(
                f"Every program that can reach {' or '.join(exposed)} can read the tokens of all prompts there: the KV "
                "cache's events are not encrypted and need no key"
            )

    async def _serve_until_end(self, model: ServedModel, http: asyncio.Task[None]) -> int:
        """Wait for a signal or the engine's last death, drain the requests, and end the engine."""
        service = self._service
        supervision = asyncio.create_task(Restarts(self._config.restart_engine).supervise(service, model))
        worker = asyncio.create_task(self._run_batches(model))
        purging = asyncio.create_task(self._purge_responses())
        await _first_of(supervision, http, self._stop.wait())
        restarting = service.restarting != ""  # the requests of the dead engine have failed already
        for task in (supervision, worker, purging):
            task.cancel()
        await asyncio.wait([supervision, worker, purging])
        if not supervision.cancelled():
            supervision.result()
        engine = (service.model or model).engine
        service.draining = True
        if self._stop.is_set():
            logger.info("Stopping on %s; requests in flight: %d", self._stopped_by, service.in_flight)
            timeout = self._config.shutdown_timeout
            await _first_of(service.idle.wait(), engine.wait_dead(), self._force.wait(), seconds=timeout)
            code = 1 if self._force.is_set() or not (engine.is_alive or restarting) else 0
        elif http.done():
            code = _http_ended(http)
        else:
            logger.error("The engine has died: %s Stopping the server.", engine.error)
            code = 1
        self._lifetime.settle(code)
        # Requests in flight fail now, and their clients receive the errors.
        await engine.shutdown(timeout=0.1 if code else 5.0)
        await _first_of(service.idle.wait(), self._force.wait(), seconds=LAST_ERRORS_SECONDS)
        return code

    async def _run_batches(self, model: ServedModel) -> None:
        """Answer batches until cancelled, if there is a folder for them."""
        if (batches := self._service.batches) is not None:
            concurrency = self._config.batch_concurrency or max(model.engine.info.config.max_num_seqs // 4, 1)
            await BatchWorker(batches, self._app, concurrency, lambda: self._service.alive).run()

    async def _purge_responses(self) -> None:
        """Delete stored responses in time, until cancelled."""
        while True:
            await asyncio.sleep(PURGE_SECONDS)
            with contextlib.suppress(ApiError):  # the store is unavailable, which it has logged
                await self._service.responses.purge()


def _http_ended(http: asyncio.Task[None]) -> int:
    """Log why the HTTP server ended by itself; return the exit code."""
    logger.error("The HTTP server has ended unexpectedly; stopping.", exc_info=http.exception())
    return 1


async def _first_of(*things: Any, seconds: float | None = None) -> None:
    """Wait for the first of these tasks and coroutines, or `seconds`; then cancel the coroutines, but not the tasks."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task, thing in zip(tasks, things, strict=True):
        if task is not thing:
            task.cancel()
