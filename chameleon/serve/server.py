"""`chameleon serve`: one process, or several replicas that share a port."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from chameleon.errors import BadInput
from chameleon.serve.settings import Limits


class Server(uvicorn.Server):
    """A server that SIGTERM and SIGINT drain: running requests end, new ones get status 503, and the process exits with 0.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(signal_number: int, frame: Any) -> None:
            self.on_stop()
            self.handle_exit(signal_number, frame)

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
    on_ready()
    server.run(sockets=[bound])
