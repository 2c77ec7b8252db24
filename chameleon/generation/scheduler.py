"""The scheduler: admits requests in order of arrival, applies their output, and keeps each one's failure to itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

from chameleon.errors import BadInput
from chameleon.generation.constraints import OutputState
from chameleon.generation.kv_cache_manager import KVCacheManager
from chameleon.generation.request import ActiveRequest, Request
from chameleon.vocabulary import Vocabulary


class Scheduler:
    """Queue of waiting requests, list of running ones, and the output of all until it is taken.

    First come, first served: a request at the head of the queue that does not fit beside those that run waits for them to
    finish, and no later one overtakes it. One that cannot fit even alone fails, and the next one has its turn.
    """

    def __init__(self, manager: KVCacheManager, vocabulary: Vocabulary, context_length: int, max_sequences: int) -> None:
        self.manager, self.vocabulary = manager, vocabulary
        self.context_length, self.max_sequences = context_length, max_sequences
        self.request_ids = count()
        self.waiting: deque[ActiveRequest] = deque()
        self.running: list[ActiveRequest] = []
        self.requests: dict[int, ActiveRequest] = {}
        """Every request whose output was not taken completely, by its id."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self.running and not self.waiting

    def submit(self, request: Request, max_buffered_codes: int | None = None) -> ActiveRequest:
        """Put a request at the end of the queue. Raise `BadInput` where it can never be served."""
        constraints = request.validate(self.vocabulary, self.context_length, self.max_sequences)
        output = OutputState(constraints, self.vocabulary, request.prompt)
        entry = ActiveRequest(next(self.request_ids), request, output, max_buffered_codes=max_buffered_codes)
        self.waiting.append(entry)
        self.requests[entry.request_id] = entry
        return entry

    def admit(self) -> list[ActiveRequest]:
        """Give waiting requests their sequences while there is room; return those that were admitted."""
        admitted = []
        while self.waiting:
            entry = self.waiting[0]
            if entry.is_finished:  # an interrupt came while it was admitted
                self.waiting.popleft()
                continue
            prompts = entry.request.prompts
            num_sequences = len(self.manager.sequences) + len(prompts)
            length = min(max(map(len, prompts)) + entry.output.constraints.max_new_tokens, self.context_length)
            if num_sequences > self.max_sequences:
                break
            try:
                if not self.manager.reserve(num_sequences, length):
                    break
                self.running.append(entry)  # it is always in one of the lists, so that it cannot be lost
                self.waiting.popleft()
                for prompt in prompts:
                    entry.sequences.append(self.manager.allocate(prompt))
            except Exception as error:
                self.fail(entry, error)
                continue
            admitted.append(entry)
            self.append_forced_tokens(entry)
        self.manager.compact()  # a request may have had nothing to generate but forced tokens
        return admitted

    # --- output ---

    def commit_tokens(self, entry: ActiveRequest, token_ids: Sequence[int]) -> None:
        """Add sampled tokens to a request. All but the last have keys and values in the cache already."""
        for sequence in entry.current_sequences:
            sequence.num_cached += len(token_ids) - 1
        for token_id in token_ids:
            if token_id == self.vocabulary.answer_end:
                self.finish(entry)
                return
            self.append_token(entry, token_id)
        self.append_forced_tokens(entry)

    def append_token(self, entry: ActiveRequest, token_id: int) -> None:
        entry.generated.append(token_id)
        entry.unread.append(token_id)
        entry.output.append(token_id)
        guidance = entry.request.guidance
        if guidance is not None and guidance.restarts and token_id in (self.vocabulary.boi, self.vocabulary.eoi):
            for branch in entry.sequences[1:]:
                self.manager.restart(branch)
        for sequence in entry.current_sequences:
            sequence.token_ids.append(token_id)

    def append_forced_tokens(self, entry: ActiveRequest) -> None:
        """Append tokens that are the only ones allowed, which need no forward pass; finish the request at its end."""
        while not entry.output.is_exhausted and (token_id := entry.output.forced_token()) is not None:
            is_drafted = entry.draft_tokens[:1] == [token_id]
            entry.draft_tokens = entry.draft_tokens[1:] if is_drafted else []
            if token_id == self.vocabulary.answer_end:
                self.finish(entry)
                return
            self.append_token(entry, token_id)
        if entry.output.is_exhausted:
            self.finish(entry)

    # --- the end of a request ---

    def finish(self, entry: ActiveRequest) -> None:
        """Take a request out of the running or waiting ones; its output stays until it is taken."""
        entry.is_finished = True
        if entry in self.running:
            self.running.remove(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)
        self.manager.release(entry.sequences)

    def fail(self, entry: ActiveRequest, error: Exception) -> None:
        """End a request with an error, which its caller gets; other requests go on."""
        entry.error = error
        self.finish(entry)

    def remove(self, request_id: int) -> None:
        """Forget a request, wherever it is, and its output."""
        entry = self.requests.pop(request_id, None)
        if entry is not None and not entry.is_finished:
            self.fail(entry, BadInput("the request was cancelled", where="engine"))
            self.manager.compact()

    def fail_all(self, error: Exception) -> None:
        """End all running requests with an error and free the cache. Waiting requests and finished output stay.

        Where none is running the first waiting one ends, since its admission failed.
        """
        for entry in list(self.running) or list(self.waiting)[:1]:
            self.fail(entry, error)
        self.manager.clear()
