"""Tokenisation on a Ray cluster: actors that each hold the tokenizers, and one raw shard as a task.

Sources and the output folder must be reachable under the same paths on every node. If an actor is lost, with its process or
its node, the shard that it was working on is given to another one.
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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from chameleon.data.tokenize import Report, Task, TokenizeEngine, TokenizeOptions, make_shards
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import MixedTokenizer

MAX_TRIES = 3
"""How often a shard is tried before its loss ends the run, and how often an actor may fail to start."""
MAX_SECONDS_WITHOUT_ACTOR = 300
LOST_ACTOR_ERRORS = ("RayActorError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")


class TokenizeActor:
    """A Ray actor that writes one shard after the other."""

    def __init__(self, tokenizer: MixedTokenizer, options: TokenizeOptions, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        tokenizer.image.network.to(device)
        self.tokenizer, self.options = tokenizer, options

    def ready(self) -> None:
        """Return once the actor runs."""

    def make(self, task: Task, num_workers: int, strict: bool) -> Report:
        (report,) = make_shards([task], self.tokenizer, self.options, num_workers=num_workers, strict=strict)
        return report


def ray_engine(address: str | None = None, *, num_actors: int | None = None, device: str = "cpu") -> TokenizeEngine:
    """Return an engine on the cluster at `address`; by default one is started on this machine and stopped afterwards.

    num_actors: by default one for each GPU of the cluster if `device` is `cuda`, else for each CPU. The engine raises
    `BadInput` where Ray is not installed or no cluster answers.
    """
    return partial(run_on_cluster, address=address, num_actors=num_actors, device=device)


@contextmanager
def connected_cluster(address: str | None) -> Iterator[Any]:
    """Yield the Ray library, connected to a cluster; one started here stops when the block ends."""
    try:
        import ray
    except ImportError:
        raise BadInput("Ray is not installed", where="--engine ray", remedy='pip install "open-chameleon[ray]"') from None
    connects_here = not ray.is_initialized()
    if connects_here:
        connect(ray, address)
    try:
        yield ray
    finally:
        if connects_here:
            ray.shutdown()


def connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one. Raise `BadInput` where none answers."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BadInput(f"no Ray cluster answers ({error})", where=f"--ray-address {address}") from None
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        settings["include_dashboard"] = False
    is_main_thread = threading.current_thread() is threading.main_thread()
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(f"no Ray cluster ({error})", where=f"--ray-address {address}") from None
    if is_main_thread and sigterm_handler is not None:
        signal.signal(signal.SIGTERM, sigterm_handler)  # Ray installs its own


@dataclass
class Assignment:
    """A task that is queued or assigned to an actor."""

    task_index: int
    num_tries: int = 1


@dataclass
class ActorPool:
    """The actors of a run and their current assignments."""

    start_actor: Callable[[], Any]
    pending: dict[Any, tuple[Any, Assignment | None]] = field(default_factory=dict)
    """Reference to a result → (actor, its assignment; None while it starts)."""

    def add_actor(self) -> None:
        actor = self.start_actor()
        self.pending[actor.ready.remote()] = (actor, None)

    @property
    def has_running_actor(self) -> bool:
        return any(assignment is not None for _, assignment in self.pending.values())


def run_on_cluster(
    tasks: Sequence[Task],
    tokenizer: MixedTokenizer,
    options: TokenizeOptions,
    *,
    num_workers: int,
    strict: bool,
    on_chunk: Callable[[], None],
    address: str | None,
    num_actors: int | None,
    device: str,
) -> Iterator[tuple[int, Report]]:
    """Distribute the tasks over actors, each working on one at a time."""
    if not tasks:
        return
    with connected_cluster(address) as ray:
        resource = "GPU" if device.startswith("cuda") else "CPU"
        max_actors = num_actors or int(ray.cluster_resources().get(resource, 0))
        if not max_actors:
            raise BadInput(f"the cluster has no {resource}", where="--engine ray")
        actor_class = ray.remote(TokenizeActor).options(num_cpus=1, num_gpus=int(resource == "GPU"))
        tokenizer_reference = ray.put(tokenizer)
        pool = ActorPool(lambda: actor_class.remote(tokenizer_reference, options, device, 1 + num_workers))
        for _ in range(min(max_actors, len(tasks))):
            pool.add_actor()
        waiting = deque(Assignment(task_index) for task_index in range(len(tasks)))
        tasks_left, failed_starts, last_progress = len(tasks), 0, time.monotonic()
        lost_actor_errors = tuple(getattr(ray.exceptions, name) for name in LOST_ACTOR_ERRORS)
        while tasks_left:
            ready, _ = ray.wait(list(pool.pending), num_returns=1, timeout=1)
            on_chunk()
            if ready or pool.has_running_actor:
                last_progress = time.monotonic()
            elif time.monotonic() - last_progress > MAX_SECONDS_WITHOUT_ACTOR:
                seconds = MAX_SECONDS_WITHOUT_ACTOR
                raise BadInput(f"no node had room for an actor in {seconds} s", where="--engine ray", remedy="free some")
            for reference in ready:
                actor, assignment = pool.pending.pop(reference)
                try:
                    report = ray.get(reference)
                except lost_actor_errors as error:
                    if assignment is None:
                        failed_starts += 1
                        if failed_starts == MAX_TRIES * max_actors:
                            raise BadInput(f"actors do not start ({error})", where="--engine ray") from None
                    else:
                        if assignment.num_tries == MAX_TRIES:
                            path = tasks[assignment.task_index].raw.path
                            raise BadInput(f"lost {MAX_TRIES} times ({error})", where=path) from None
                        waiting.appendleft(Assignment(assignment.task_index, assignment.num_tries + 1))
                    pool.add_actor()
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                failed_starts = 0
                if assignment is not None:
                    tasks_left -= 1
                    yield assignment.task_index, report
                if waiting:
                    next_assignment = waiting.popleft()
                    task = tasks[next_assignment.task_index]
                    pool.pending[actor.make.remote(task, num_workers, strict)] = (actor, next_assignment)
                else:
                    ray.kill(actor)
