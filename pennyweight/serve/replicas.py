"""This service on several machines: replicas of it under Ray Serve, and our rule for which of them gets a request.

A replica is the ASGI application in a process of its own, with a scheduler that predicts what is inside and how long one more
request would take; ten times a second it tells both, and ``Balanced`` sends each request by Prequal's rule over those seconds
(``schedule/balance``), in place of Ray Serve's power of two choices over how many requests there are. Placing replicas,
starting lost ones again and the HTTP proxy on each machine are Ray's. What is refused, a replica refuses, so the proxies pass
on as many as come. A request whose replica dies is lost there (Ray answers 500): the front of one machine (``serve/pool``)
loses none, and is faster; this is for more machines than one.

Who asks for events to be kept gives ``store`` a server (Valkey): replicas do not see each other's files.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pennyweight.core.cluster import connected
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.schedule.balance import HotCold, Probe
from pennyweight.serve.app import App

try:
    from ray.serve.request_router import FIFOMixin, RequestRouter
except ImportError:  # said when it is asked for, by ``_serve``

    class FIFOMixin:  # type: ignore[no-redef]
        """In its place."""

    class RequestRouter:  # type: ignore[no-redef]
        """In its place."""


USUAL = 100
"""Items of the request whose time a replica tells."""
TOLD_S = 0.1
"""Seconds between two probes of a replica."""
_here: list[App] = []


class Balanced(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Which replica gets a request: Prequal's rule over what replicas predict of themselves."""

    def initialize_state(self, seed: int = 0) -> None:
        """Called by Ray Serve, once."""
        self.seed, self.rule = seed, HotCold([], seed)
        self.told: dict[str, int] = {}

    async def choose_replicas(self, candidate_replicas: Sequence[Any], pending_request: Any = None) -> list[list[Any]]:
        """The best one first, then the others, should it not take the request."""
        replicas = {str(r.replica_id): r for r in candidate_replicas}
        if not replicas:
            return []
        if set(self.rule.nodes) != set(replicas):
            self.rule, self.told = HotCold(list(replicas), self.seed), {}
        now = time.monotonic()
        usual = []
        for name, replica in replicas.items():
            stats = replica.routing_stats
            if not stats:
                continue
            usual.append(stats["answer_s"] - stats["inside_s"])
            if self.told.get(name) != stats["count"]:  # a new one: on this clock, since machines' clocks differ
                self.told[name] = stats["count"]
                self.rule.heard(Probe(name, stats["inside_s"], stats["answer_s"], now))
        best = self.rule.pick(sum(usual) / len(usual) if usual else 0.0, now)
        return [[replicas.pop(best)], list(replicas.values())] if len(replicas) > 1 else [[replicas[best]]]


class Replica:
    """What Ray Serve keeps of a replica beside its application."""

    def __init__(self) -> None:
        self.count = 0

    def record_routing_stats(self) -> dict[str, float]:
        """Seconds of work inside, and until a usual request would be answered; which probe this is."""
        self.count += 1
        if not _here:
            return {}
        scheduler = _here[0].service.engine.scheduler
        inside = scheduler.drain
        return {"inside_s": inside, "answer_s": inside + scheduler.usual(USUAL), "count": self.count}


def application(bundle: str | Path, replicas: int, store: str = "", allow: Sequence[str] = ()) -> Any:
    """The service as an application of Ray Serve.

    Raises:
        ConfigError: Ray Serve is missing.
    """
    serve = _serve()
    from ray.serve.config import RequestRouterConfig

    path, names = Path(bundle).absolute(), tuple(allow)

    def build() -> App:
        made = App.open(path, store or None, names)
        _here[:] = [made]
        return made

    deployment = serve.deployment(
        name="pennyweight",
        num_replicas=replicas,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 1},
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}.{Balanced.__name__}", request_routing_stats_period_s=TOLD_S
        ),
    )(serve.ingress(build)(Replica))
    return deployment.bind()


def run(
    bundle: str | Path,
    address: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    store: str = "",
    allow: Sequence[str] = (),
    replicas: int = 2,
) -> None:
    """Serve a bundle on a Ray cluster until Ctrl-C; a proxy on each machine listens.

    Args:
        bundle: its folder, the same path on all machines.
        address: of the cluster (``core/cluster``).
        host: an address to listen on.
        port: where.
        store: the event log.
        allow: import paths of factories that may be loaded.
        replicas: how many; each takes a CPU.

    Raises:
        ConfigError: no such kind of address, or Ray Serve is missing.
        DeviceError: the cluster is not reached, or the replicas do not start.
    """
    serve, stop = _serve(), threading.Event()
    from ray.serve.config import HTTPOptions

    with connected(address, replicas + 1):
        serve.start(http_options=HTTPOptions(host=host, port=port))
        try:
            serve.run(application(bundle, replicas, store, allow), route_prefix="/")
        except RuntimeError as error:
            raise DeviceError(f"the replicas did not start: {str(error).strip().splitlines()[-1][:300]}") from error
        print(f"{bundle} is served by {replicas} replicas on http://{host}:{port} (Ctrl-C stops)", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignored, or Ray has its own
            signal.signal(number, signal.default_int_handler)
        try:
            stop.wait()
        except KeyboardInterrupt:
            pass
        finally:
            serve.shutdown()


def _serve() -> Any:
    """Ray Serve.

    Raises:
        ConfigError: it is missing.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError("serving on a cluster needs Ray Serve: pip install 'pennyweight[ray-serve]'") from error
    return serve
