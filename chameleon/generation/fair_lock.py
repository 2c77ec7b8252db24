"""A first-come, first-served lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FairLock:
    """A lock that is granted first come, first served. (`threading.Lock` may starve a thread for as long as others ask.)"""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.queue: deque[object] = deque()
        self.threads: set[int] = set()
        """Threads that hold the lock or wait for it."""

    def is_entered(self) -> bool:
        """Return whether this thread holds the lock or waits for it already, so that it must not ask for it again."""
        return threading.get_ident() in self.threads

    @contextmanager
    def hold(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the lock for a block of code; yields whether it is held.

        `unless` is evaluated whenever the lock is released; if it is true, a waiting thread stops waiting and runs its
        block without the lock.
        """
        ticket, is_held = object(), False
        self.threads.add(threading.get_ident())
        try:
            with self.condition:
                self.queue.append(ticket)
                while self.queue[0] is not ticket and not unless():
                    self.condition.wait()
                is_held = self.queue[0] is ticket
                if not is_held:
                    self.queue.remove(ticket)
            yield is_held
        finally:
            with self.condition:
                if ticket in self.queue:  # also where an interrupt ends the wait
                    self.queue.remove(ticket)
                self.condition.notify_all()
            self.threads.discard(threading.get_ident())
