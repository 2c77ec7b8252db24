"""The engine: rows of one batch in different modalities, each with its own settings, seed, rules and guidance.

Cache, modality rules, head slices, sampling and guidance are modules of their own; here they meet. What matters:

* a pass of the model takes whatever each row has to read, a long prompt here and one new id there, laid end to end, so
  requests join and leave while others run, and nothing is padded (`KVCache`, `Window`);
* a prefix that another row has read, or reads now, is copied from it: guidance branches, several samples of one prompt,
  examples before a question;
* ids that the rules force (`boi`, `eoi`) cost no pass of their own, and inside pictures the host does not look at the
  ids before the block ends;
* with a window, several codes of a picture are decoded at once: each is drawn by the same race as alone, so a draft is
  right if and only if it is what would have been drawn, and the result is that of one id at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import psutil
import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.generation.guidance import Guidance, combine
from chameleon.generation.head import Heads, HeadSlice
from chameleon.generation.modality import FORCED, ModalityState, Next, Rules
from chameleon.generation.sampling import Sampling, Settings, sample
from chameleon.model.cache import KVCache, Window
from chameleon.model.running import WeightForm, packs, prepared
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary

TEXT_SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
IMAGE_SAMPLING = Sampling(temperature=0.5, top_p=0.5)
ROWS = 32
PASS = 2048
"""Ids that one pass of the model reads at most; longer prompts are read in parts while other rows go on."""
WORTH_WAITING = 16
"""A row waits for another that reads the same prompt, where that spares it at least so many ids."""
STEP = 64
"""The cache's length grows by multiples of this."""
COMPILED_ON_CPUS = {"freezing": True, "cpp_wrapper": True}
"""Plain weights are packed for oneDNN, in a copy, and no Python stands between the kernels."""
RECOMPILES = 64
"""Shapes of a pass that are compiled before it runs uncompiled."""


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
    given: tuple[int, ...] = ()
    """Ids for the places of the first picture it makes, −1 where the model is to choose."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"{self.seed} is out of range", where="seed", remedy="use 0 … 2⁶³ − 1")

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The full prompt and those of the guidance's branches."""
        return [self.prompt, *(self.guidance.branches if self.guidance else ())]


@dataclass(eq=False)
class Row:
    """A sequence in the cache."""

    slot: int
    ids: list[int]
    """What the cache holds of it."""
    pending: list[int]
    """What it has to read."""
    source: Row | None = None
    """A row that reads the same prompt: this one waits until it can copy `shared` ids from it."""
    shared: int = 0
    state: Tensor | None = None
    """Hidden state [D] of the last id, where another row of the request is not as far yet."""
    alive: bool = True


@dataclass(eq=False)
class Running:
    """A request under way."""

    ticket: int
    request: Request
    state: ModalityState
    rows: list[Row] = field(default_factory=list)
    """The full prompt's, then the branches'."""
    made: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """Ids that may follow the pending ones."""
    seen: Tensor | None = None
    """bool [n], of the ids of the text slice: met before, where the repetition penalty wants to know."""

    @property
    def codes_ahead(self) -> int:
        """How many codes come next before anything else can."""
        return min(self.state.codes_left or 0, self.state.rules.max_new - self.state.made)


@dataclass
class Draw:
    """Places of one pass where ids of one slice are chosen, ready to be drawn from."""

    head: HeadSlice
    index: Tensor
    """int64 [P, R]: which hidden states, those of the branches side by side."""
    weights: Tensor | None
    """float32 [P, R] of the guidance, or None where nobody is guided."""
    settings: Settings
    seeds: Tensor
    numbers: Tensor
    """int64 [P]: how many ids the request has made before."""
    allowed: Tensor | None
    seen: Tensor | None
    given: Tensor | None
    """int64 [P, steps]: ids that are not to be chosen, else −1."""
    places: list[int]
    """Where the ids go among those of all draws."""

    def __call__(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Ids int64 [P] from hidden states [N, D], `step` ids behind the first."""
        logits = self.head.logits(hidden[self.index.flatten()])
        if self.weights is not None:
            logits = combine(logits.unflatten(0, self.index.shape), self.weights)
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        columns = sample(logits, self.settings, self.seeds, self.numbers + step, self.head.ids, self.seen)
        ids = self.head.ids[columns]
        return ids if self.given is None else torch.where(self.given[:, step] >= 0, self.given[:, step], ids)


class Engine:
    """Continues prompts with a Transformer.

    A request's result depends on its prompt, settings and seed alone. In bfloat16 the products of batches of different
    sizes round differently, so there a near tie between two ids may fall the other way in another batch.

    The cache is kept between calls, and what it holds is used again where a prompt begins alike; `forget` frees it.
    """

    def __init__(
        self,
        model: Transformer,
        vocabulary: Vocabulary,
        *,
        rows: int = ROWS,
        window: int = 1,
        form: WeightForm = "plain",
        compiled: bool = False,
    ) -> None:
        """rows: sequences that run at a time; more requests wait. window: codes of a picture decoded at once.

        form: of the head's weights, that of the blocks. compiled: compile the pass of one new id a row, which takes about
        a minute; on GPUs it becomes a CUDA graph, on CPUs it takes a packed copy of plain weights. Passes with drafts, that
        is pictures with a window, are not compiled.
        """
        if rows < 1 or window < 1:
            raise BadInput(f"{rows} rows, a window of {window}", where="engine", remedy="use 1 or more")
        self.model, self.vocabulary, self.window, self.capacity = model, vocabulary, window, rows
        weight = model.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.form, self.compiled = form, compiled
        self.columns = {number: column for column, number in enumerate(self.build())}
        self.tickets = count()
        self.passes = 0
        """Passes of the model so far."""
        self.cache: KVCache | None = None
        self.read_with = self.version()
        self.reset()

    def build(self) -> list[int]:
        """Slices of the head, and the compiled pass, from the weights as they are; the ids of the text slice."""
        on_cpu, head_form = self.device.type == "cpu", self.form
        if self.compiled and head_form == "plain" and on_cpu and self.dtype == torch.bfloat16 and packs():
            head_form = "packed"
        self.heads = Heads(self.model.head, self.vocabulary, lambda part: prepared(part, head_form))
        self.decode: Callable[..., Tensor] | None = None
        if self.compiled:
            if on_cpu and self.form == "packed":
                raise BadInput("compiled passes pack plain weights themselves", where="weights", remedy="use plain or int8")
            torch.compiler.reset()  # a frozen pass holds the weights that it was compiled with
            self.decode = torch.compile(self.one_each, mode="reduce-overhead" if self.device.type == "cuda" else None)
            # Both are looked up when the pass is called, not when it is wrapped. Engines of one process share the limit.
            if self.device.type == "cpu":
                self.decode = torch._inductor.config.patch(COMPILED_ON_CPUS)(self.decode)
            self.decode = torch._dynamo.config.patch(recompile_limit=RECOMPILES)(self.decode)
        return self.heads.text.ids.tolist()

    def reset(self) -> None:
        """Drops all requests and what the cache holds."""
        self.active: list[Row] = []
        self.held: list[list[int]] = [[] for _ in range(self.cache.rows)] if self.cache is not None else []
        """What each slot of the cache holds, free ones too."""
        self.running: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.made: dict[int, deque[int]] = {}
        """Ids of each request that nobody has taken yet."""

    def forget(self) -> None:
        """Drops all requests and frees the cache."""
        self.cache = None
        self.reset()

    def version(self) -> int:
        """Grows when weights are changed in place: what was made from them is of no use then."""
        return sum(p._version for p in self.model.parameters() if not p.is_inference())

    # --- requests ---

    def check(self, request: Request) -> Rules:
        """The request's rules with `max_new` cut to what the context leaves. Raises `BadInput` where it does not fit."""
        context, rules = self.model.config.context, request.rules
        for prompt in request.prompts:
            if not prompt:
                raise BadInput("a prompt needs at least one id", where="prompt")
            if not 0 <= min(prompt) <= max(prompt) < self.vocabulary.size:
                raise BadInput(f"an id is not below {self.vocabulary.size}", where="prompt")
        longest = max(map(len, request.prompts))
        room = context - longest + 1
        if room < 2:
            raise BadInput(
                f"the prompt has {longest} ids, the context {context}",
                where="prompt",
                remedy=f"shorten it to {context - 1} or fewer, of which a picture takes {self.vocabulary.block_length}",
            )
        begun = ModalityState(rules, self.vocabulary, request.prompt)
        still = 0 if begun.codes_left is None or rules.format is None else begun.codes_left + 1  # of an open picture
        if (begun.codes_left or 0) < 0:
            raise BadInput("its last picture has more codes than a picture has", where="prompt")
        least = still + rules.least(self.vocabulary)
        if least > min(room, rules.max_new):
            parts = ["the rest of a picture"] * bool(still) + list(rules.format or ())
            raise BadInput(
                f"{' and '.join(parts)} take {least} ids at least, but there is room for "
                f"{min(room, rules.max_new)} (the prompt has {longest}, the context {context}, max_new is {rules.max_new})",
                where="prompt",
                remedy="shorten it" if room < least else "raise max_new",
            )
        for number in request.given:
            if number != -1 and number not in self.vocabulary.image_ids:
                raise BadInput(f"{number} is the id of no image code", where="given")
        if request.guidance and len(request.guidance.weights) != len(request.prompts):
            weights = len(request.guidance.weights)
            raise BadInput(f"{weights} weights for {len(request.prompts)} prompts", where="guidance")
        if len(request.prompts) > self.capacity:
            raise BadInput(
                f"a guided request takes {len(request.prompts)} rows, the engine has {self.capacity}", where="engine"
            )
        rules = replace(rules, max_new=min(rules.max_new, room))
        if request.guidance and not rules.wants_images + begun.images:
            raise BadInput("guidance sharpens pictures, and none is to be made", where="guidance")
        return rules

    def submit(self, request: Request) -> int:
        """Takes a request into the queue; its ticket. Raises `BadInput` where it does not fit."""
        rules = self.check(request)
        if self.idle and self.version() != self.read_with:
            self.cache, self.held, self.read_with = None, [], self.version()
            self.build()
        entry = Running(next(self.tickets), request, ModalityState(rules, self.vocabulary, request.prompt))
        if request.text.repetition_penalty != 1:
            entry.seen = torch.isin(self.heads.text.ids, torch.tensor(request.prompt, device=self.device))
            entry.seen &= self.vocabulary.is_text(self.heads.text.ids)
        self.waiting.append(entry)
        self.made[entry.ticket] = deque()
        return entry.ticket

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Ends a request, wherever it is; what it made is dropped."""
        self.waiting = deque(entry for entry in self.waiting if entry.ticket != ticket)
        for entry in [entry for entry in self.running if entry.ticket == ticket]:
            self.end(entry)
        self.tidy()
        self.made.pop(ticket, None)

    def ended(self, ticket: int) -> bool:
        """Whether a request has made all it will."""
        return all(entry.ticket != ticket for entry in (*self.running, *self.waiting))

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """New ids of each request, `eos` left out."""
        results: list[list[int]] = [[] for _ in requests]
        for number, token in self.stream(requests):
            results[number].append(token)
        return results

    def stream(self, requests: Sequence[Request], horizon: int | None = None) -> Iterator[tuple[int, int]]:
        """(request, id) as they come, `eos` left out. Closing the iterator cancels what is left.

        horizon: ids of pictures that are made before any is handed out, at most.
        """
        for request in requests:
            self.check(request)
        tickets = [self.submit(request) for request in requests]
        open_ = dict(enumerate(tickets))
        try:
            while open_:
                self.advance(horizon)
                for number, ticket in list(open_.items()):
                    made = self.made.get(ticket, deque())
                    while made:
                        yield number, made.popleft()
                    if ticket not in self.made:
                        remedy = "ask again: another request failed, or this one was cancelled"
                        raise BadInput("the request was dropped", where="engine", remedy=remedy)
                    if self.ended(ticket):
                        del open_[number]
                        del self.made[ticket]
        finally:
            for ticket in open_.values():
                self.cancel(ticket)

    @torch.inference_mode()
    def advance(self, horizon: int | None = None) -> None:
        """Makes the next ids of all requests that run; finished ones leave, waiting ones join.

        Whatever goes wrong, the engine is empty and usable afterwards.
        """
        if self.idle:
            return
        try:
            self.admit()
            if not self.active:
                return
            hidden, where = self.read()
            ready = [entry for entry in self.running if all(id(row) in where for row in entry.rows)]
            if not ready:
                return
            steps = self.steps_unseen(ready, horizon)
            tokens = [self.choose(self.draws(ready, where, steps), hidden)]
            if steps > 1:
                tokens += self.follow(ready, tokens[0], steps)
            # The one look of the host at what was made.
            made = torch.stack(tokens, dim=1).tolist()
            for entry in ready:
                places, made = made[: 1 + len(entry.draft)], made[1 + len(entry.draft) :]
                self.take(entry, places[0] if steps > 1 else self.right(entry, [ids[0] for ids in places]))
            self.tidy()
        except BaseException:
            self.forget()
            raise

    # --- rows and the cache ---

    def admit(self) -> None:
        """Gives waiting requests rows, while there are any."""
        while self.waiting:
            entry = self.waiting[0]
            prompts = entry.request.prompts
            rows = len(self.active) + len(prompts)
            length = max(map(len, prompts)) + entry.state.rules.max_new
            if rows > self.capacity or not self.make_room(rows, min(length, self.model.config.context)):
                break
            self.waiting.popleft()
            entry.rows = [self.place(prompt) for prompt in prompts]
            kind = entry.state.next()
            self.running.append(entry)
            if kind in FORCED:
                self.follow_rules(entry)
                self.tidy()  # it may have nothing to make but what must come

    def make_room(self, rows: int, length: int) -> bool:
        """Whether the cache has, or now gets, so many rows of that length. Raises `BadInput` where one never would fit."""
        old = self.cache
        if old is not None and rows <= old.rows and length <= old.length:
            return True
        a_slot = KVCache.bytes_a_slot(self.model.config, self.dtype)
        length = max(-(-length // STEP) * STEP, old.length if old else 0)
        least = max(rows, old.rows if old else 0)
        wanted = min(self.capacity, 1 << (least - 1).bit_length())
        free = free_memory(self.device)
        if self.active and least * length * a_slot > free:
            return False  # until those that run have ended
        if not self.active and least * length * a_slot > free:
            old = self.cache = None
            self.held, least = [], rows
            free = free_memory(self.device)
            if rows * length * a_slot > free:
                raise BadInput(
                    f"{rows} row{'s' * (rows > 1)} of {length} ids take {rows * length * a_slot / 1e9:.1f} GB for keys and "
                    f"values, {free / 1e9:.1f} GB are free",
                    where="engine",
                    remedy=f"{max(0, int(free / a_slot / rows))} ids fit: shorten the prompt or lower max_new",
                )
            wanted = rows
        cache = KVCache(
            self.model.config,
            wanted if 2 * wanted * length * a_slot <= free else least,
            length,
            dtype=self.dtype,
            device=self.device,
        )
        if self.compiled and self.device.type == "cuda":  # CUDA graphs read it where it lies
            for buffer in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(buffer)
        if old is not None:
            cache.take_from(old)
        self.cache = cache
        self.held += [[] for _ in range(cache.rows - len(self.held))]
        return True

    def place(self, prompt: Sequence[int]) -> Row:
        """A row for the prompt, behind those that are there, with what the cache knows of it."""
        assert self.cache is not None
        slot, most = len(self.active), len(prompt) - 1  # the last id has to be read for its hidden state
        shared, source = max(
            ((min(common(ids, prompt), most), number) for number, ids in enumerate(self.held)), key=lambda pair: pair[0]
        )
        if shared and source != slot:
            self.cache.copy(source, slot, shared)
        row = Row(slot, list(prompt[:shared]), list(prompt[shared:]))
        for other in self.active:
            promised = min(common([*other.ids, *other.pending], prompt), most)
            if other.pending and promised >= max(shared, row.shared) + WORTH_WAITING:
                row.source, row.shared = other, promised
        self.held[slot] = row.ids
        self.active.append(row)
        return row

    def end(self, entry: Running) -> None:
        """Takes a request out; its rows are free after `tidy`."""
        self.running.remove(entry)
        for row in entry.rows:
            row.alive = False

    def tidy(self) -> None:
        """Moves rows into the places of dead ones, so that those alive are the cache's first."""
        for slot in reversed(range(len(self.active))):
            if self.active[slot].alive:
                continue
            last = self.active.pop()
            if last.slot == slot:
                self.held[slot] = list(last.ids)
                continue
            assert self.cache is not None
            self.cache.copy(last.slot, slot, len(last.ids))
            self.held[last.slot] = list(last.ids)
            last.slot, self.held[slot], self.active[slot] = slot, last.ids, last

    # --- a pass ---

    def read(self) -> tuple[Tensor, dict[int, int]]:
        """Lets each row read what it has to; hidden states [N, D], and where those of a row's last id and draft begin.

        Rows that have not read all yet, or did so in vain for now, are not in the dictionary.
        """
        assert self.cache is not None
        drafts = {id(row): entry.draft for entry in self.running for row in entry.rows}
        starts, fed = [], []
        left = PASS
        for row in self.active:
            if row.source is not None and not row.source.alive:
                row.source = None  # cancelled
            ids = [] if row.source is not None else row.pending[: max(1, left)]
            if len(ids) == len(row.pending) and ids:
                ids = ids + drafts[id(row)]
            left -= len(ids)
            starts.append(len(row.ids))
            fed.append(ids)
        flat = torch.tensor([[token for ids in fed for token in ids]], device=self.device)
        hidden = self.forward(flat, starts, [len(ids) for ids in fed])
        where: dict[int, int] = {}
        done = 0
        kept: list[Tensor] = []
        for row, ids in zip(self.active, fed, strict=True):
            done += len(ids)
            if ids:
                count_ = min(len(row.pending), len(ids))
                row.ids += row.pending[:count_]
                del row.pending[:count_]
                if not row.pending:
                    where[id(row)] = done - len(drafts[id(row)]) - 1
        for row in self.active:
            if row.source is not None and len(row.source.ids) >= row.shared:
                self.copy_shared(row, row.source)
        for entry in self.running:
            together = all(id(row) in where or row.state is not None for row in entry.rows)
            for row in entry.rows:
                if not together and id(row) in where:
                    row.state = hidden[where.pop(id(row))].clone()
                elif together and row.state is not None:
                    where[id(row)] = len(hidden) + len(kept)
                    kept.append(row.state)
                    row.state = None
        return (torch.cat([hidden, torch.stack(kept)]) if kept else hidden), where

    def copy_shared(self, row: Row, source: Row) -> None:
        """Copies what both begin with, now that the other row has read it."""
        assert self.cache is not None
        self.cache.copy(source.slot, row.slot, row.shared)
        more = row.shared - len(row.ids)
        row.ids += row.pending[:more]
        del row.pending[:more]
        row.source = None

    def forward(self, ids: Tensor, starts: Sequence[int], news: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """Hidden states [N, D] of ids [1, N], `news[r]` of them of row r, which has `starts[r]` in the cache."""
        assert self.cache is not None
        self.passes += 1
        if self.decode is None or any(new != 1 for new in news):
            return self.model(ids, window=Window.of(self.cache, starts, news, positions))[0]
        seen = min(self.cache.length, -(-(max(starts) + 1) // STEP) * STEP)
        slots = torch.tensor(starts, device=self.device) if positions is None else positions[0]
        return self.decode(ids, self.cache, slots, seen).clone()

    def one_each(self, ids: Tensor, cache: KVCache, slots: Tensor, seen: int) -> Tensor:
        """The pass of one new id a row in the shape that is compiled: all rows look at `seen` slots, through a mask."""
        return self.model(ids, window=Window.even(cache, slots, seen))[0]

    # --- choosing ---

    def steps_unseen(self, ready: Sequence[Running], horizon: int | None) -> int:
        """How many ids of each can be made before the host needs to know one: more than 1 if all are inside pictures."""
        if self.window > 1 or len(ready) < len(self.running):
            return 1
        return max(1, min([entry.codes_ahead for entry in ready] + ([horizon] if horizon else [])))

    def draws(self, ready: Sequence[Running], where: dict[int, int], steps: int = 1) -> list[Draw]:
        """The draws of the next id of each, and of those behind its draft's ids. `where`: the hidden state of each row."""
        places: dict[HeadSlice, list[tuple[int, Running, Next, int]]] = {}
        total = 0
        for entry in ready:
            kind = entry.state.next()
            for ahead in range(1 + len(entry.draft)):
                places.setdefault(self.heads.slice_for(kind), []).append((total, entry, kind, ahead))
                total += 1
        return [self.draw_of(head, chosen, where, steps) for head, chosen in places.items()]

    def draw_of(
        self, head: HeadSlice, chosen: Sequence[tuple[int, Running, Next, int]], where: dict[int, int], steps: int
    ) -> Draw:
        codes = head is self.heads.codes
        width = max(len(entry.rows) for _, entry, _, _ in chosen) if codes else 1
        index, weights, settings, seeds, numbers, allowed, given = [], [], [], [], [], [], []
        for _, entry, kind, ahead in chosen:
            rows = [where[id(row)] + ahead for row in entry.rows[:width]]
            index.append(rows + rows[:1] * (width - len(rows)))
            scales = entry.request.guidance.weights if entry.request.guidance and codes else (1.0,)
            weights.append([*scales, *[0.0] * (width - len(scales))])
            settings.append(entry.request.image if codes else entry.request.text)
            seeds.append(entry.request.seed)
            numbers.append(len(entry.made) + ahead)
            allowed.append(self.heads.allowed[kind])
            given.append(self.given_ids(entry, ahead, steps) if codes else [])
        seen = None
        if not codes and any(entry.seen is not None for _, entry, _, _ in chosen):
            nothing = torch.zeros(len(head.ids), dtype=torch.bool, device=self.device)
            seen = torch.stack([nothing if entry.seen is None else entry.seen for _, entry, _, _ in chosen])
        masks = [mask for mask in allowed if mask is not None]
        return Draw(
            head,
            torch.tensor(index, device=self.device),
            torch.tensor(weights, device=self.device) if width > 1 else None,
            Settings.of(tuple(settings), self.device),
            torch.tensor(seeds, device=self.device),
            torch.tensor(numbers, device=self.device),
            torch.stack(masks) if masks else None,
            seen,
            torch.tensor(given, device=self.device) if any(max(ids, default=-1) >= 0 for ids in given) else None,
            [place for place, _, _, _ in chosen],
        )

    def given_ids(self, entry: Running, ahead: int, steps: int) -> list[int]:
        """What the request gives for its next codes from `ahead` on, −1 where nothing."""
        given = entry.request.given if entry.state.images == 1 else ()
        first = self.vocabulary.image_length - (entry.state.codes_left or 0) + ahead
        found = list(given[first : first + steps])
        return found + [-1] * (steps - len(found))

    def choose(self, draws: Sequence[Draw], hidden: Tensor, step: int = 0) -> Tensor:
        """Ids int64 [places] of all draws."""
        if len(draws) == 1:
            return draws[0](hidden, step)
        result = torch.empty(sum(len(draw.places) for draw in draws), dtype=torch.int64, device=self.device)
        for draw in draws:
            result[torch.tensor(draw.places, device=self.device)] = draw(hidden, step)
        return result

    def follow(self, ready: Sequence[Running], tokens: Tensor, steps: int) -> list[Tensor]:
        """The ids behind `tokens` [P], one tensor [P] a step: all on the device, no id is looked at."""
        number = {id(row): place for place, entry in enumerate(ready) for row in entry.rows}
        owner = torch.tensor([number[id(row)] for row in self.active], device=self.device)
        starts = [len(row.ids) for row in self.active]
        positions = torch.tensor([starts], device=self.device)
        draws = self.draws(ready, {id(row): row.slot for row in self.active}, steps)
        made = []
        for step in range(1, steps):
            ids = tokens[owner].unsqueeze(0)
            hidden = self.forward(ids, [start + step - 1 for start in starts], [1] * len(starts), positions + step - 1)
            tokens = self.choose(draws, hidden, step)
            made.append(tokens)
        return made

    # --- what was chosen ---

    def right(self, entry: Running, drawn: list[int]) -> list[int]:
        """Those of the drawn ids that stand behind a right draft; from the others and from guesses comes the next draft.

        The n-th was drawn behind n ids of the draft. It is what would have been drawn alone if these are.
        """
        good = 1
        while good < len(drawn) and drawn[good - 1] == entry.draft[good - 1]:
            good += 1
        entry.draft = drawn[good:]
        return drawn[:good]

    def take(self, entry: Running, tokens: Sequence[int]) -> None:
        """Takes note of ids that were made, and of what the rules force behind them."""
        for row in entry.rows:
            row.ids += tokens[:-1]
            row.pending = [tokens[-1]]
        for token in tokens:
            if token == self.vocabulary.eos:
                self.end(entry)
                return
            self.push(entry, token)
        if entry.state.done:
            self.end(entry)
            return
        if entry.state.next() in FORCED:
            self.follow_rules(entry)
        elif self.window > 1:
            self.guess(entry)

    def push(self, entry: Running, token: int) -> None:
        entry.made.append(token)
        entry.state.push(token)
        self.made[entry.ticket].append(token)
        if entry.seen is not None and entry.state.codes_left is None and token in self.vocabulary.text_ids:
            entry.seen[self.columns[token]] = True

    def follow_rules(self, entry: Running) -> None:
        """Adds the ids that must come, which need no choosing."""
        entry.draft = []
        while (kind := entry.state.next()) in FORCED:
            if kind == Next.END or entry.state.done:
                self.end(entry)
                return
            token = getattr(self.vocabulary, FORCED[kind])
            self.push(entry, token)
            for row in entry.rows:
                row.pending.append(token)
        if entry.state.done:
            self.end(entry)

    def guess(self, entry: Running) -> None:
        """Fills the draft up to the window: codes look like those above them."""
        ahead = min(self.window, entry.codes_ahead) - 1
        width = self.vocabulary.grid[1]
        while len(entry.draft) < ahead:
            known = [*entry.made, *entry.draft]
            left_behind = self.vocabulary.image_length - (entry.state.codes_left or 0) + len(entry.draft)
            entry.draft.append(known[-width] if width <= left_behind <= len(known) else known[-1])
        del entry.draft[max(0, ahead) :]


def common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids both begin with."""
    for number, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return number
    return min(len(some), len(others))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)
