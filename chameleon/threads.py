"""How many threads PyTorch's operations use: as many as their work keeps busy, and no more than there are free processors.

Threads of an operation wait for each other. Where another process has one of the processors, each of a decode step's
hundreds of small operations waits until the scheduler comes round, so that two threads can be twenty times slower than one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

from chameleon.errors import BadInput

WORK_PER_THREAD = 5_000_000
"""Multiplications of an operation that are worth a thread (measured: base and the shipped model, 1 to 32 sequences)."""
MULTIPLICATIONS_PER_READ = 4
"""Multiplications that take as long as reading a weight from memory."""
MIN_INTERVAL = 0.2
"""Seconds over which the load is measured, at least; the system counts in hundredths of a second."""
ROUND_UP_FROM = 0.65
"""Share of a processor that counts as a free one."""


def matrix_work(tokens: int, weights: int) -> float:
    """Return the work of multiplying `tokens` tokens with a matrix of `weights` weights, in multiplications."""
    return float(weights) * (tokens + MULTIPLICATIONS_PER_READ)


class Sample(NamedTuple):
    """A reading of the clocks, in seconds."""

    time: float
    busy: float
    """Processor time that all processes took."""
    own: float
    """Processor time that this process took."""


def read_clocks() -> Sample:
    """Read the clocks of the system and of this process."""
    times, own = psutil.cpu_times(), os.times()
    # The time of guests, where the system counts it, is contained in that of users already.
    not_busy = times.idle + sum(getattr(times, kind, 0.0) for kind in ("iowait", "guest", "guest_nice"))
    return Sample(time.monotonic(), sum(times) - not_busy, own.user + own.system)


class LoadMeter:
    """Measures how many processors other processes leave free."""

    def __init__(self, read: Callable[[], Sample] = read_clocks, processors: int | None = None) -> None:
        self.read, self.processors = read, processors or psutil.cpu_count() or 1
        self.sample = read()
        self.others = 0.0
        """Processors that other processes kept busy in the latest interval."""
        self.lock = threading.Lock()

    def free_processors(self) -> float:
        """Return the processors that other processes left free in the last fifth of a second or longer."""
        with self.lock:
            if time.monotonic() - self.sample.time >= MIN_INTERVAL:
                before, self.sample = self.sample, self.read()
                elapsed = max(self.sample.time - before.time, 1e-9)
                busy = self.sample.busy - before.busy - (self.sample.own - before.own)
                self.others = max(0.0, busy / elapsed)
        return self.processors - self.others


class ThreadPolicy:
    """Chooses the number of threads for each piece of work."""

    def __init__(self, threads: int | None = None, meter: LoadMeter | None = None) -> None:
        """threads: for all work and whatever the load; None: chosen."""
        self.threads, self.meter = threads, meter or LOAD
        self.maximum = min(torch.get_num_threads(), available_processors())

    def choose(self, work: float = float("inf")) -> int:
        """Return the number of threads for operations of `work` multiplications each."""
        if self.threads is not None:
            return self.threads
        useful_threads = int(min(self.maximum, work / WORK_PER_THREAD))
        if useful_threads < 2:
            return 1
        free_processors = int(self.meter.free_processors() + 1 - ROUND_UP_FROM)
        return max(1, min(useful_threads, free_processors))

    @contextmanager
    def apply(self, work: float = float("inf")) -> Iterator[int]:
        """Use the chosen number of threads in the block, in this thread of Python."""
        previous_threads, num_threads = torch.get_num_threads(), self.choose(work)
        if num_threads == previous_threads:
            yield num_threads
            return
        torch.set_num_threads(num_threads)
        try:
            yield num_threads
        finally:
            torch.set_num_threads(previous_threads)


def available_processors() -> int:
    """Return the number of processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return psutil.cpu_count() or 1


LOAD = LoadMeter()
THREADS = ThreadPolicy()
"""That of all models of this process, see `set_threads`."""


def set_threads(num_threads: int | None) -> None:
    """Use `num_threads` threads for everything that models of this process do; None: as many as are of use.

    Raises `BadInput` for fewer than 1. Training uses PyTorch's number, which OMP_NUM_THREADS sets.
    """
    if num_threads is not None and num_threads < 1:
        raise BadInput(f"{num_threads} threads", where="threads", remedy="use 1 or more")
    THREADS.threads = num_threads
