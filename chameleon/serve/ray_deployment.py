"""Replicas on a Ray cluster (Ray Serve): the same routes, behind Ray's proxy on each machine.

A replica that dies is started again, and requests meanwhile go to the others.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chameleon.serve.replica import ReplicaOptions, build_replica

HEALTH_CHECK_SECONDS = 2


@dataclass(frozen=True)
class RayCluster:
    """The cluster on which the replicas run."""

    address: str | None
    """Of the cluster; None starts one on this machine."""
    host: str
    port: int
    """Of the proxies, one on each machine; where Ray Serve runs on the cluster already, they stay where they are."""
    cpus: float
    gpus: float
    """CPUs and GPUs that a replica takes."""


def serve_on_ray(options: ReplicaOptions, replicas: int, cluster: RayCluster, on_ready: Callable[[], None]) -> None:
    """Serve on a cluster until SIGTERM or SIGINT."""
    import ray
    from ray import serve

    ray.init(
        address=cluster.address or "local", log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True
    )
    timeout = options.limits.seconds
    http_options = {"host": cluster.host, "port": cluster.port, "location": "EveryNode", "request_timeout_s": timeout}
    serve.start(http_options=http_options)

    def build() -> Any:  # Ray takes a function, not a partial
        return build_replica(options)

    replica: Any = serve.ingress(build)()
    deployment: Any = serve.deployment(
        replica,
        name="chameleon",
        num_replicas=replicas,
        max_ongoing_requests=2 * options.limits.waiting,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        health_check_timeout_s=5 * HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=options.limits.drain_seconds,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    )
    serve.run(deployment.bind(), name="chameleon", route_prefix="/")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    on_ready()
    stopped.wait()
    if cluster.address is None:
        serve.shutdown()
    else:  # others may use the cluster's Ray Serve
        serve.delete("chameleon")
