"""The engine thread: the one thread that uses the model, fed from the event loop.

Between two passes of the engine it runs jobs, such as encoding the pictures of a prompt or decoding a drawing, for a few
milliseconds, so that streams of tokens go on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from PIL import Image as PILImage
from torch import Tensor

from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import AllowedNext
from chameleon.generation.request import ActiveRequest, Request

MAX_JOBS = 256
"""Jobs that wait for the engine thread, from which on new work is refused."""
JOB_SECONDS = 0.005
"""Between two passes jobs are begun for so long."""
PASS_SECONDS = 0.02
"""Time after which the engine is to look for new requests: so long it may decode image codes without a look."""
DELIVERY_SECONDS = 0.02
"""Tokens that follow each other faster are sent together; the first of a request is sent at once."""
logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine thread has ended."""


class GenerationFailed(Exception):
    """A request that was valid failed while it was served."""


class Job(Generic[Result]):
    """A function to be called in the engine thread, and its result."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function = function
        self.future: Future[Result] = Future()

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function())
            except Exception as error:
                self.future.set_exception(error)

    def fail(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(eq=False)
class Generation:
    """A request that was accepted, and the tokens that wait for the event loop."""

    request: Request
    entry: ActiveRequest | None = None
    """The engine's; None while the request is queued."""
    tokens: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    """New token ids; the error of a failed request; None at the end."""
    has_started: bool = False
    """Whether any token was sent."""

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


class Batcher(Generic[Item, Result]):
    """Calls a function of several items in the engine thread, with all that were given since its last call."""

    def __init__(
        self, worker: EngineWorker, function: Callable[[Sequence[Item]], Sequence[Result]], *, is_new: bool
    ) -> None:
        """is_new: see `EngineWorker.call`."""
        self.worker, self.function, self.is_new = worker, function, is_new
        self.pending: deque[tuple[Item, Future[Result]]] = deque()

    async def __call__(self, item: Item) -> Result:
        """Return the function's result for an item."""
        future: Future[Result] = Future()
        self.pending.append((item, future))
        try:
            await self.worker.call(self.run, is_new=self.is_new)
        finally:
            future.cancel()  # where nobody waits for it any more
        return future.result()

    def run(self) -> None:
        taken = [self.pending.popleft() for _ in range(len(self.pending))]
        pending = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
        if not pending:
            return
        try:
            results = self.function([item for item, _ in pending])
            for (_, future), result in zip(pending, results, strict=True):
                future.set_result(result)
        except Exception as error:
            for _, future in pending:
                future.set_exception(error)


class EngineWorker:
    """Runs the engine, and jobs that need the model, in a thread of its own.

    Requests are served in order of arrival, but a quarter of the engine's sequences is kept for those that generate text
    alone: they are short, and would wait behind many drawings.
    """

    def __init__(self, load: Callable[[], Chameleon], *, max_waiting: int) -> None:
        """Start the thread, and load the model in it.

        No other thread should run operations of the model: where two threads of a process have OpenMP's helpers (libgomp),
        there are more of them than processors and they no longer wait actively, which halves the engine's speed.

        max_waiting: requests that wait for the engine at most; further ones are refused.
        """
        self.jobs: queue.SimpleQueue[Job[Any]] = queue.SimpleQueue()
        self.is_stopped = False
        loaded: Future[Chameleon] = Future()
        self.thread = threading.Thread(target=self.run_thread, args=(load, loaded), name="engine", daemon=True)
        self.thread.start()
        self.model = model = loaded.result()
        self.engine, self.max_waiting = model.engine, max_waiting
        self.max_buffered_codes = 1
        """Image codes that the engine decodes between two looks for new requests."""
        self.latest_delivery = 0.0
        self.encode = Batcher(self, model.prompts.encode_all, is_new=True)
        self.decode = Batcher(self, self.decode_codes, is_new=False)
        self.max_sequences = self.engine.scheduler.max_sequences
        self.max_drawing_sequences = self.max_sequences - self.max_sequences // 4
        self.queued: deque[Generation] = deque()
        """Accepted requests that the engine does not have yet, in order of arrival."""
        self.running: list[Generation] = []
        """Those that it has. Only the engine thread changes this list, and removes what is queued."""
        self.jobs.put(Job(self.serve))

    def attach(self) -> None:
        """Send tokens to the event loop that runs now."""
        self.loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the thread after its current pass."""
        self.is_stopped = True
        self.wake()
        self.thread.join()

    def wake(self) -> None:
        """Let the thread look at what is queued, if it waits for a job."""
        self.jobs.put(Job(lambda: None))

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive() and not self.is_stopped

    # --- called in the event loop ---

    @property
    def num_waiting(self) -> int:
        """Number of requests that are not being served yet."""
        return len(self.queued) + len(self.engine.scheduler.waiting)

    async def call(self, function: Callable[..., Result], *arguments: Any, is_new: bool = True) -> Result:
        """Run a function in the engine thread, between two passes, and return its result.

        is_new: whether it is work for a request that could still be refused; it is, by `Overloaded`, where many jobs wait.
        """
        if not self.is_alive:
            raise Stopped("the server is stopping")
        if is_new and self.jobs.qsize() >= MAX_JOBS:
            raise Overloaded(f"{self.jobs.qsize()} jobs are waiting")
        job = Job(lambda: function(*arguments))
        self.jobs.put(job)
        if not self.is_alive:  # the thread may have ended since
            self.fail_jobs()
        return await asyncio.wrap_future(job.future)

    def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue requests, all or none. Raises `BadInput` for invalid ones, `Overloaded` where the queue is full."""
        if not self.is_alive:
            raise Stopped("the server is stopping")
        if self.num_waiting and self.num_waiting + len(requests) > self.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests are waiting")
        for request in requests:
            request.validate(self.model.vocabulary, self.model.model.config.context_length, self.max_sequences)
        generations = [Generation(request) for request in requests]
        self.queued.extend(generations)
        self.wake()
        if not self.is_alive:  # the thread may have ended since
            raise Stopped("the server is stopping")
        return generations

    def decode_codes(self, codes: Sequence[Tensor]) -> list[PILImage.Image]:
        """Decode the codes [h, w] of several images."""
        return self.model.tokenizer.image.decode_all(codes)

    async def tokens(self, generation: Generation) -> AsyncIterator[list[int]]:
        """Yield lists of new token ids, eos excluded. Raise `GenerationFailed` where the request failed."""
        while (item := await generation.tokens.get()) is not None:
            if isinstance(item, Exception):
                raise item if isinstance(item, Stopped) else GenerationFailed(str(item)) from item
            yield item

    def cancel(self, generations: Sequence[Generation]) -> None:
        """End requests at the next pass, if they have not ended."""
        self.jobs.put(Job(lambda: self.forget(generations)))

    # --- called in the engine thread ---

    def run_thread(self, load: Callable[[], Chameleon], loaded: Future[Chameleon]) -> None:
        try:
            loaded.set_result(load())
        except BaseException as error:
            loaded.set_exception(error)
            return
        self.jobs.get().run()  # `serve`: what the thread needs is set by now

    def serve(self) -> None:
        """Serve until the worker is stopped. Whatever ends it, nobody waits for what will not come."""
        try:
            while not self.is_stopped:
                self.run_jobs(wait=self.engine.is_idle and not self.queued)
                self.feed()
                if not self.engine.is_idle:
                    self.step()
                self.deliver()
        except Exception:
            logger.exception("the engine thread ends")
        finally:
            self.is_stopped = True
            error = Stopped("the server is stopping")
            left = [*self.queued, *self.running]
            self.queued.clear()
            self.running.clear()
            if left:
                self.loop.call_soon_threadsafe(self.receive, [(generation, error) for generation in left])
            self.fail_jobs()

    def fail_jobs(self) -> None:
        """Tell those who wait for a job that none will be run any more."""
        try:
            while True:
                self.jobs.get(block=False).fail(Stopped("the server is stopping"))
        except queue.Empty:
            return

    def run_jobs(self, wait: bool) -> None:
        """Run what jobs there are, for a short time; all but the first may have nothing to do."""
        try:
            job = self.jobs.get(block=wait)
            start = time.perf_counter()
            job.run()
            while time.perf_counter() - start < JOB_SECONDS:
                self.jobs.get(block=False).run()
        except queue.Empty:
            return

    def step(self) -> None:
        """Run one pass of the engine, or as many codes of images as take the time of `PASS_SECONDS`."""
        start = time.perf_counter()
        self.engine.step(self.max_buffered_codes)
        is_short = time.perf_counter() - start < PASS_SECONDS / 2
        most = max(self.model.vocabulary.grid)
        self.max_buffered_codes = (
            min(most, 2 * self.max_buffered_codes) if is_short else max(1, self.max_buffered_codes // 2)
        )

    def feed(self) -> None:
        """Give the engine what is queued, as far as there are sequences for it; of each kind the first come first."""
        used = {True: 0, False: 0}
        for generation in self.running:
            used[generation.draws] += len(generation.request.prompts)
        is_blocked = False
        for generation in list(self.queued):
            draws, size = generation.draws, len(generation.request.prompts)
            is_full = sum(used.values()) + size > self.max_sequences
            is_reserved = draws and used[draws] > 0 and used[draws] + size > self.max_drawing_sequences
            if is_full:
                return  # nobody overtakes one that only waits for a place
            is_blocked |= is_reserved
            if draws and is_blocked:
                continue
            self.queued.remove(generation)
            generation.entry = self.engine.scheduler.submit(generation.request)
            self.running.append(generation)
            used[draws] += size

    def forget(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            if generation.entry is not None:
                self.engine.cancel(generation.entry.request_id)
            if generation in self.queued:
                self.queued.remove(generation)
            if generation in self.running:
                self.running.remove(generation)

    def deliver(self) -> None:
        """Send new tokens, errors and ends to the event loop, all in one call."""
        news: list[tuple[Generation, list[int] | Exception | None]] = []
        now = time.perf_counter()
        is_due = now - self.latest_delivery >= DELIVERY_SECONDS
        for generation in list(self.running):
            entry = generation.entry
            assert entry is not None
            is_finished = entry.is_finished  # before reading: a finished request gets no more tokens
            if not (is_due or is_finished or not generation.has_started):
                continue
            if token_ids := [entry.unread.popleft() for _ in range(len(entry.unread))]:
                news.append((generation, token_ids))
                generation.has_started = True
            if is_finished:
                news.append((generation, entry.error))
                self.forget([generation])
        if is_due:
            self.latest_delivery = now
        if news:
            self.loop.call_soon_threadsafe(self.receive, news)

    def receive(self, news: Sequence[tuple[Generation, list[int] | Exception | None]]) -> None:
        for generation, item in news:
            generation.tokens.put_nowait(item)
