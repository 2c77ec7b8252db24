"""A replica: a process with a model of its own. One serves alone, several share a port or a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI

from chameleon.generation.chameleon import Chameleon
from chameleon.serve.app import build_app
from chameleon.serve.settings import ApiKey, Limits
from chameleon.threads import set_threads


@dataclass(frozen=True)
class ReplicaOptions:
    """All that a replica needs to know; it can be sent to another process."""

    model: str | None
    """Folder of the bundle; None is the shipped one."""
    load_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `Chameleon.load`."""
    name: str = "chameleon"
    limits: Limits = field(default_factory=Limits)
    keys: tuple[ApiKey, ...] = ()
    hosts: tuple[str, ...] = ()
    """Names by which the server may be addressed; empty for any."""
    threads: int | None = None
    """Threads of an operation; None leaves them to each operation's work."""


def build_replica(options: ReplicaOptions) -> FastAPI:
    """Load the model and return the application."""
    if options.threads is not None:
        set_threads(options.threads)
    load = partial(Chameleon.load, options.model, **options.load_options)
    return build_app(load, name=options.name, limits=options.limits, keys=options.keys, hosts=options.hosts)
