"""Which rows a training step sees: a pure function of (seed, step).

Each source's rows are planned once and shuffled anew every epoch. A pattern of places, shuffled once, says which source
each row of the run comes from, so the source and the place in it follow from the row's number alone. Resuming needs a step
number and nothing else, and any number of devices sees the same global batches.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chameleon.data.index import Piece, RowIndex
from chameleon.data.sources import braced
from chameleon.data.token_shards import TokenShard, open_shards
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import answer_mask
from chameleon.vocabulary import Vocabulary

PATTERN = 10_000


@dataclass
class SourceConfig:
    """One source of a mixture."""

    shards: str
    """Folder of token shards, or several in braces, `data/{pairs,texts}`: their documents then share rows."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources'; 0 where a later stage gives it one."""
    loss: Literal["all", "answers"] = "all"
    """Which ids the loss is taken on."""
    swap_pairs: bool = True
    """Put the text of a picture–text pair first in half of the cases, decided per sample and epoch (RECIPE 2.2)."""
    name: str | None = None
    """What stages call it; left out, the folder's name."""

    @property
    def called(self) -> str:
        return self.name or Path(self.shards).name


@dataclass
class StageConfig:
    """A part of training in which sources have other weights."""

    start: float
    """Share of training at which it begins, above 0 and below 1."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name of a source → its weight from here on; those left out keep theirs."""


class Rows(NamedTuple):
    """Packed rows, each tensor [B, T]."""

    ids: Tensor
    """int64; `pad` where nothing is."""
    targets: Tensor
    """int64: the next id of the same document."""
    weights: Tensor
    """float32: 1 where the loss is taken, else 0."""
    document_ids: Tensor
    """int64: which document of the row; padding is one of its own."""
    positions: Tensor
    """int64: position in the document."""


M64 = (1 << 64) - 1


def splitmix(*numbers: int) -> int:
    """64 bits that look random, from integers: the finaliser of SplitMix64 over each in turn (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & M64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & M64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & M64
        state ^= state >> 31
    return state


ROUNDS = 6


def shuffled(place: int, count: int, key: int) -> int:
    """What stands at `place` when 0 … count − 1 are shuffled by `key`, without a list of them.

    A Feistel network on the least even number of bits, walked until it gives a number below `count` (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (splitmix(key, turn, right) & mask)
        place = left << half | right
        if place < count:
            return place


class PackedSource:
    """The documents of a source, packed into rows of the context length."""

    def __init__(self, config: SourceConfig, context: int, vocabulary: Vocabulary, fingerprint: str | None) -> None:
        self.config, self.context, self.vocabulary = config, context, vocabulary
        self.shards: list[TokenShard] = []
        for folder in braced(config.shards):
            self.shards += open_shards(Path(folder), fingerprint)
        self.index = RowIndex(self.shards, context, vocabulary.block_length)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.index)

    @property
    def tokens_per_row(self) -> float:
        """Targets that a row holds on average."""
        return self.index.targets / len(self)

    def answers_by_modality(self) -> tuple[int, int]:
        """How many ids of text and of image codes its answers hold; of documents, all their ids."""
        part = "answers_by_modality" if self.config.loss == "answers" else "by_modality"
        counts = [shard.description[part] for shard in self.shards]
        return sum(count.get("text", 0) for count in counts), sum(count.get("image", 0) for count in counts)

    def swapped(self, ids: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """`bos picture text eos` as `bos text picture eos` in half of the cases; anything else as it is."""
        v, block = self.vocabulary, self.vocabulary.block_length
        if len(ids) <= block + 2 or ids[1] != v.boi or ids[-1] != v.eos or splitmix(*seed) & 1:
            return ids
        if not bool(v.is_text(torch.from_numpy(ids[1 + block : -1])).all()):
            return ids
        return np.concatenate((ids[:1], ids[1 + block : -1], ids[1 : 1 + block], ids[-1:]))

    def piece(self, piece: Piece, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray | float]:
        """Ids int64 [size + 1] of a piece, and the loss's weight of each but the first."""
        number, within = self.index.shard_of(piece.document)
        shard = self.shards[number]
        variant = epoch % shard.variants
        end = piece.start + piece.size + 1
        if self.config.loss == "answers":
            whole = shard.stretch(within, variant=variant)  # where its answers lie is told by what came before
            mask = answer_mask(whole, self.vocabulary)
            return whole[piece.start : end], mask[piece.start + 1 : end]
        ids = shard.stretch(within, piece.start, end, variant)
        if self.config.swap_pairs and piece.start == 0:
            ids = self.swapped(ids, (seed, epoch, piece.document))
        return ids, 1.0

    def row(self, number: int, epoch: int, seed: int) -> Rows:
        """Row `number`, each tensor [T]. `seed` and `epoch` decide the order within pairs; `epoch` the view of pictures."""
        v, context = self.vocabulary, self.context
        ids, targets = (np.full(context, v.pad) for _ in range(2))
        weights = np.zeros(context, dtype=np.float32)
        document_ids, positions = (np.zeros(context, dtype=np.int64) for _ in range(2))
        place = order = 0
        for order, piece in enumerate(self.index[number], 1):
            values, loss = self.piece(piece, epoch, seed)
            end = place + piece.size
            ids[place:end], targets[place:end] = values[:-1], values[1:]
            weights[place:end] = loss
            document_ids[place:end] = order - 1
            positions[place:end] = np.arange(piece.size)
            place = end
        document_ids[place:] = order
        positions[place:] = np.arange(context - place)
        return Rows(*map(torch.from_numpy, (ids, targets, weights, document_ids, positions)))


class Stage:
    """Rows of the run from `first` on, over which sources have one set of shares."""

    def __init__(self, first: int, shares: np.ndarray, drawn: np.ndarray, seed: int) -> None:
        """`shares` [sources] of the rows; `drawn` [sources]: rows that each has given before."""
        self.first, self.drawn = first, drawn
        self.counts = np.floor(shares * PATTERN).astype(np.int64)
        for place in np.argsort(self.counts - shares * PATTERN, kind="stable")[: PATTERN - self.counts.sum()]:
            self.counts[place] += 1
        self.pattern = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(shares)), self.counts))
        hits = self.pattern[:, None] == np.arange(len(shares))
        self.before = np.concatenate((np.zeros((1, len(shares)), int), np.cumsum(hits, axis=0)))

    def drawn_until(self, number: int) -> np.ndarray:
        """Rows that each source has given before row `number` of the run: int64 [sources]."""
        block, place = divmod(number - self.first, PATTERN)
        return self.drawn + block * self.counts + self.before[place]

    def locate(self, number: int) -> tuple[int, int]:
        """(source, how many rows it has given before) of row `number` of the run."""
        block, place = divmod(number - self.first, PATTERN)
        source = int(self.pattern[place])
        return source, int(self.drawn[source] + block * self.counts[source] + self.before[place, source])


class Mixture:
    """Batches of rows from several sources by weight."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        context: int,
        rows: int,
        seed: int,
        vocabulary: Vocabulary,
        fingerprint: str | None = None,
        stages: Sequence[StageConfig] = (),
        steps: int = 0,
        balance_modalities: bool = False,
    ) -> None:
        """`rows`: rows a step, over all devices; `steps`: of the whole run, which `stages` are shares of.

        `balance_modalities`: sources whose answers are mostly image codes get half of the tokens together and the others
        the other half, each in the ratio of their weights. Raises `BadInput` for shards of other tokenizers, two sources
        of one name, and weights or stages that make no sense.
        """
        weights = stage_weights(sources, stages)
        self.sources = [PackedSource(source, context, vocabulary, fingerprint) for source in sources]
        self.rows, self.seed = rows, seed
        if balance_modalities:
            weights = [self.balanced(row) for row in weights]
        per_row = np.array([source.tokens_per_row for source in self.sources])
        self.stages: list[Stage] = []
        for start, row in zip((0.0, *(stage.start for stage in stages)), weights, strict=True):
            first = round(start * steps) * rows
            drawn = self.stages[-1].drawn_until(first) if self.stages else np.zeros(len(row), dtype=np.int64)
            shares = row / per_row
            stage = Stage(first, shares / shares.sum(), drawn, seed)
            for source, weight, count in zip(sources, row, stage.counts, strict=True):
                if weight > 0 and count == 0:
                    raise BadInput(
                        f"its weight gives {source.called} less than one row in {PATTERN}",
                        where="mixture",
                        remedy="raise it",
                    )
            self.stages.append(stage)
        self.stage_firsts = [stage.first for stage in self.stages]

    def balanced(self, weights: np.ndarray) -> np.ndarray:
        """Weights under which sources that draw have half of the tokens. Raises `BadInput` where only one kind is there."""
        draws = np.array([image > text for text, image in (source.answers_by_modality() for source in self.sources)])
        result = weights.copy()
        for kind in (draws, ~draws):
            if not weights[kind].sum() > 0:
                raise BadInput(
                    f"no source whose answers are mostly {'pictures' if kind is draws else 'text'}",
                    where="balance_modalities",
                    remedy="add one, or leave it out",
                )
            result[kind] /= weights[kind].sum()
        return result

    def locate(self, number: int) -> tuple[int, int, int]:
        """(source, epoch, row of the source) of the run's row `number`."""
        source, drawn = self.stages[bisect_right(self.stage_firsts, number) - 1].locate(number)
        count = len(self.sources[source])
        epoch, place = divmod(drawn, count)
        return source, epoch, shuffled(place, count, splitmix(self.seed, source, epoch))

    def check_parts(self, world: int) -> None:
        """Raises `BadInput` where the rows do not divide by `world`: devices with fewer would leave the others waiting."""
        if self.rows % world:
            near = max(world, self.rows // world * world)
            raise BadInput(
                f"rows {self.rows} do not divide by {world} devices", where="recipe.rows", remedy=f"{near} rows do"
            )

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """The rows of a step that fall to one of `world` devices, each tensor [rows / world, T]; see `check_parts`."""
        self.check_parts(world)
        chosen = []
        for number in range(step * self.rows + rank, (step + 1) * self.rows, world):
            source, epoch, row = self.locate(number)
            chosen.append(self.sources[source].row(row, epoch, self.seed))
        return Rows(*(torch.stack(column) for column in zip(*chosen, strict=True)))


def stage_weights(sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> list[np.ndarray]:
    """Weights [sources] of each stage, the first being the sources' own. Raises `BadInput` for what makes no sense."""
    names = [source.called for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two sources are called {name}", where="mixture", remedy="give them a name each")
    if not sources:
        raise BadInput("no source", where="mixture")
    rows = [{source.called: source.weight for source in sources}]
    before = 0.0
    for stage in stages:
        if not before < stage.start < 1:
            raise BadInput(f"stage starts at {stage.start}, expected rising shares above 0 and below 1", where="stages")
        before = stage.start
        for name in stage.weights:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                raise BadInput(f"no source {name}", where="stages", remedy=f"did you mean {near[0]}?")
        rows.append({**rows[-1], **stage.weights})
    for row in rows:
        for name, weight in row.items():
            if not 0 <= weight < math.inf:
                raise BadInput(f"weight of {name} is {weight}, expected a number of 0 or more", where="mixture")
        if not sum(row.values()) > 0:
            raise BadInput("a mixture needs sources with positive weights", where="mixture")
    for name in names:
        if not any(row[name] > 0 for row in rows):
            raise BadInput(f"weight of {name} is 0 from first to last", where="mixture", remedy="leave it out")
    return [np.array([row[name] for name in names], dtype=float) for row in rows]
