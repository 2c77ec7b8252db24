"""Worker processes for reading: with one thread each, and gone when the process that started them is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from chameleon.errors import BadInput


def init_worker(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent process, which ends this one
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def exit_with_parent() -> None:
    """Exit when the parent process has ended, in whatever way."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def worker_pool(
    num_workers: int, where: str, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes, in each of which `initializer(*arguments)` is called first.

    What is still queued when the block ends is not run. Raises `BadInput` where a process dies.
    """
    # Spawned, not forked: a fork would lose the threads of the linear algebra library.
    with ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=init_worker, initargs=(initializer, arguments)
    ) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise BadInput(
                "a worker process died",
                where=where,
                remedy="out of memory? use fewer workers; what is complete is kept when you start again",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
