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

    @contextmanager
    def hold(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the lock for a block of code; yields whether it is held.

        `unless` is evaluated whenever the lock is released; if it is true, a waiting thread stops waiting and runs its
        block without the lock.
        """
        ticket = object()
        with self.condition:
            self.queue.append(ticket)
            is_held = False
            try:
                while self.queue[0] is not ticket and not unless():
                    self.condition.wait()
                is_held = self.queue[0] is ticket
            finally:
                if not is_held:  # also where an interrupt ends the wait
                    self.queue.remove(ticket)
        try:
            yield is_held
        finally:
            if is_held:
                with self.condition:
                    self.queue.popleft()
                    self.condition.notify_all()
