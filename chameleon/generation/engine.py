"""The engine: rows of one batch in different modalities, each with its own settings, seed, rules and guidance.

Cache, modality rules, sampling and guidance are modules of their own; here they meet. A row is one sequence in the
cache; a guided request takes a row for each branch, and all its rows are fed the ids that the request draws. Requests
that end leave the cache, so the others go on without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.generation.guidance import Guidance, combine
from chameleon.generation.modality import ModalityState, Next, Rules, masks
from chameleon.generation.sampling import RandomStream, Sampling, sample
from chameleon.model.cache import KVCache
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary

TEXT_SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
IMAGE_SAMPLING = Sampling(temperature=0.5, top_p=0.5)


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    rules: Rules
    text: Sampling = TEXT_SAMPLING
    image: Sampling = IMAGE_SAMPLING
    guidance: Guidance | None = None
    """Applied to image codes."""
    seed: int = 0

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The full prompt and those of the guidance's branches."""
        return [self.prompt, *(self.guidance.branches if self.guidance else ())]


@dataclass
class Running:
    """A request under way."""

    number: int
    request: Request
    state: ModalityState
    stream: RandomStream
    rows: list[int]
    """Rows of the cache: the full prompt's, then the branches'."""
    lengths: list[int]
    """Ids each row has in the cache."""
    made: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    """bool [V]: text ids met, where the repetition penalty wants to know."""
    last: int = 0
    """The id that goes in next."""


class Engine:
    """Continues prompts with a Transformer.

    A request's result depends on its prompt, settings and seed alone. In bfloat16 the products of batches of different
    sizes round differently, so there a near tie between two ids may fall the other way in another batch.
    """

    def __init__(self, model: Transformer, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        weight = model.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.masks = masks(vocabulary).to(self.device)
        self.nothing_seen = torch.zeros(vocabulary.size, dtype=torch.bool, device=self.device)

    def check(self, request: Request) -> None:
        """Raises `BadInput` where the request does not fit the context."""
        context = self.model.config.context
        for prompt in request.prompts:
            if not prompt:
                raise BadInput("a prompt needs at least one id", where="prompt")
            if len(prompt) + 1 > context:
                raise BadInput(
                    f"the prompt has {len(prompt)} ids, the context {context}", where="prompt", remedy="shorten it"
                )

    def fitted(self, request: Request) -> Rules:
        """The request's rules with `max_new` cut to what the context leaves."""
        room = self.model.config.context - max(len(prompt) for prompt in request.prompts) + 1
        return Rules(min(request.rules.max_new, room), request.rules.max_images, request.rules.text)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """New ids of each request, `eos` left out."""
        results: list[list[int]] = [[] for _ in requests]
        for number, token in self.stream(requests):
            results[number].append(token)
        return results

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """(request, id) as they come, `eos` left out. Closing the iterator cancels what is left."""
        for request in requests:
            self.check(request)
        if not requests:
            return
        rules = [self.fitted(request) for request in requests]
        pairs = list(zip(requests, rules, strict=True))
        longest = max(max(map(len, request.prompts)) + rule.max_new for request, rule in pairs)
        rows = sum(len(request.prompts) for request in requests)
        cache = KVCache(self.model.config, rows, longest, dtype=self.dtype, device=self.device)
        running: list[Running] = []
        hidden: list[Tensor] = []
        for number, (request, rule) in enumerate(pairs):
            entry, states = self.prefill(number, request, rule, cache, first_row=len(hidden))
            running.append(entry)
            hidden += states
        hidden_rows = torch.stack(hidden)
        while True:
            tokens = self.choose(running, hidden_rows)
            going = []
            for entry, token in zip(running, tokens, strict=True):
                if token == self.vocabulary.eos:
                    continue
                yield entry.number, token
                entry.made.append(token)
                entry.state.push(token)
                if entry.seen is not None and token in self.vocabulary.text_ids:
                    entry.seen[token] = True
                entry.last = token
                if not entry.state.done:
                    going.append(entry)
            if not going:
                return
            if len(going) < len(running):
                cache.keep([row for entry in going for row in entry.rows])
                first = 0
                for entry in going:
                    entry.rows = list(range(first, first + len(entry.rows)))
                    first += len(entry.rows)
            running = going
            hidden_rows = self.step(running, cache)

    def prefill(
        self, number: int, request: Request, rules: Rules, cache: KVCache, first_row: int
    ) -> tuple[Running, list[Tensor]]:
        """Puts the request's prompts into the cache; returns the last hidden state [D] of each."""
        states = []
        for branch, prompt in enumerate(request.prompts):
            ids = torch.tensor([prompt], device=self.device)
            hidden = self.model(ids, cache=cache.row(first_row + branch))
            states.append(hidden[0, -1])
        entry = Running(
            number,
            request,
            ModalityState(rules, self.vocabulary, list(request.prompt)),
            RandomStream(request.seed),
            list(range(first_row, first_row + len(states))),
            [len(prompt) for prompt in request.prompts],
        )
        if request.text.repetition_penalty != 1:
            entry.seen = self.nothing_seen.clone()
            entry.seen[ids_of_text(request.prompt, self.vocabulary)] = True
        return entry, states

    def step(self, running: Sequence[Running], cache: KVCache) -> Tensor:
        """Feeds each row its request's last id; returns hidden states [rows, D]."""
        ids = torch.tensor([[entry.last] for entry in running for _ in entry.rows], device=self.device)
        lengths = [length for entry in running for length in entry.lengths]
        positions = torch.tensor(lengths, device=self.device).unsqueeze(1)
        seen = max(lengths) + 1
        mask = None
        if min(lengths) + 1 < seen:
            mask = (torch.arange(seen, device=self.device) <= positions)[:, None, None, :]
        hidden = self.model(ids, positions, mask, cache, seen)
        for entry in running:
            entry.lengths = [length + 1 for length in entry.lengths]
        return hidden[:, 0]

    def choose(self, running: Sequence[Running], hidden: Tensor) -> list[int]:
        """The next id of each request from the hidden states [rows, D] of all rows."""
        kinds = [entry.state.next() for entry in running]
        forced = {Next.IMAGE_START: "boi", Next.IMAGE_END: "eoi", Next.END: "eos"}
        tokens = [getattr(self.vocabulary, forced[kind]) if kind in forced else -1 for kind in kinds]
        open_ = [place for place, token in enumerate(tokens) if token < 0]
        if not open_:
            return tokens
        # Where only codes may come, the head is cut to their range.
        only_codes = all(kinds[place] == Next.CODE for place in open_)
        ids = self.vocabulary.image_slice if only_codes else slice(0, self.vocabulary.size)
        logits = self.model.logits(hidden, ids).float()
        rows = []
        for place in open_:
            entry = running[place]
            guided = entry.request.guidance is not None and kinds[place] == Next.CODE
            row = entry.rows[0]
            if guided:
                assert entry.request.guidance is not None
                row_logits = combine(logits[row : row + len(entry.rows)], entry.request.guidance.weights)
            else:
                row_logits = logits[row]
            rows.append(row_logits.masked_fill(~self.masks[kinds[place], ids], -torch.inf))
        settings = [running[p].request.image if kinds[p] == Next.CODE else running[p].request.text for p in open_]
        uniform = [running[place].stream[len(running[place].made)] for place in open_]
        chosen = sample(torch.stack(rows), settings, uniform, self.seen(running, open_, kinds))
        for place, token in zip(open_, chosen.tolist(), strict=True):
            tokens[place] = token + (ids.start or 0)
        return tokens

    def seen(self, running: Sequence[Running], open_: Sequence[int], kinds: Sequence[Next]) -> Tensor | None:
        """bool [len(open_), V] for the repetition penalty of rows that are at text, or None where none wants it."""
        rows = [None if kinds[place] == Next.CODE else running[place].seen for place in open_]
        if all(row is None for row in rows):
            return None
        return torch.stack([self.nothing_seen if row is None else row for row in rows])


def ids_of_text(ids: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    """Those of the ids that are text pieces."""
    values = torch.tensor(ids)
    return values[vocabulary.is_text(values)]
