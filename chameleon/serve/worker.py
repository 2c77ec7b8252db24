"""The engine thread: the one thread that uses the model, fed from the event loop.

Between two passes of the engine it runs at most one job, such as encoding the pictures of a prompt or decoding a drawing,
so that streams of tokens go on.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import AllowedNext
from chameleon.generation.request import ActiveRequest, Request

CODES_BETWEEN_REQUESTS = {"cpu": 1}
"""Image codes that a device decodes before it looks for new requests; others decode a row of an image."""
Result = TypeVar("Result")


class Overloaded(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine thread has ended."""


@dataclass(eq=False)
class Generation:
    """A request that was accepted, and the tokens that wait for the event loop."""

    request: Request
    entry: ActiveRequest | None = None
    """The engine's; None while the request is held back."""
    tokens: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    """New token ids; the error of a failed request; None at the end."""

    @property
    def draws(self) -> bool:
        """Whether it may generate an image, for which it keeps its sequences long."""
        return bool(self.request.constraints.image_limit or self.request.fixed_codes)

    @property
    def is_length_limited(self) -> bool:
        """Whether the answer ended because no more tokens were allowed, and not where its format ends."""
        assert self.entry is not None
        output = self.entry.output
        return output.is_exhausted and output.allowed_next() != AllowedNext.END


class EngineWorker:
    """Runs the engine, and jobs that need the model, in a thread of its own.

    Requests are served in order of arrival, but a quarter of the engine's sequences is kept for those that generate text
    alone: they are short, and would wait behind many drawings.
    """

    def __init__(self, model: Chameleon, *, max_waiting: int) -> None:
        """max_waiting: requests that wait for the engine at most; further ones are refused."""
        self.model, self.engine, self.max_waiting = model, model.engine, max_waiting
        self.max_buffered_codes = CODES_BETWEEN_REQUESTS.get(self.engine.device.type, model.vocabulary.grid[1])
        self.max_sequences = self.engine.scheduler.max_sequences
        self.max_drawing_sequences = self.max_sequences - self.max_sequences // 4
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.held: deque[Generation] = deque()
        """Accepted requests that the engine does not have yet, in order of arrival."""
        self.running: list[Generation] = []
        """Those that it has. Only the engine thread changes this list, and removes what is held."""
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
        return len(self.held) + len(self.engine.scheduler.waiting)

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
        if self.num_waiting + len(requests) > self.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests are waiting")
        for request in requests:
            request.validate(self.model.vocabulary, self.model.model.config.context_length, self.max_sequences)
        generations = [Generation(request) for request in requests]
        self.held.extend(generations)
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
        self.jobs.put(lambda: self.forget(generations))

    # --- called in the engine thread ---

    def run_thread(self) -> None:
        while not self.is_stopped:
            self.run_job(wait=self.engine.is_idle and not self.held)
            self.feed()
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

    def feed(self) -> None:
        """Give the engine what is held, as far as there are sequences for it; of each kind the first come first."""
        used = {True: 0, False: 0}
        for generation in self.running:
            used[generation.draws] += len(generation.request.prompts)
        is_blocked = {True: False, False: False}
        for generation in list(self.held):
            draws, size = generation.draws, len(generation.request.prompts)
            is_full = sum(used.values()) + size > self.max_sequences
            is_reserved = draws and used[draws] and used[draws] + size > self.max_drawing_sequences
            is_blocked[draws] |= is_full or bool(is_reserved)
            if is_blocked[draws]:
                continue
            self.held.remove(generation)
            generation.entry = self.engine.scheduler.submit(generation.request, self.max_buffered_codes)
            self.running.append(generation)
            used[draws] += size

    def forget(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            if generation.entry is not None:
                self.engine.cancel(generation.entry.request_id)
            if generation in self.held:
                self.held.remove(generation)
            if generation in self.running:
                self.running.remove(generation)

    def deliver(self) -> None:
        """Send new tokens, errors and ends to the event loop, all in one call."""
        news: list[tuple[Generation, list[int] | Exception | None]] = []
        for generation in list(self.running):
            entry = generation.entry
            assert entry is not None
            is_finished = entry.is_finished  # before reading: a finished request gets no more tokens
            if token_ids := [entry.unread.popleft() for _ in range(len(entry.unread))]:
                news.append((generation, token_ids))
            if is_finished:
                news.append((generation, entry.error))
                self.forget([generation])
        if news:
            self.loop.call_soon_threadsafe(self.receive, news)

    def receive(self, news: Sequence[tuple[Generation, list[int] | Exception | None]]) -> None:
        for generation, item in news:
            generation.tokens.put_nowait(item)
