"""Which rows a training step sees: a pure function of (seed, step).

Each source is packed once; its rows are shuffled anew every epoch. A pattern of 1000 places, shuffled once, says which
source each row of the run comes from, so the source and the place in it follow from the row's number alone. Resuming
needs a step number and nothing else, and any number of devices sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chameleon.data.packing import Piece, cut, pack
from chameleon.data.token_shards import TokenShard, open_shards
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import answer_mask
from chameleon.vocabulary import Vocabulary

PATTERN = 1000


@dataclass
class SourceConfig:
    """One source of a mixture."""

    shards: str
    """Folder of token shards."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources'."""
    loss: Literal["all", "answers"] = "all"
    """Which ids the loss is taken on."""
    swap_pairs: bool = True
    """Put the text of a picture–text pair first in half of the cases, decided per sample and epoch (RECIPE 2.2)."""


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


class PackedSource:
    """The documents of a source, packed into rows of the context length."""

    def __init__(self, config: SourceConfig, context: int, vocabulary: Vocabulary, fingerprint: str | None) -> None:
        self.config, self.context, self.vocabulary = config, context, vocabulary
        self.shards: list[TokenShard] = open_shards(Path(config.shards), fingerprint)
        self.firsts = np.cumsum([0] + [len(shard) for shard in self.shards])
        lengths = np.concatenate([shard.lengths for shard in self.shards])
        pieces: list[Piece] = []
        for number, length in enumerate(lengths.tolist()):
            # One id more than the context is a full row with targets: the last id is only ever a target.
            if length <= context + 1:
                pieces.append(Piece(number, 0, length))
            else:
                # A later stretch begins with the last id of the one before, so that each id but the first is a target.
                stretches = cut(self.document(number), context, vocabulary)
                pieces += [Piece(number, max(0, start - 1), end) for start, end in stretches]
        self.pieces = [piece for piece in pieces if piece.end - piece.start > 1]
        if not self.pieces:
            raise BadInput("no document with anything to predict", where=config.shards)
        self.rows = pack(np.array([piece.end - piece.start - 1 for piece in self.pieces]), context)

    def document(self, number: int) -> np.ndarray:
        """Ids int64 [T] of a document."""
        shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.shards[shard][number - int(self.firsts[shard])]

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold ids."""
        return sum(p.end - p.start - 1 for p in self.pieces) / (len(self.rows) * self.context)

    def swapped(self, ids: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """`bos picture text eos` as `bos text picture eos` in half of the cases; anything else as it is."""
        block = self.vocabulary.block_length
        is_pair = (
            len(ids) > block + 2
            and ids[1] == self.vocabulary.boi
            and bool(self.vocabulary.is_text(torch.from_numpy(ids[1 + block : -1])).all())
            and ids[-1] == self.vocabulary.eos
        )
        if not is_pair or np.random.default_rng(seed).random() < 0.5:
            return ids
        return np.concatenate((ids[:1], ids[1 + block : -1], ids[1 : 1 + block], ids[-1:]))

    def row(self, number: int, epoch: int, seed: int) -> Rows:
        """Row `number`, each tensor [T]. `seed` and `epoch` decide the order within pairs."""
        v, context = self.vocabulary, self.context
        ids, targets = (torch.full((context,), v.pad) for _ in range(2))
        weights = torch.zeros(context)
        document_ids, positions = (torch.zeros(context, dtype=torch.int64) for _ in range(2))
        place = 0
        for order, item in enumerate(self.rows[number]):
            piece = self.pieces[item]
            document = self.document(piece.document)
            if self.config.swap_pairs and piece.end - piece.start == len(document):
                document = self.swapped(document, (seed, epoch, piece.document))
            whole = torch.from_numpy(document)
            stretch = slice(piece.start, piece.end)
            values = whole[stretch]
            end = place + len(values) - 1
            ids[place:end], targets[place:end] = values[:-1], values[1:]
            weights[place:end] = answer_mask(whole, v)[stretch][1:].float() if self.config.loss == "answers" else 1.0
            document_ids[place:end] = order
            positions[place:end] = torch.arange(end - place)
            place = end
        document_ids[place:] = len(self.rows[number])
        positions[place:] = torch.arange(context - place)
        return Rows(ids, targets, weights, document_ids, positions)


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
    ) -> None:
        """`rows`: rows a step, over all devices. Raises `BadInput` for shards of other tokenizers."""
        if not sources or any(source.weight <= 0 for source in sources):
            raise BadInput("a mixture needs sources with positive weights", where="mixture")
        self.sources = [PackedSource(source, context, vocabulary, fingerprint) for source in sources]
        self.rows, self.seed = rows, seed
        shares = np.array([source.weight for source in sources]) / sum(source.weight for source in sources)
        counts = np.floor(shares * PATTERN).astype(int)
        for place in np.argsort(counts - shares * PATTERN, kind="stable")[: PATTERN - counts.sum()]:
            counts[place] += 1
        pattern = np.repeat(np.arange(len(sources)), counts)
        self.pattern = np.random.default_rng(seed).permutation(pattern)
        self.counts = counts
        self.rank_in_pattern = np.zeros(PATTERN, dtype=int)
        for source in range(len(sources)):
            where = self.pattern == source
            self.rank_in_pattern[where] = np.arange(where.sum())

    def locate(self, number: int) -> tuple[int, int, int]:
        """(source, epoch, row of the source) of the run's row `number`."""
        block, place = divmod(number, PATTERN)
        source = int(self.pattern[place])
        epoch, index = divmod(
            block * int(self.counts[source]) + int(self.rank_in_pattern[place]), len(self.sources[source].rows)
        )
        return source, epoch, int(self.order(source, epoch)[index])

    @lru_cache(maxsize=64)  # noqa: B019 — a mixture lives as long as its run
    def order(self, source: int, epoch: int) -> np.ndarray:
        """The order of a source's rows in an epoch."""
        return np.random.default_rng((self.seed, source, epoch)).permutation(len(self.sources[source].rows))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """The rows of a step that fall to one of `world` devices, each tensor [rows / world, T].

        Raises `BadInput` where the rows do not divide: devices with fewer would leave the others waiting.
        """
        if self.rows % world:
            raise BadInput(f"rows {self.rows} do not divide by {world} devices", where="recipe.rows")
        chosen = []
        for number in range(step * self.rows + rank, (step + 1) * self.rows, world):
            source, epoch, row = self.locate(number)
            chosen.append(self.sources[source].row(row, epoch, self.seed))
        return Rows(*(torch.stack(column) for column in zip(*chosen, strict=True)))
