"""Token shards on a Ray cluster: actors that each hold the image tokenizer, and one shard a task.

Sources and the output folder have to lie where every node sees them. An actor that is lost, with its process or its node,
loses nothing but the shard it had under way, which another actor is given.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from chameleon.data.tokenize import Engine, Report, Task, TokenizeOptions, make_shards
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import MixedTokenizer

TRIES = 3
"""How often a shard is begun before its loss ends the run, and an actor before its failure does."""
PATIENCE = 300  # seconds without an actor


class Encoder:
    """An actor: makes one shard after the other."""

    def __init__(self, tokenizer: MixedTokenizer, options: TokenizeOptions, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        tokenizer.image.network.to(device)
        self.tokenizer, self.options = tokenizer, options

    def ready(self) -> None:
        """Returns once the actor runs."""

    def make(self, task: Task, workers: int, strict: bool) -> Report:
        (report,) = make_shards([task], self.tokenizer, self.options, workers=workers, strict=strict)
        return report


def ray_engine(address: str | None = None, *, actors: int | None = None, device: str = "cpu") -> Engine:
    """An engine on the cluster at `address`; left out, one is started on this machine and ended afterwards.

    `actors`: how many; by default one for each GPU where `device` is `cuda`, else for each CPU of the cluster. Raises
    `BadInput` where Ray is not installed or no cluster answers.
    """
    return partial(spread, address=address, actors=actors, device=device)


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """The library, joined to a cluster; one begun here ends with the block. Raises `BadInput` where none answers."""
    try:
        import ray
    except ImportError:
        raise BadInput("Ray is not installed", where="--engine ray", remedy='pip install "open-chameleon[ray]"') from None
    begun_here = not ray.is_initialized()
    if begun_here:
        connect(ray, address)
    try:
        yield ray
    finally:
        if begun_here:
            ray.shutdown()


def connect(ray: Any, address: str | None) -> None:
    """Joins a cluster, or starts one. Raises `BadInput` where none answers."""
    host, sign, port = (address or "").rpartition(":")
    if sign and port.isdigit() and "/" not in host:  # Ray itself tries for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BadInput(f"no Ray cluster answers ({error})", where=f"--ray-address {address}") from None
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        settings["include_dashboard"] = False
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(f"no Ray cluster ({error})", where=f"--ray-address {address}") from None
    if in_main and before is not None:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own there


def spread(
    tasks: Sequence[Task],
    tokenizer: MixedTokenizer,
    options: TokenizeOptions,
    *,
    workers: int,
    strict: bool,
    on_chunk: Callable[[], None],
    address: str | None,
    actors: int | None,
    device: str,
) -> Iterator[tuple[int, Report]]:
    """The tasks over actors, each actor one at a time."""
    if not tasks:
        return
    with cluster(address) as ray:
        on_gpu = device.startswith("cuda")
        count = actors or int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
        if not count:
            raise BadInput(f"the cluster has no {'GPU' if on_gpu else 'CPU'}", where="--engine ray")
        kind = ray.remote(Encoder).options(num_cpus=1, num_gpus=int(on_gpu))
        held = ray.put(tokenizer)
        todo: deque[tuple[int, int]] = deque((number, 1) for number in range(len(tasks)))  # and which try it is
        running: dict[Any, tuple[Any, tuple[int, int] | None]] = {}  # what is awaited → its actor, and what that is at

        def begin() -> None:
            actor = kind.remote(held, options, device, 1 + workers)
            running[actor.ready.remote()] = (actor, None)

        for _ in range(min(count, len(tasks))):
            begin()
        left, failed, heard = len(tasks), 0, time.monotonic()
        names = ("RayActorError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
        lost = tuple(getattr(ray.exceptions, name) for name in names)
        while left:
            done, _ = ray.wait(list(running), num_returns=1, timeout=1)
            on_chunk()
            if done or any(at is not None for _, at in running.values()):
                heard = time.monotonic()
            elif time.monotonic() - heard > PATIENCE:
                raise BadInput(f"no node had room for an actor in {PATIENCE} s", where="--engine ray", remedy="free some")
            for reference in done:
                actor, at = running.pop(reference)
                try:
                    report = ray.get(reference)
                except lost as error:
                    if at is not None:
                        number, tries = at
                        if tries == TRIES:
                            raise BadInput(f"lost {TRIES} times ({error})", where=tasks[number].raw.path) from None
                        todo.appendleft((number, tries + 1))
                    else:
                        failed += 1
                        if failed == TRIES * count:
                            raise BadInput(f"actors do not start ({error})", where="--engine ray") from None
                    begin()
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                failed = 0
                if at is not None:
                    left -= 1
                    yield at[0], report
                if todo:
                    at = todo.popleft()
                    running[actor.make.remote(tasks[at[0]], workers, strict)] = (actor, at)
                else:
                    ray.kill(actor)
