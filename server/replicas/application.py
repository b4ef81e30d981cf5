"""The application for Ray Serve: one deployment, each of whose replicas is a whole server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from starlette.types import Receive, Scope, Send

from ...engine.config import MAX_NUM_SEQS, from_values
from ..flags import ServerConfig
from .child import ServerChild
from .exposition import merge_expositions, sample
from .relay import Relay, fetch
from .settings import replica_settings

APPLICATION, DEPLOYMENT = "pyllm", "server"  # their names in Ray Serve
MAX_ONGOING = 4096  # requests in a replica, whose own queue refuses more than it can hold
BUSY_SHARE = 0.8  # of a replica's sequences, or of its KV cache, above which more replicas start
KV_CACHE_USAGE = "pyllm:kv_cache_usage_perc"
HEALTH_SECONDS, HEALTH_TIMEOUT = 1.0, 10.0
MAX_STARTS = 2  # failed ones in a row, at the first deployment
STOP_SECONDS = 10.0  # to end a server that has no requests any more
CHECK_SECONDS = 5.0  # for the metrics of all replicas


def app(args: Mapping[str, Any]) -> serve.Application:
    """Build the application of a Serve config; `args` are flags of `pyllm serve`, with underscores.

    `replicas` is how many there are, and `max_replicas` up to how many there may be. Raises `ValueError` for an unknown
    flag or value.
    """
    values = {name.replace("-", "_"): value for name, value in args.items()}
    return build(from_values(ServerConfig, values))


def build(config: ServerConfig) -> serve.Application:
    """Build the application for a connected Ray."""
    replicas = config.replicas or 1
    most = max(replicas, config.max_replicas or 0)
    on_gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    resources = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": cpus_for_each(most)}
    options: dict[str, Any] = {"num_replicas": replicas}
    if config.max_replicas is not None:
        target = BUSY_SHARE * (config.max_num_seqs or MAX_NUM_SEQS["cuda" if on_gpu else "cpu"])
        options = {"autoscaling_config": AutoscalingConfig(
            min_replicas=replicas, max_replicas=most, target_ongoing_requests=target,
            policy=AutoscalingPolicy(policy_function=scale_by_load),
        )}  # fmt: skip
    deployment = Server.options(
        **options, ray_actor_options=resources,
        graceful_shutdown_timeout_s=config.shutdown_timeout + STOP_SECONDS,
    )  # fmt: skip
    return deployment.bind(replica_settings(config), config.shutdown_timeout)


def cpus_for_each(replicas: int) -> float:
    """Return how many cores each replica can have on the cluster's machines; a part of one if several must share it."""
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for cores in range(max(machines, default=1), 0, -1):
        if sum(machine // cores for machine in machines) >= replicas:
            return cores
    shared = next((n for n in range(2, 1000) if sum(machine * n for machine in machines) >= replicas), 1000)
    return int(100 / shared) / 100


def scale_by_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return how many replicas the requests, or the KV caches, need."""
    now = context.current_num_replicas
    if now == 0:
        return context.target_num_replicas, {}
    by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
    usage = list((context.aggregated_metrics or {}).get(KV_CACHE_USAGE, {}).values())
    by_memory = sum(usage) / len(usage) * now / BUSY_SHARE if usage else 0.0
    return max(by_requests, by_memory), {}


class _Replica:
    """A server, and the way to it."""

    async def __init__(self, settings: Mapping[str, Any], shutdown_timeout: float) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        assigned = ray.get_runtime_context().get_assigned_resources()
        cores = 0 if assigned.get("GPU") else int(assigned.get("CPU", 0))
        self._name = context.replica_id.unique_id
        self._application, self._deployment = context.app_name, context.deployment
        self._shutdown_timeout = shutdown_timeout
        self._child = ServerChild(settings, cores)
        await self._child.wait_ready()

    def __serve_build_asgi_app__(self) -> Any:
        """Return what answers this replica's requests."""
        relay = Relay(self._child.socket, self._name)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                while (kind := (await receive())["type"]) in ("lifespan.startup", "lifespan.shutdown"):
                    await send({"type": f"{kind}.complete"})  # type: ignore[misc]
                    if kind == "lifespan.shutdown":
                        return
            elif scope["path"].rstrip("/") == f"{scope.get('root_path', '')}/metrics" and scope["method"] == "GET":
                text = await self._all_expositions()
                headers = [(b"content-type", CONTENT_TYPE_LATEST.encode())]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": text.encode()})
            else:
                await relay(scope, receive, send)

        return answer

    async def check_health(self) -> None:
        """Raise an error if the server cannot serve, so that Ray Serve replaces this replica."""
        await self._child.check()

    async def exposition(self) -> tuple[str, str]:
        """Return this replica's name and metrics."""
        try:
            _, text = await fetch(self._child.socket, "/metrics")
        except OSError:
            text = b""
        return self._name, text.decode()

    async def _all_expositions(self) -> str:
        handle = serve.get_deployment_handle(self._deployment, self._application)
        found = await handle.broadcast("exposition").results_async(timeout_s=CHECK_SECONDS, return_exceptions=True)
        return merge_expositions(dict(sorted(pair for pair in found if isinstance(pair, tuple))))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return how full the KV cache is, for `scale_by_load`."""
        return {KV_CACHE_USAGE: sample((await self.exposition())[1], KV_CACHE_USAGE)}

    async def __del__(self) -> None:
        """End the server; Ray Serve calls it when the last request has its answer."""
        if (child := getattr(self, "_child", None)) is not None:
            await child.stop(self._shutdown_timeout)


Server = serve.deployment(
    name=DEPLOYMENT, max_ongoing_requests=MAX_ONGOING, graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=HEALTH_TIMEOUT, max_constructor_retry_count=MAX_STARTS,
    request_router_config=RequestRouterConfig(request_router_class="pyllm.server.replicas.router:PrefixRouter"),
)(serve.ingress()(_Replica))  # fmt: skip
"""The deployment; a Serve config may override its options under this name."""
