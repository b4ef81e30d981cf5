"""`pyllm serve`: owns the event loop, the listening socket, the engine's life and the signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.lowlevel
import uvicorn
import uvloop

from .. import __version__
from ..engine.client.launch import EngineProcess
from .app import create_app
from .chat.served_model import ServedModel, load
from .flags import ConfigError, ServerConfig
from .generation.tracing import Tracing
from .http.limits import ConnectionLimits, ConnectionMonitor
from .http.protocol import HttpProtocol
from .restarts import Restarts
from .service import Service

logger = logging.getLogger("pyllm.server")

KEEP_ALIVE_SECONDS = 60
UNSENT_BYTES = 128 * 2**10
"""Limit of the bytes in the system's send buffer, so that the server notices a client that does not read."""
LAST_WORDS_SECONDS = 2.0
"""How long clients get to hear that their request has failed, before the server ends."""

TLS_GOODBYE_SECONDS = 1.0
"""In which a client may agree to the end of its HTTPS connection. Many never do, and have their place until then."""

MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""What OpenSSL says of a key and a certificate that are no pair."""


def serve(config: ServerConfig, process: EngineProcess) -> int:
    """Serve with the engine of `process` until a signal comes or that dies; return the exit code.

    Raises `ConfigError`, or what `load` raises, each with one plain sentence, when it cannot start.
    """
    _check_certificate(config)
    if config.isolate_cache_by_key and not config.api_key:
        raise ConfigError("--isolate-cache-by-key needs keys to tell clients apart by: give --api-key.")
    tracing = Tracing(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    sockets = [] if config.uds else _bind(config.host, config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = _ServerProcess(config, process, sockets, tracing)
        code = runner.run(server.run())
        if server.interrupted_loading:
            # A download may still run in a thread, which the interpreter would wait for.
            process.kill()
            sys.stderr.flush()
            os._exit(code)
    if tracing is not None:
        tracing.close()
    return code


def _check_certificate(config: ServerConfig) -> None:
    """Raise `ConfigError` where the key and the certificate for HTTPS cannot be used."""
    if config.ssl_keyfile is None and config.ssl_certfile is None:
        return
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        raise ConfigError("HTTPS needs both --ssl-keyfile and --ssl-certfile.")
    for flag, path in (("--ssl-keyfile", config.ssl_keyfile), ("--ssl-certfile", config.ssl_certfile)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    try:
        # An encrypted key would be asked for its password on the terminal; with an empty one it is refused.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: "")
    except ssl.SSLError as error:
        said = error.reason.replace("_", " ").lower() if error.reason else "not unencrypted PEM"
        reason = "they do not belong together" if error.reason in MISMATCHES else said
        pair = f"--ssl-keyfile {config.ssl_keyfile} and --ssl-certfile {config.ssl_certfile}"
        raise ConfigError(f"{pair} cannot be used: {reason}.") from None


def _bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for the addresses of `host` that this machine has; raise `ConfigError` if one of them cannot be had."""
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(socket.create_server((address[0], chosen, *address[2:]), family=family))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # as ::1 is where there is no IPv6, although `localhost` names it
        if absent is not None and not sockets:
            raise absent
    except OSError as error:
        for listener in sockets:
            listener.close()
        reason = (error.strerror or str(error)).lower().partition(" (while")[0]
        raise ConfigError(f"Cannot listen on {host}:{port} ({reason}): choose another --host or --port.") from None
    for listener in sockets:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections have it from their listener
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return sockets


class _HttpServer(uvicorn.Server):
    handshake_timeout: float

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to us: uvicorn would close its listeners at the first one, while streams still run."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; a TLS handshake has the time of a header, and its end a moment: uvicorn leaves them 60 and 30 s."""
        config, loop = self.config, asyncio.get_running_loop()
        if config.ssl is None or sockets is None:
            await super().startup(sockets)
            return

        def protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            made: asyncio.Protocol = make(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            return made

        self.servers = [
            await loop.create_server(
                protocol, sock=listener, ssl=config.ssl, backlog=config.backlog,
                ssl_handshake_timeout=self.handshake_timeout, ssl_shutdown_timeout=TLS_GOODBYE_SECONDS,
            )
            for listener in sockets
        ]  # fmt: skip
        self.started = True


class _ServerProcess:
    """The order of things from start to end."""

    def __init__(
        self, config: ServerConfig, process: EngineProcess, sockets: list[socket.socket], tracing: Tracing | None = None
    ) -> None:
        self.interrupted_loading = False
        self._config = config
        self._process = process
        self._sockets = sockets
        self._service = Service(config, tracing=tracing)
        protocol = functools.partial(HttpProtocol, monitor=ConnectionMonitor(ConnectionLimits.from_config(config)))
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(self._service), uds=config.uds,
                http=protocol, ws="none",  # type: ignore[arg-type]  # it is only ever called
                ssl_keyfile=config.ssl_keyfile, ssl_certfile=config.ssl_certfile, lifespan="off",
                log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._http.handshake_timeout = config.header_timeout
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    async def run(self) -> int:
        """Listen at once, load, serve, end; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        http = loop.create_task(self._http.serve(sockets=self._sockets or None))
        try:
            model = await self._load(http)
            if model is None:
                return 0 if self._stop.is_set() else _http_ended(http)
            return await self._serve_until_end(model, http)
        finally:
            self._http.should_exit = True
            self._http.force_exit = self._force.is_set()
            await asyncio.wait([http])

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    async def _load(self, http: asyncio.Task[None]) -> ServedModel | None:
        """Load the model; None when a signal or the end of the HTTP server came first."""
        loading = asyncio.create_task(load(self._config, self._process, names=self._config.served_model_name))
        await anyio.lowlevel.checkpoint()  # loads its event loop's part, which else the first stream would wait for
        await _first_of(loading, http, self._stop.wait())
        if not loading.done():
            loading.cancel()
            if self._config.uds and http.done() and isinstance(error := http.exception(), OSError):
                raise ConfigError(
                    f"Cannot listen on the socket {self._config.uds} ({error.strerror}): choose another --uds."
                )
            self.interrupted_loading = True
            with contextlib.suppress(asyncio.CancelledError):
                await loading
            return None
        self._service.model = model = loading.result()
        gc.freeze()  # what is there now stays: the collector need not look at it again and again while chunks are made
        self._announce(model, time.monotonic() - self._process.started)
        return model

    def _announce(self, model: ServedModel, seconds: float) -> None:
        info = model.engine.info
        source = f"read from {'/'.join(info.file_dtypes)} files" if info.file_dtypes else "made at random"
        logger.info(
            "PyLLM %s serves %s: era %s, %s parameters, %s in %.1f s, computed in %s on %s by %s",
            __version__, ", ".join(model.names), info.era, f"{info.parameters:,}", source, info.load_seconds,
            info.dtype if info.quantization == "none" else f"{info.quantization} and {info.dtype}", info.device,
            {"native": "compiled kernels", "triton": "Triton kernels", "torch": "plain torch"}[info.kernels],
        )  # fmt: skip
        logger.info(
            "KV cache of %s tokens%s, %.1f requests of the full %s; at most %d sequences at a time",
            f"{info.kv_capacity_tokens:,}", " in FP8" if info.kv_cache_dtype == "fp8" else "",
            info.kv_capacity_tokens / info.max_model_len, f"{info.max_model_len:,}",
            info.max_num_seqs,
        )  # fmt: skip
        if info.graph_sizes:
            logger.info(
                "CUDA graphs of decodes of %d sizes to %d and of other steps to %d tokens, made in %.1f s and %d MiB",
                len(info.graph_sizes), info.graph_sizes[-1], max(info.mixed_graph_sizes, default=0), info.graph_seconds,
                info.graph_bytes >> 20,
            )  # fmt: skip
        url = f"the socket {self._config.uds}" if self._config.uds else _url(self._sockets[0], self._config)
        logger.info("Ready after %.1f s on %s", seconds, url)

    async def _serve_until_end(self, model: ServedModel, http: asyncio.Task[None]) -> int:
        """Wait for a signal or the engine's last death, let requests end, and end the engine."""
        restarts = Restarts(self._config.restart_engine)
        told = False  # of the engine's death, and everybody who waited then
        while True:
            engine = model.engine
            death = asyncio.create_task(engine.wait_dead())
            await _first_of(death, http, self._stop.wait())
            if self._stop.is_set() or http.done():
                break
            reviving = asyncio.create_task(restarts.revive(self._service, model))
            await _first_of(reviving, http, self._stop.wait())
            if not reviving.done():
                reviving.cancel()
                await asyncio.wait([reviving])
                told = True
                break
            if (revived := reviving.result()) is None:
                break
            model = revived
        self._service.draining = True
        if self._stop.is_set():
            logger.info("Stopping; requests that still run: %d", self._service.in_flight)
            await _first_of(self._drained(self._config.shutdown_timeout), death, self._force.wait())
            code = 1 if self._force.is_set() or (death.done() and not told) else 0
        elif http.done():
            code = _http_ended(http)
        else:
            logger.error("The engine has died: %s The server ends.", engine.error)
            code = 1
        death.cancel()
        # Requests that still run end with an error, which their clients get to hear.
        await engine.shutdown(timeout=0.1 if code else 5.0)
        await _first_of(self._drained(LAST_WORDS_SECONDS), self._force.wait())
        return code

    async def _drained(self, seconds: float) -> None:
        """Wait until no request runs, for at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.idle.wait(), seconds)


def _http_ended(http: asyncio.Task[None]) -> int:
    """Say that the HTTP server has ended of itself; return the exit code."""
    logger.error("The HTTP server has ended of itself, and PyLLM with it.", exc_info=http.exception())
    return 1


def _url(listener: socket.socket, config: ServerConfig) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.root_path}/v1"


async def _first_of(*things: Any) -> None:
    """Wait until one of these tasks and coroutines is done; the coroutines are then cancelled, the tasks go on."""
    own = [asyncio.ensure_future(thing) for thing in things if not isinstance(thing, asyncio.Future)]
    given = [thing for thing in things if isinstance(thing, asyncio.Future)]
    await asyncio.wait([*own, *given], return_when=asyncio.FIRST_COMPLETED)
    for task in own:
        task.cancel()
