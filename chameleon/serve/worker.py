"""The engine thread: the one thread that uses the model, fed from the event loop.

Between two passes of the engine it runs at most one job, such as encoding the pictures of a prompt or decoding a drawing,
so that streams of tokens go on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import AllowedNext
from chameleon.generation.request import ActiveRequest, Request
from chameleon.serve.metrics import Metrics

CODES_BETWEEN_REQUESTS = {"cpu": 1}
"""Image codes that a device decodes before it looks for new requests; others decode a row of an image."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine thread has ended."""


@dataclass(eq=False)
class Generation:
    """A request that the engine is serving, and the tokens that wait for the event loop."""

    entry: ActiveRequest
    tokens: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    """New token ids; the error of a failed request; None at the end."""

    @property
    def is_length_limited(self) -> bool:
        """Whether the answer ended because no more tokens were allowed, and not where its format ends."""
        output = self.entry.output
        return output.is_exhausted and output.allowed_next() != AllowedNext.END


class EngineWorker:
    """Runs the engine, and jobs that need the model, in a thread of its own."""

    def __init__(self, model: Chameleon, metrics: Metrics, *, max_waiting: int) -> None:
        """max_waiting: requests that wait for the engine at most; further ones are refused."""
        self.model, self.engine, self.metrics, self.max_waiting = model, model.engine, metrics, max_waiting
        self.max_buffered_codes = CODES_BETWEEN_REQUESTS.get(self.engine.device.type, model.vocabulary.grid[1])
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.generations: dict[int, Generation] = {}
        """By the id of their request; only the engine thread removes them."""
        self.is_stopped = False
        self.thread = threading.Thread(target=self.run_thread, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; call it in the event loop that is to receive the tokens."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its current pass."""
        self.is_stopped = True
        self.jobs.put(None)
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    # --- called in the event loop ---

    @property
    def num_waiting(self) -> int:
        """Number of requests that are not being served yet."""
        return len(self.engine.scheduler.waiting)

    def check_queue(self, num_requests: int = 1) -> None:
        """Raise `Overloaded` where so many requests more have no place in the queue."""
        if self.num_waiting + num_requests > self.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests are waiting")

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function in the engine thread, between two passes, and return its result."""
        if self.is_stopped or not self.is_alive:
            raise Stopped("the server is stopping")
        future: Future[Result] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except Exception as error:
                    future.set_exception(error)

        self.jobs.put(job)
        return await asyncio.wrap_future(future)

    def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue requests, all or none. Raises `BadInput` for invalid ones, `Overloaded` where the queue is full."""
        self.check_queue(len(requests))
        entries = self.engine.submit_all(requests, self.max_buffered_codes)
        generations = [Generation(entry) for entry in entries]
        self.generations |= {generation.entry.request_id: generation for generation in generations}
        self.jobs.put(None)
        return generations

    async def tokens(self, generation: Generation) -> AsyncIterator[list[int]]:
        """Yield lists of new token ids, eos excluded. Raise the request's error where it failed."""
        while (item := await generation.tokens.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self, generations: Sequence[Generation]) -> None:
        """End requests at the next pass, if they have not ended."""
        request_ids = [g.entry.request_id for g in generations if g.entry.request_id in self.generations]
        if request_ids:
            self.jobs.put(lambda: self.forget(request_ids))

    # --- called in the engine thread ---

    def run_thread(self) -> None:
        while not self.is_stopped:
            self.run_job(wait=self.engine.is_idle)
            if not self.engine.is_idle:
                self.engine.step(self.max_buffered_codes)
                self.deliver()

    def run_job(self, wait: bool) -> None:
        try:
            job = self.jobs.get(block=wait)
        except queue.Empty:
            return
        if job is not None:
            job()

    def forget(self, request_ids: Sequence[int]) -> None:
        self.engine.cancel_all(request_ids)
        for request_id in request_ids:
            self.generations.pop(request_id, None)

    def deliver(self) -> None:
        """Send new tokens, errors and ends to the event loop, all in one call."""
        news: list[tuple[Generation, list[int] | Exception | None]] = []
        for request_id, generation in list(self.generations.items()):
            entry = generation.entry
            is_finished = entry.is_finished  # before reading: a finished request gets no more tokens
            if token_ids := [entry.unread.popleft() for _ in range(len(entry.unread))]:
                news.append((generation, token_ids))
            if is_finished:
                news.append((generation, entry.error))
                self.forget([request_id])
        if news:
            self.loop.call_soon_threadsafe(self.receive, news)

    def receive(self, news: Sequence[tuple[Generation, list[int] | Exception | None]]) -> None:
        for generation, item in news:
            generation.tokens.put_nowait(item)
