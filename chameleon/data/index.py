"""The rows of a source: which documents each holds, from the counts of their lengths, without reading an id.

Held in memory are four bytes a document: their numbers, sorted by length. What a row holds follows from its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from chameleon.data.packing import cut, pack
from chameleon.data.token_shards import TokenShard
from chameleon.errors import BadInput

WINDOW = 1 << 20  # documents sorted at a time


class Piece(NamedTuple):
    """A stretch of a document in a row."""

    document: int
    """Number among all documents of the source."""
    start: int
    """The id that is the first input."""
    size: int
    """How many targets: ids start + 1 … start + size."""


class RowIndex:
    """Rows of at most `context` targets that hold every document of some shards once."""

    def __init__(self, shards: Sequence[TokenShard], context: int, block: int) -> None:
        """`block`: ids of a picture. Raises `BadInput` where a picture does not fit, or there is nothing to predict."""
        self.context = context
        self.firsts = list(accumulate((len(shard) for shard in shards), initial=0))
        documents = self.firsts[-1]
        sizes = np.zeros(documents, dtype=np.uint16 if context < 1 << 16 else np.uint32)  # 0: cut, or nothing to predict
        pieces: list[tuple[np.ndarray, ...]] = []
        for shard, first in zip(shards, self.firsts[:-1], strict=True):
            offsets = shard.offsets
            lengths = np.diff(offsets)
            long = np.flatnonzero(lengths > context + 1)
            if len(long):
                made = cut(offsets[long], offsets[long + 1], shard.images, block, context)
                pieces.append((first + long[made.document], made.start, made.size))
                lengths[long] = 0
            sizes[first : first + len(shard)] = np.maximum(lengths - 1, 0)
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)] if pieces else 3 * [np.empty(0, int)]
        self.piece_document: np.ndarray = columns[0]
        self.piece_start: np.ndarray = columns[1]
        piece_size: np.ndarray = columns[2]
        counts = np.bincount(piece_size, minlength=context + 1)
        for part in windows(sizes):
            counts += np.bincount(part, minlength=context + 1)
        counts[0] = 0
        if not counts.any():
            raise BadInput("no document with anything to predict", where=shards[0].folder.parent)
        self.documents = documents
        self.targets = int(counts @ np.arange(context + 1))
        self.bucket = np.concatenate(([0], np.cumsum(counts)))  # where the items of each length start in `order`
        items = documents + len(piece_size)
        self.order = np.empty(self.bucket[-1], dtype=np.uint32 if items < 1 << 32 else np.uint64)
        place = self.bucket[:-1].copy()
        number = 0
        for part in (*windows(sizes), *windows(piece_size)):
            self.put(part, number, place)
            number += len(part)
        self.alike = pack(counts, context)
        self.alike_firsts = list(accumulate((alike.rows for alike in self.alike), initial=0))

    def put(self, sizes: np.ndarray, number: int, place: np.ndarray) -> None:
        """Puts items of these sizes, numbered from `number`, where their lengths' next places are."""
        counts = np.bincount(sizes, minlength=self.context + 1)
        by_size = np.argsort(sizes, kind="stable")[counts[0] :]  # those of size 0 are no items
        counts[0] = 0
        starts = np.cumsum(counts) - counts
        where = np.repeat(place - starts, counts) + np.arange(len(by_size))
        self.order[where] = by_size + number
        place += counts

    def __len__(self) -> int:
        """How many rows there are."""
        return self.alike_firsts[-1]

    def __getitem__(self, row: int) -> list[Piece]:
        """What a row holds."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect_right(self.alike_firsts, row) - 1
        within = row - self.alike_firsts[number]
        found = []
        for length, each, first in self.alike[number].stacks:
            start = int(self.bucket[length]) + first + within * each
            for item in self.order[start : start + each].tolist():
                if item < self.documents:
                    found.append(Piece(item, 0, length))
                else:
                    piece = item - self.documents
                    found.append(Piece(int(self.piece_document[piece]), int(self.piece_start[piece]), length))
        return found

    def shard_of(self, document: int) -> tuple[int, int]:
        """Which shard a document lies in, and its number there."""
        shard = bisect_right(self.firsts, document) - 1
        return shard, document - self.firsts[shard]

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold ids."""
        return self.targets / (len(self) * self.context)


def windows(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), WINDOW):
        yield values[start : start + WINDOW]
