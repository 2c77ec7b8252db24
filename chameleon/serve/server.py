"""`chameleon serve`: one process, or several replicas that share a port."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from chameleon.bundle import SHIPPED, read_header
from chameleon.errors import BadInput
from chameleon.serve.metrics import MULTIPROCESS_FOLDER
from chameleon.serve.replica import ReplicaOptions, build_replica
from chameleon.serve.settings import Limits

HEALTH_CHECK_SECONDS = 20
"""A replica that does not answer for so long is started again."""


class Server(uvicorn.Server):
    """A server that SIGTERM and SIGINT drain: running requests end, no others are accepted, and the process exits with 0.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(signal_number: int, frame: Any) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            self.on_stop()

        old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises `BadInput` where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise BadInput(
            f"cannot listen there ({error.strerror or error})", where=f"{host}:{port}", remedy="choose another --port"
        ) from None
    bound.set_inheritable(True)
    return bound


def config_of(app: Any, limits: Limits, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration: no access log, since addresses are the clients' own affair."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(limits.drain_seconds),
        timeout_keep_alive=30,
        **options,
    )


def serve(app: FastAPI, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve an application on a socket until a signal comes."""
    service = app.state.service

    def stop() -> None:
        service.is_draining = True

    server = Server(config_of(app, service.limits), stop)
    bound.listen()  # who comes from here on is answered
    on_ready()
    server.run(sockets=[bound])


def build_or_exit(options: ReplicaOptions) -> FastAPI:
    """Build a replica in its process; one that cannot be built ends all of them, since another would fail as well."""
    try:
        return build_replica(options)
    except BadInput as error:
        print(f"chameleon serve: {error}", file=sys.stderr)
        raise SystemExit(STARTUP_FAILURE) from None


class Replicas(Multiprocess):
    """Processes that share a socket. One that dies is started again; SIGTERM drains all."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], on_ready: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self.on_ready = on_ready

    def init_processes(self) -> None:
        super().init_processes()
        while not all(process.is_ready(timeout=0.2) for process in self.processes):
            self.handle_signals()
            has_failed = not all(process.process.is_alive() for process in self.processes)
            if self.should_exit.is_set() or has_failed:
                return
        self.on_ready()

    def keep_subprocess_alive(self) -> None:
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            mark_process_dead(pid)

    def terminate_all(self) -> None:
        for bound in self.sockets:  # nobody is to wait here who will not be answered
            bound.close()
        super().terminate_all()


def serve_replicas(options: ReplicaOptions, replicas: int, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve with several processes, each with a model of its own, until a signal comes."""
    read_header(Path(options.model) if options.model else SHIPPED)  # what is wrong with it is said once, here
    with TemporaryDirectory(prefix="chameleon-metrics-") as folder:
        os.environ[MULTIPROCESS_FOLDER] = folder
        config = config_of(partial(build_or_exit, options), options.limits, factory=True, workers=replicas)
        config.timeout_worker_healthcheck = HEALTH_CHECK_SECONDS
        try:
            supervisor = Replicas(config, [bound], on_ready)
            supervisor.run()
        finally:
            del os.environ[MULTIPROCESS_FOLDER]
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise BadInput("a replica cannot be started, for the reason above", where="serve")
