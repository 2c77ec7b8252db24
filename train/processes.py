"""What the processes of a run do together outside of its steps: agree, share out, and fail as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from chameleon.errors import BadInput

T = TypeVar("T")
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Signals, to whichever process, after which all write a checkpoint and exit with 143; SLURM can send the second one some
time before it ends a job."""
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""In messages of PyTorch where the process at the other end is gone."""


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says that another process is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONNECTION)


def is_single_process() -> bool:
    """Return whether no process group is initialised."""
    return not (distributed.is_available() and distributed.is_initialized())


def process_rank() -> int:
    """Return the index of this process among all."""
    return 0 if is_single_process() else distributed.get_rank()


def num_processes() -> int:
    """Return the number of processes."""
    return 1 if is_single_process() else distributed.get_world_size()


def ignore_stop_signals(worker: int) -> None:
    """Leave signals that stop a run to its main process: in a worker of a loader, which would end before it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def num_launched() -> int:
    """Return the number of processes that torchrun or SLURM has started, before they have met."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def gather(value: T, group: Any = None) -> list[T]:
    """Return every process's value, in the order of their ranks, on all of them. A collective operation."""
    if is_single_process():
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value, group)
    return values


def run_on_all_processes(action: Callable[[], T], group: Any = None) -> T:
    """Run an action on every process and return its result. Raise `BadInput` on all of them where it fails on one.

    A collective operation. group: processes and their backend, by default those of the run.
    """
    error: BadInput | None = None
    result: Any = None
    try:
        result = action()
    except BadInput as bad_input:
        error = bad_input
    except OSError as os_error:
        error = BadInput(str(os_error), where=os_error.filename)
    first_error = next((other for other in gather(error, group) if other is not None), None)
    if first_error is not None:
        raise first_error
    return result


def on_first_process(action: Callable[[], T]) -> T:
    """Run an action on the first process and return its result on all. Raise `BadInput` on all of them where it fails.

    A collective operation.
    """
    result = run_on_all_processes(lambda: action() if process_rank() == 0 else None)
    if is_single_process():
        return result  # type: ignore[return-value]
    results = [result]
    distributed.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]
