"""The engine: continuous batching of requests in different modalities, each with its own settings, seed and guidance.

One step admits waiting requests (`scheduler`), runs one forward pass over the KV cache (`kv_cache_manager`, `decoder`),
samples the next tokens, and adds them to their requests. Inside images several codes are decoded without synchronising
with the host, or several drafted codes are verified in one pass (`speculative`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.generation.decoder import NONFINITE, Decoder
from chameleon.generation.fair_lock import FairLock
from chameleon.generation.kv_cache_manager import KVCacheManager
from chameleon.generation.request import ActiveRequest, Request
from chameleon.generation.scheduler import Scheduler
from chameleon.generation.speculative import accept_draft, propose_draft
from chameleon.model.nonfinite import first_nonfinite_layer
from chameleon.model.quantization import WeightFormat
from chameleon.model.transformer import Transformer
from chameleon.threads import THREADS, ThreadPolicy, matrix_work
from chameleon.vocabulary import Vocabulary

MAX_BATCH_SIZE = 32


def with_row_ends(entry: ActiveRequest, codes: Sequence[int]) -> list[int]:
    """Return the codes that come next in a request's image with the row ends between them."""
    image = entry.output.image
    if image is None or image.dialect.row_end is None:
        return list(codes)
    offsets = image.code_offsets(len(codes))
    tokens = [image.dialect.row_end] * (offsets[-1] + 1)
    for offset, code in zip(offsets, codes, strict=True):
        tokens[offset] = code
    return tokens


class Engine:
    """Continues prompts with a Transformer.

    A request's output depends on its prompt, settings and seed alone. In bfloat16, matrix products of batches of different
    sizes round differently, so a near tie between two tokens may be decided differently in another batch.

    The KV cache is kept between calls, and prefixes in it are reused; `clear` frees it.

    Methods may be called from several threads. Each step serves the requests of all threads, whichever thread runs it;
    threads run steps in turn (`FairLock`).
    """

    def __init__(
        self,
        model: Transformer,
        vocabulary: Vocabulary,
        *,
        max_batch_size: int = MAX_BATCH_SIZE,
        draft_length: int = 1,
        weight_format: WeightFormat = "plain",
        compile: bool = False,
        exact: bool = False,
    ) -> None:
        """max_batch_size: sequences that run at a time; further requests wait. A guided request takes several sequences.

        draft_length: image codes verified in one forward pass; 1 decodes one at a time. weight_format: that of the
        model's blocks. compile: compile the decode step, which takes about a minute; on GPUs it becomes a CUDA graph, on
        CPUs it uses a packed copy of plain weights. Passes with drafted codes are not compiled. exact: a request's output
        is the same to the bit in any batch and with any draft length; the model is one that `make_exact` has changed.
        """
        if max_batch_size < 1 or draft_length < 1:
            raise BadInput(
                f"max_batch_size {max_batch_size}, draft_length {draft_length}", where="engine", remedy="use 1 or more"
            )
        self.model, self.vocabulary, self.draft_length = model, vocabulary, draft_length
        weight = model.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        if exact and (compile or self.device.type != "cpu"):
            raise BadInput("exact generation is for uncompiled models on CPUs", where="exact", remedy="leave it out")
        self.is_exact = exact
        self.threads = ThreadPolicy(threads=1) if exact else THREADS
        self.largest_matrix = model.config.largest_matrix
        self.manager = KVCacheManager(
            model.config,
            max_batch_size,
            dtype=self.dtype,
            device=self.device,
            static_address=compile and self.device.type == "cuda",
        )
        self.decoder = Decoder(model, vocabulary, self.manager, weight_format=weight_format, compile=compile, exact=exact)
        self.scheduler = Scheduler(self.manager, vocabulary, model.config.context_length, max_batch_size)
        self.lock = FairLock()
        self.cancelled: deque[int] = deque()
        """Requests that the next holder of the lock removes."""
        self.weights_version = self.current_weights_version()

    # --- requests ---

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raise `BadInput` where it can never be served."""
        return self.scheduler.submit(request).request_id

    def cancel(self, request_id: int) -> None:
        """End a request, wherever it is, and drop its output."""
        self.cancel_all([request_id])

    def cancel_all(self, request_ids: Sequence[int]) -> None:
        """Cancel several requests. Finished ones need no lock, so that nobody waits for another thread's step."""
        unfinished = []
        for request_id in request_ids:
            if self.is_finished(request_id):
                self.scheduler.requests.pop(request_id, None)
            else:
                unfinished.append(request_id)
        self.cancelled.extend(unfinished)
        # An iterator that is garbage-collected during a step cancels in that step's thread: the next step does it.
        if unfinished and not self.lock.is_entered():
            with self.lock.hold():
                self.remove_cancelled()

    def remove_cancelled(self) -> None:
        while self.cancelled:
            self.scheduler.remove(self.cancelled.popleft())

    def take_output(self, request_id: int) -> list[int]:
        """Return the token ids generated since the last call. Raise the request's error where it failed."""
        entry = self.scheduler.requests.get(request_id)
        if entry is None:
            raise BadInput("no such request: it was cancelled, or its output was taken", where=f"request {request_id}")
        is_finished = entry.is_finished  # before reading: a finished request gets no more tokens
        token_ids = [entry.unread.popleft() for _ in range(len(entry.unread))]
        if is_finished and entry.error is not None and not token_ids:
            self.cancel(request_id)
            raise entry.error
        if is_finished and entry.error is None:
            self.cancel(request_id)
        return token_ids

    def is_finished(self, request_id: int) -> bool:
        """Return whether a request was completed, failed or cancelled."""
        entry = self.scheduler.requests.get(request_id)
        return entry is None or entry.is_finished

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return self.scheduler.is_idle

    def clear(self) -> None:
        """Drop all requests and free the KV cache."""
        with self.lock.hold():
            for request_id in list(self.scheduler.requests):
                self.scheduler.remove(request_id)
            self.manager.clear()

    @overload
    def generate(self, requests: Sequence[Request], *, return_errors: Literal[False] = False) -> list[list[int]]: ...

    @overload
    def generate(self, requests: Sequence[Request], *, return_errors: Literal[True]) -> list[list[int] | Exception]: ...

    def generate(
        self, requests: Sequence[Request], *, return_errors: bool = False
    ) -> list[list[int]] | list[list[int] | Exception]:
        """Return the new token ids of each request, eos excluded.

        A request that fails does not affect the others. return_errors: put its error in place of its tokens; else the
        first error is raised once the other requests are completed.
        """
        entries = self.submit_all(requests)
        self.run_until_finished(entries)
        results: list[list[int] | Exception] = [entry.error or entry.generated for entry in entries]
        errors = [result for result in results if isinstance(result, Exception)]
        if errors and not return_errors:
            raise errors[0]
        return results

    def stream(self, requests: Sequence[Request], max_buffered_codes: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (index of the request, token id) as tokens are generated, eos excluded.

        Closing the iterator cancels what is left. max_buffered_codes: image codes that are decoded before any is yielded,
        at most. If requests fail, the first error is raised once the others are completed.
        """
        entries = self.submit_all(requests, max_buffered_codes)
        errors: list[Exception] = []
        try:
            unfinished = dict(enumerate(entries))
            while unfinished:
                self.step_for(list(unfinished.values()))
                for index, entry in list(unfinished.items()):
                    is_finished = entry.is_finished  # before reading: a finished request gets no more tokens
                    while entry.unread:
                        yield index, entry.unread.popleft()
                    if is_finished:
                        del unfinished[index]
                        if entry.error is not None:
                            errors.append(entry.error)
        finally:
            self.cancel_all([entry.request_id for entry in entries])
        if errors:
            raise errors[0]

    def submit_all(self, requests: Sequence[Request], max_buffered_codes: int | None = None) -> list[ActiveRequest]:
        """Submit several requests, or none of them where one is invalid."""
        for request in requests:
            request.validate(self.vocabulary, self.model.config.context_length, self.scheduler.max_sequences)
        return [self.scheduler.submit(request, max_buffered_codes) for request in requests]

    def run_until_finished(self, entries: Sequence[ActiveRequest]) -> None:
        try:
            while unfinished := [entry for entry in entries if not entry.is_finished]:
                self.step_for(unfinished)
        finally:
            self.cancel_all([entry.request_id for entry in entries])

    def step_for(self, entries: Sequence[ActiveRequest]) -> None:
        """Run a step, unless another thread's step produces something for one of these requests first."""

        num_tokens = sum(len(entry.generated) for entry in entries)

        def has_progressed() -> bool:
            is_any_finished = any(entry.is_finished for entry in entries)
            return is_any_finished or sum(len(entry.generated) for entry in entries) > num_tokens

        with self.lock.hold(unless=has_progressed) as is_held:
            if is_held and not has_progressed():
                self.run_step()

    def step(self, max_buffered_codes: int | None = None) -> None:
        """Generate the next tokens of all running requests; finished ones leave, waiting ones join.

        A request that fails keeps its error (`generate` and `stream` raise it). An unexpected error fails all running
        requests; the engine can be used afterwards.
        """
        with self.lock.hold():
            self.run_step(max_buffered_codes)

    # --- one step; the caller holds the lock ---

    @torch.inference_mode()
    def run_step(self, max_buffered_codes: int | None = None) -> None:
        self.remove_cancelled()
        if self.scheduler.is_idle:
            return
        try:
            self.rebuild_if_weights_changed()
            for entry in self.scheduler.admit():
                self.track_seen_text(entry, entry.request.prompt)
            if not self.manager.sequences:
                return
            running = self.scheduler.running
            with self.threads_for(self.decoder.num_pending()):
                hidden, hidden_index = self.decoder.forward_step(running)
            ready = [entry for entry in running if all(s in hidden_index for s in entry.current_sequences)]
            if not ready:
                return
            num_steps = self.steps_without_host_sync(ready, max_buffered_codes)
            with self.threads_for(len(self.manager.sequences)):
                if num_steps > 1:
                    # The next line is the only one at which the host waits for the device.
                    codes = self.decoder.decode_image_block(ready, hidden, hidden_index, num_steps).tolist()
                    rows = [with_row_ends(entry, row) for entry, row in zip(ready, codes, strict=True)]
                else:
                    rows = self.group_by_request(ready, self.decoder.sample_next(ready, hidden, hidden_index))
            for entry, token_ids in zip(ready, rows, strict=True):
                self.add_tokens(entry, token_ids)
            self.manager.compact()
        except Exception as error:
            self.scheduler.fail_all(error)
        except BaseException:
            self.scheduler.fail_all(BadInput("generation was interrupted", where="engine"))
            raise

    def threads_for(self, num_tokens: int) -> AbstractContextManager[Any]:
        """Return a context with as many threads as a pass over so many tokens keeps busy."""
        if self.device.type != "cpu":
            return nullcontext()
        return self.threads.apply(matrix_work(num_tokens, self.largest_matrix))

    def steps_without_host_sync(self, ready: Sequence[ActiveRequest], max_buffered_codes: int | None) -> int:
        """Return how many tokens can be decoded before the host needs to see one: several if all requests are in images."""
        if self.draft_length > 1 or len(ready) < len(self.scheduler.running):
            return 1
        limits = [entry.codes_ahead for entry in ready]
        limits += [limit for limit in (max_buffered_codes, *(entry.max_buffered_codes for entry in ready)) if limit]
        return max(1, min(limits))

    def group_by_request(self, ready: Sequence[ActiveRequest], sampled: Tensor) -> list[list[int]]:
        """Split sampled tokens by request, and keep those that follow accepted drafts."""
        token_ids = sampled.tolist()
        rows, start = [], 0
        for entry in ready:
            end = start + 1 + len(entry.draft_tokens)
            rows.append(accept_draft(entry, token_ids[start:end]))
            start = end
        return rows

    def add_tokens(self, entry: ActiveRequest, token_ids: list[int]) -> None:
        """Commit sampled tokens to a request and propose its next draft."""
        if NONFINITE in token_ids:
            error = self.nonfinite_error(entry, token_ids[: token_ids.index(NONFINITE)])
            self.manager.discard(entry.sequences)
            self.scheduler.fail(entry, error)
            return
        self.scheduler.commit_tokens(entry, token_ids)
        if not entry.is_finished:
            self.track_seen_text(entry, token_ids)
            if self.draft_length > 1 and entry.codes_ahead:
                propose_draft(entry, self.draft_length)

    def track_seen_text(self, entry: ActiveRequest, token_ids: Sequence[int]) -> None:
        """Note text tokens that occurred, for the repetition penalty."""
        if entry.request.text_sampling.repetition_penalty == 1:
            return
        if entry.seen_text is None:
            entry.seen_text = torch.zeros(len(self.decoder.text_column), dtype=torch.bool, device=self.device)
        columns = {self.decoder.text_column[t] for t in token_ids if t in self.vocabulary.text_ids}
        if columns:
            entry.seen_text[sorted(columns)] = True

    def nonfinite_error(self, entry: ActiveRequest, token_ids: Sequence[int]) -> BadInput:
        """Return the error for NaN or infinite logits, which names the layer they first appear in."""
        output = [*entry.generated, *token_ids]
        try:
            sequences = [[*prompt, *output] for prompt in entry.request.prompts]
            guidance = entry.request.guidance
            if guidance is not None and guidance.restarts and self.vocabulary.boi in output:
                start = len(output) - 1 - output[::-1].index(self.vocabulary.boi)
                sequences[1:] = [output[start:] for _ in sequences[1:]]
            branches = [torch.tensor([sequence], device=self.device) for sequence in sequences]
            layers = [first_nonfinite_layer(self.model, branch) for branch in branches]
            layer = next((layer for layer in layers if layer), None)
            where_first = f"first in {layer}" if layer else "in this batch alone, not when recomputed"
        except Exception as error:  # such as being out of memory, which must not affect other requests
            where_first = f"in a layer that could not be found ({error})"
        return BadInput(
            f"the logits of token {len(entry.request.prompt) + len(output)} are NaN or infinite, {where_first}",
            where="model",
            remedy="load it in float32 or bfloat16, or check its weights",
        )

    # --- weights that change between calls, as while training ---

    def current_weights_version(self) -> int:
        """Return a number that grows when weights are changed in place."""
        return sum(p._version for p in self.model.parameters() if not p.is_inference())

    def rebuild_if_weights_changed(self) -> None:
        """Drop the cache, the head slices and compiled code of earlier weights, before the first request runs."""
        version = self.current_weights_version()
        if not self.scheduler.running and version != self.weights_version:
            self.manager.clear()
            self.decoder.build()
            self.weights_version = version
