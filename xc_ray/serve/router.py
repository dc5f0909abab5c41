"""The decoder's request router: requests go to the replica that holds their beginning or adapter.

Serve makes one for each handle, that is for each ingress replica. The choice is `affinity`'s; what
Serve's own part adds: of the ranks the first that has a free slot (`max_ongoing_requests`) gets the
request, and after all of them it waits a moment and asks anew.

`FIFOMixin` is left out on purpose: with it a replica that was chosen for one request is given to
the one that waits longest.
"""

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from xc_ray.serve import door
from xc_ray.serve.affinity import Affinity, loaded_of
from xc_ray.serve.observe import RoutingMetrics
from xc_ray.serve.prefixes import Route

ROUTE = "route"  # the keyword of a call that carries it
STATS_PERIOD_S = 2.0
NOTHING = Route()


def router_config(load_factor: float, free_tokens: int) -> RequestRouterConfig:
    """The decoder deployment's `request_router_config`; the parameters are `Affinity`'s."""
    options: dict[str, Any] = {
        "request_router_class": DecoderRouter,
        "request_router_kwargs": {"load_factor": load_factor, "free_tokens": free_tokens},
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }
    return RequestRouterConfig(**options)


class DecoderRouter(RequestRouter):
    """Calls with `route=Route(...)` by affinity, others to the shorter of two queues.

    All of it runs on one event loop. A request's tokens count from the choice on, so that those
    that are chosen for at the same time see one another. Serve tells calls apart by the HTTP
    request that they were made for: one at a time for each.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Takes `request_router_kwargs`."""
        self._affinity = Affinity(**kwargs)
        self._metrics = RoutingMetrics()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the most preferred first."""
        if pending_request is None:
            return [candidate_replicas]
        # Without it Serve asks again at once, as long as all are full.
        pending_request.routing_context.should_backoff = True
        route = _route(pending_request)
        by_name = {r.replica_id.unique_id: r for r in candidate_replicas}
        loaded = {name: loaded_of(r.routing_stats) for name, r in by_name.items()}
        ranks = self._affinity.rank(route, by_name, loaded)
        if route.tokens:
            self._expect(pending_request, route, ranks[0][0])
        return [[by_name[name] for name in names] for names in ranks]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Other replicas than before, or the same with news of their adapters."""
        super().update_replicas(replicas)
        self._forget_the_others()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is found dead before the controller says so."""
        super().on_replica_actor_died(replica_id)
        self._forget_the_others()

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica took the request."""
        route, name = _route(pending_request), replica_id.unique_id
        if not route.tokens:
            return
        self._metrics.routed(self._affinity.held(route, name))
        self._affinity.note(route, name)
        self._affinity.outstanding.place(_id(pending_request), name, route.tokens)
        self._metrics.outstanding(self._affinity.outstanding.total)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request ended, or was refused by a replica that was full after all."""
        self._affinity.outstanding.release(internal_request_id, replica_id.unique_id)
        self._metrics.outstanding(self._affinity.outstanding.total)

    def _expect(self, request: PendingRequest, route: Route, replica: str) -> None:
        """Counts a request to the replica that will likely take it, until one has or it is gone."""
        outstanding, name = self._affinity.outstanding, _id(request)
        outstanding.place(name, replica, route.tokens)

        def chosen(future: Any) -> None:
            if future.cancelled() or future.exception():
                outstanding.release(name)
            else:
                outstanding.move(name, future.result().replica_id.unique_id)

        request.future.add_done_callback(chosen)

    def _forget_the_others(self) -> None:
        names = {r.unique_id for r in self.curr_replicas}
        self._affinity.outstanding.keep(names)
        # By its module: Serve brings this one by value, and a DOOR with it.
        door.DOOR.set_decoders(names)


def _route(request: PendingRequest) -> Route:
    route = request.kwargs.get(ROUTE)
    return route if isinstance(route, Route) else NOTHING  # whatever raises here hangs the call


def _id(request: PendingRequest) -> str:
    return str(request.metadata.internal_request_id)
