"""The verb `serve`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon.cli.options import Verbs, add_model_options, load_options
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.serve.replica import ReplicaOptions

KEY_VARIABLE = "CHAMELEON_API_KEY"


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("serve", serve, "Serve a model: an API in the forms of OpenAI's, and a page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0 takes a free one)")
    parser.add_argument("--name", help="name of the model in answers (default: that of the bundle's folder)")
    parser.add_argument("--api-key", metavar="KEY", help=f"ask clients for this key (default: ${KEY_VARIABLE})")
    parser.add_argument("--api-keys", metavar="FILE", help="ask for one of these: lines of KEY [REQUESTS-PER-MINUTE]")
    parser.add_argument("--open", action="store_true", help="let others use the server without a key")
    parser.add_argument("--max-batch-size", type=int, default=48, help="sequences that run at a time (default: 48)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests in the queue at most (default: 64)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="processes, each with a model (default: 1)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where replicas run (default: local)")
    parser.add_argument("--ray-address", help="Ray cluster to serve on (default: one on this machine)")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of a replica on a Ray cluster (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest request (default: 600)")
    add_model_options(parser)


def serve(arguments: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{error.name} is missing", where="serve", remedy="pip install 'open-chameleon[serve]'") from None
    from chameleon.serve import server
    from chameleon.serve.replica import build_replica

    options = replica_options(arguments)

    def say_where(host: str, port: int) -> None:
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{address}/ (API: {address}/docs)", flush=True)

    if arguments.engine == "ray":
        serve_with_ray(arguments, options, lambda: say_where(arguments.host, arguments.port))
        return
    bound = server.bind(arguments.host, arguments.port)
    host, port = bound.getsockname()[:2]
    if arguments.replicas > 1:
        server.serve_replicas(options, arguments.replicas, bound, lambda: say_where(host, port))
    else:
        server.serve(build_replica(options), bound, lambda: say_where(host, port))


def replica_options(arguments: argparse.Namespace) -> ReplicaOptions:
    """Return the options of each replica. Raise `BadInput` for options that cannot be meant."""
    from chameleon.serve.replica import ReplicaOptions
    from chameleon.serve.settings import LOOPBACK, ApiKey, Limits, check_exposure, read_keys

    keys = read_keys(Path(arguments.api_keys)) if arguments.api_keys else []
    if key := arguments.api_key or os.environ.get(KEY_VARIABLE):
        keys.append(ApiKey(key))
    check_exposure(arguments.host, keys, arguments.open)
    if arguments.replicas < 1 or arguments.max_waiting < 1 or not 0 < arguments.timeout < float("inf"):
        raise BadInput("--replicas, --max-waiting and --timeout must be positive", where="serve")
    threads = arguments.threads
    if threads is None and arguments.replicas > 1 and arguments.engine == "local" and arguments.device == "cpu":
        threads = max(1, (os.cpu_count() or 1) // arguments.replicas)
    return ReplicaOptions(
        model=arguments.model,
        load_options=load_options(arguments),
        name=arguments.name or bundle_name(arguments.model),
        limits=Limits(waiting=arguments.max_waiting, seconds=arguments.timeout),
        keys=tuple(keys),
        hosts=LOOPBACK if arguments.host in LOOPBACK and not keys else (),
        threads=threads,
    )


def serve_with_ray(arguments: argparse.Namespace, options: ReplicaOptions, on_ready: Callable[[], None]) -> None:
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{error.name} is missing", where="serve", remedy="pip install 'open-chameleon[ray]'") from None
    from chameleon.serve.ray_deployment import RayCluster, serve_on_ray

    gpus = 0.0 if arguments.device == "cpu" else 1.0
    cluster = RayCluster(arguments.ray_address, arguments.host, arguments.port, arguments.cpus, gpus)
    serve_on_ray(options, arguments.replicas, cluster, on_ready)


def bundle_name(model: str | None) -> str:
    """Return the name of a bundle: that of its folder."""
    return Path(model).resolve().name if model else "chameleon"
