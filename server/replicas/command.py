"""`pyllm serve --replicas`: starts Ray, or joins a cluster, deploys the application and drains it at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..flags import ConfigError, ServerConfig, option
from ..lifetime import STOP_SIGNALS, Lifetime
from ..listen import listen_on_addresses

logger = logging.getLogger("pyllm.server")

FRONT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pyllm.server.replicas.front:middlewares"}
FAST = {
    "RAY_SERVE_PROXY_USE_GRPC": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}  # fmt: skip
"""Passes answers by gRPC rather than as Ray's objects, and in one thread: 40 instead of 71 ms of processor time for an
answer of 64 pieces."""
ENVIRONMENT = FRONT | FAST | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
"""What Ray's processes on this machine find in their environment, unless it is set already."""
OBJECT_STORE_BYTES = 2**28  # for bodies on their way; the machine's memory is for models
FAILURE = re.compile(r"ReplicaStartError: (.+)")
POLL_SECONDS = 0.2
WATCH_SECONDS = 2.0
MAX_MISSES = 5  # looks at the replicas in a row that fail, after which Ray counts as ended
STOP_SECONDS = 15.0  # in addition to --shutdown-timeout, for Ray to end what is idle


def check_replicas(config: ServerConfig) -> None:
    """Raise `ConfigError` for flags that do not go together with `--replicas`, or that need it."""
    if config.replicas is None:
        for name in ("max_replicas", "ray_address"):
            if getattr(config, name) is not None:
                raise ConfigError(f"{option(name)} is for replicas: add --replicas.")
        return
    if config.uds is not None:
        raise ConfigError("--uds is a socket of one server: with --replicas, use --host and --port.")
    if config.batch_dir is not None:
        raise ConfigError("--batch-dir belongs to one server: run one for batches, without --replicas.")
    if config.kv_events_config is not None and config.kv_events_config.enabled:
        raise ConfigError("--kv-events-config names a port, which only one replica can use: leave out --replicas.")
    if config.max_replicas is not None and config.max_replicas < config.replicas:
        raise ConfigError(f"--max-replicas {config.max_replicas} is less than --replicas {config.replicas}.")
    if config.ray_address and not config.port:
        raise ConfigError("--port 0 picks a port of this machine: with --ray-address, name one.")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--replicas needs Ray: pip install 'pyllm-deep[ray]'.")


def serve_replicas(config: ServerConfig, _: object, lifetime: Lifetime) -> int:
    """Serve until a signal arrives; return the exit code. Raises `ConfigError` if it cannot start."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    fleet = _Fleet(config)
    lifetime.on_stop = fleet.on_signal
    try:
        return fleet.run()
    finally:
        lifetime.settle(1)  # from now on, a signal does not wait
        fleet.end()


class _Fleet:
    """The replicas of this command, on a Ray of its own or on a cluster."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._address = config.ray_address
        self._began = time.monotonic()
        self._stop, self._force = threading.Event(), threading.Event()
        self._stopped_by = ""
        self._owns_serve = False

    def on_signal(self, number: signal.Signals) -> None:
        """Begin to stop; at the second signal, without waiting for running requests."""
        (self._force if self._stop.is_set() else self._stop).set()
        self._stopped_by = self._stopped_by or number.name

    def run(self) -> int:
        """Deploy the replicas, watch them, and drain them once a signal has arrived; return the exit code."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._connect()
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        if self._stopped(self._deploy):
            return 0
        code = self._watch()
        if code == 0:
            logger.info("Stopping on %s; running requests may finish", self._stopped_by)
            self._stopped(self._delete, self._force, self._config.shutdown_timeout + STOP_SECONDS)
        return 1 if self._force.is_set() else code

    def _stopped(self, work: Callable[[], None], event: threading.Event | None = None, seconds: float = 1e9) -> bool:
        """Work in a thread until it is done, the event happens or time is over; return whether it is not done."""
        failures: list[Exception] = []

        def guarded() -> None:
            try:
                work()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        deadline = time.monotonic() + seconds
        while thread.is_alive() and not (event or self._stop).is_set() and time.monotonic() < deadline:
            thread.join(POLL_SECONDS)
        if failures:
            raise failures[0]
        return thread.is_alive()

    def _connect(self) -> None:
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        from ray import serve  # sets up its logger

        del serve
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            ray.init(self._address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            where = f"--ray-address {self._address}" if self._address else "Ray on this machine"
            raise ConfigError(f"{where} cannot be used: {reason}.") from None

    def _deploy(self) -> None:
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client

        from .application import APPLICATION, build

        config = self._config
        gpus = int(ray.cluster_resources().get("GPU", 0))
        on_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
        if on_gpu and self._address is None and gpus < (config.replicas or 0):
            raise ConfigError(f"--replicas {config.replicas} needs as many GPUs, but Ray finds {gpus}.")
        host, port = config.host, config.port
        if self._address is None:
            sockets = listen_on_addresses(host, port)  # says what is wrong with the address
            host, port = sockets[0].getsockname()[:2]
            for listener in sockets:
                listener.close()
        self._owns_serve = _get_global_client(raise_if_no_controller_running=False) is None
        files = {name: str(Path(path).expanduser().absolute()) for name, path in self._certificate.items()}
        serve.start(
            proxy_location="EveryNode" if self._address else "HeadOnly",
            http_options={"host": host, "port": port} | files,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            controller_options={"runtime_env": {"env_vars": FRONT | FAST}},
        )
        self._http = _get_global_client().http_config
        if files and not self._http.ssl_certfile:
            raise ConfigError("Ray Serve already runs on this cluster, without TLS: leave --ssl-certfile out.")
        try:
            serve.run(build(config), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            status = serve.status().applications[APPLICATION]
            said = [status.message, *(each.message for each in status.deployments.values())]
            found = FAILURE.findall("\n".join(said))
            raise ConfigError(found[-1] if found else f"Ray Serve cannot deploy it: {error}") from None

    @property
    def _certificate(self) -> dict[str, str]:
        files = {"ssl_keyfile": self._config.ssl_keyfile, "ssl_certfile": self._config.ssl_certfile}
        return {name: path for name, path in files.items() if path}

    def _watch(self) -> int:
        """Report the replicas until a signal arrives; return 1 if Ray has ended."""
        import ray

        host, port = self._http.host, self._http.port
        scheme = "https" if self._http.ssl_certfile else "http"
        base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self._config.root_path}"
        last, misses = self._count(), 0
        logger.info(
            f"Ready after {time.monotonic() - self._began:.1f} s, {last}: chat page {base}/, reference {base}/docs, "
            f"metrics of each replica {base}/metrics, Ray {ray.get_runtime_context().gcs_address}, API on {base}/v1"
        )
        while not self._stop.wait(WATCH_SECONDS):
            try:
                now, misses = self._count(), 0
            except Exception:  # Ray raises many types
                misses += 1
                if misses == MAX_MISSES:
                    logger.error("Ray has ended.")
                    return 1
                continue
            if now != last:
                logger.info(f"Now {now}")
            last = now
        return 0

    @staticmethod
    def _count() -> str:
        """Describe the replicas, as in `2 replicas running, 1 starting`."""
        from ray import serve

        from .application import APPLICATION, DEPLOYMENT

        states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
        counts = {str(getattr(state, "value", state)).lower(): count for state, count in states.items() if count}
        running = counts.pop("running", 0)
        parts = [f"{running} replica{'s' * (running != 1)} running"]
        return ", ".join([*parts, *(f"{count} {state}" for state, count in sorted(counts.items()))])

    def _delete(self) -> None:
        from ray import serve

        from .application import APPLICATION

        serve.delete(APPLICATION)

    def end(self) -> None:
        """End what this command has started."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):
            if self._owns_serve and self._address is not None:
                serve.shutdown()
        ray.shutdown()
