"""The packed rows of a source: which documents each row has, planned from their lengths without reading token ids.

It takes four bytes of memory for each document: the documents' indices, sorted by length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from chameleon.data.packing import pack, split_long_documents
from chameleon.data.token_shards import TokenShard
from chameleon.errors import BadInput
from chameleon.vocabulary import Vocabulary

SORT_CHUNK = 1 << 20
"""Documents that are sorted at a time."""


class Segment(NamedTuple):
    """A segment of a document in a row."""

    document: int
    """Index among all documents of the source."""
    start: int
    """The token that is the first input."""
    size: int
    """Number of targets: tokens start + 1 … start + size."""


class RowIndex:
    """Rows of at most `context_length` targets that contain every document of some shards once.

    An item is a document that fits the context length (its index), or a segment of a longer one (the number of documents
    plus its index among the segments).
    """

    def __init__(self, shards: Sequence[TokenShard], context_length: int, vocabulary: Vocabulary) -> None:
        """Raises `BadInput` where an image does not fit the context length, or there is nothing to predict."""
        self.context_length = context_length
        self.first_documents = list(accumulate((len(shard) for shard in shards), initial=0))
        """Index of the first document of each shard, and the number of all documents."""
        self.num_documents = self.first_documents[-1]
        # Number of targets of each document; 0 for those that are split, or have nothing to predict.
        sizes = np.zeros(self.num_documents, dtype=np.uint16 if context_length < 1 << 16 else np.uint32)
        segments: list[tuple[np.ndarray, ...]] = []
        for shard, first in zip(shards, self.first_documents[:-1], strict=True):
            offsets = shard.offsets
            lengths = np.diff(offsets)
            long = np.flatnonzero(lengths > context_length + 1)
            if len(long):
                split = split_long_documents(
                    offsets[long],
                    offsets[long + 1],
                    shard.image_starts,
                    shard.image_lengths(vocabulary),
                    context_length,
                )
                segments.append((first + long[split.document], split.start, split.size))
                lengths[long] = 0
            sizes[first : first + len(shard)] = np.maximum(lengths - 1, 0)
        columns = [np.concatenate(c) for c in zip(*segments, strict=True)] if segments else 3 * [np.empty(0, int)]
        self.segment_document: np.ndarray = columns[0]
        self.segment_start: np.ndarray = columns[1]
        segment_size: np.ndarray = columns[2]
        counts = np.bincount(segment_size, minlength=context_length + 1)
        for chunk in chunks(sizes):
            counts += np.bincount(chunk, minlength=context_length + 1)
        counts[0] = 0
        if not counts.any():
            raise BadInput("no document with anything to predict", where=shards[0].folder.parent)
        self.num_targets = int(counts @ np.arange(context_length + 1))
        self.first_of_length = np.concatenate(([0], np.cumsum(counts)))
        """Where the items of each length start in `items_by_length`."""
        num_items = self.num_documents + len(segment_size)
        dtype = np.uint32 if num_items < 1 << 32 else np.uint64
        self.items_by_length = np.empty(self.first_of_length[-1], dtype=dtype)
        next_of_length = self.first_of_length[:-1].copy()
        first_item = 0
        for chunk in (*chunks(sizes), *chunks(segment_size)):
            self.sort_chunk(chunk, first_item, next_of_length)
            first_item += len(chunk)
        self.row_groups = pack(counts, context_length)
        self.first_rows = list(accumulate((group.num_rows for group in self.row_groups), initial=0))

    def sort_chunk(self, sizes: np.ndarray, first_item: int, next_of_length: np.ndarray) -> None:
        """Put items of these sizes, numbered from `first_item`, at the next free positions of their lengths."""
        counts = np.bincount(sizes, minlength=self.context_length + 1)
        by_size = np.argsort(sizes, kind="stable")[counts[0] :]  # size 0 is not an item
        counts[0] = 0
        starts = np.cumsum(counts) - counts
        positions = np.repeat(next_of_length - starts, counts) + np.arange(len(by_size))
        self.items_by_length[positions] = by_size + first_item
        next_of_length += counts

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.first_rows[-1]

    def __getitem__(self, row: int) -> list[Segment]:
        """Return the segments of a row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        group_index = bisect_right(self.first_rows, row) - 1
        row_in_group = row - self.first_rows[group_index]
        segments = []
        for length, per_row, first in self.row_groups[group_index].item_runs:
            start = int(self.first_of_length[length]) + first + row_in_group * per_row
            for item in self.items_by_length[start : start + per_row].tolist():
                if item < self.num_documents:
                    segments.append(Segment(item, 0, length))
                else:
                    index = item - self.num_documents
                    segments.append(Segment(int(self.segment_document[index]), int(self.segment_start[index]), length))
        return segments

    def locate_document(self, document: int) -> tuple[int, int]:
        """Return (index of the shard, index in the shard) of a document."""
        shard = bisect_right(self.first_documents, document) - 1
        return shard, document - self.first_documents[shard]

    @property
    def fill(self) -> float:
        """Share of the rows' positions that are targets, not padding."""
        return self.num_targets / (len(self) * self.context_length)


def chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), SORT_CHUNK):
        yield values[start : start + SORT_CHUNK]
