"""The choice of a replica for each request, in the interface of Ray Serve's request routers."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .affinity import Owners, decode_route


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that holds its beginning, unless that one is clearly busier.

    It reads the route that `Front` has put where Serve expects the name of a session. Without `Front`, that is the name
    of the client's session, if it sends one.
    """

    def initialize_state(self, **_: Any) -> None:
        """Begin with an empty table; Ray Serve calls it once."""
        self._owners: Owners[str] = Owners()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which to try them."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # once all have refused
        route = decode_route(pending_request.metadata.session_id)
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        usable = {name: replica for name, replica in named.items() if name not in route.avoid} or named
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in usable.items()}
        return [[named[name]] for name in self._owners.order(route, loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note which replica computes the request."""
        self._owners.record(decode_route(pending_request.metadata.session_id), replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has ended by itself."""
        super().on_replica_actor_died(replica_id)
        self._owners.drop(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget the replicas that are not among these."""
        gone = {known.unique_id for known in self.curr_replicas} - {r.replica_id.unique_id for r in replicas}
        super().update_replicas(replicas)
        for name in gone:
            self._owners.drop(name)
