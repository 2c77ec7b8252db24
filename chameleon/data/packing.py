"""Packing of documents into rows of the context length.

Documents are only split where they exceed the context length, and never inside an image. Best-fit decreasing leaves little
padding. Attention does not cross documents, so it does not matter to the model which ones share a row.

Rows are planned from the number of items of each length alone, so a plan takes little time and memory for any number of
items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chameleon.errors import BadInput


class Segments(NamedTuple):
    """Segments of documents, int64 [segments] each."""

    document: np.ndarray
    """Index among the given documents."""
    start: np.ndarray
    """The token that is the first input, counted from the document's start."""
    size: np.ndarray
    """Number of targets: tokens start + 1 … start + size."""


def split_long_documents(
    starts: np.ndarray, ends: np.ndarray, image_starts: np.ndarray, image_lengths: np.ndarray, context_length: int
) -> Segments:
    """Split documents into segments of at most `context_length` targets, each as long as possible.

    Document i is tokens starts[i] … ends[i] of one file, int64 [documents]. `image_starts`, int64, ascending, is where
    images start in the file, `image_lengths` how many tokens they have; none of them is split: the segment ends before it.
    Each later segment starts with the last token of the one before, so that every token except a document's first is a
    target once. Raises `BadInput` where an image does not fit the context length.
    """
    longest = image_lengths.max(initial=0)
    if longest > context_length:
        raise BadInput(
            f"an image takes {longest} tokens, context_length is {context_length}",
            where="packing",
            remedy="raise it",
        )
    document = np.flatnonzero(ends - starts > 1)
    first, last = starts[document], ends[document] - 1  # first token of the current segment, and the document's last
    columns_of_rounds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(document):
        end = np.minimum(first + context_length, last)
        if len(image_starts):
            image = np.searchsorted(image_starts, end, side="right") - 1
            image_start, image_length = image_starts[np.maximum(image, 0)], image_lengths[np.maximum(image, 0)]
            is_inside = (image_start > first) & (end < image_start + image_length - 1)
            is_split = (end < last) & (image >= 0) & is_inside
            end = np.where(is_split, image_start - 1, end)
        columns_of_rounds.append((document, first - starts[document], end - first))
        unfinished = end < last
        document, first, last = document[unfinished], end[unfinished], last[unfinished]
    if not columns_of_rounds:
        return Segments(*[np.empty(0, np.int64)] * 3)
    columns = [np.concatenate(column) for column in zip(*columns_of_rounds, strict=True)]
    by_document = np.argsort(columns[0], kind="stable")
    return Segments(*(column[by_document] for column in columns))


class ItemRun(NamedTuple):
    """Items of one length in a group of rows: row j has `per_row` items, from item `first` + j · `per_row` on."""

    length: int
    per_row: int
    first: int


@dataclass
class RowGroup:
    """Rows that have items of the same lengths."""

    item_runs: tuple[ItemRun, ...]
    num_rows: int


def pack(counts: np.ndarray, context_length: int) -> list[RowGroup]:
    """Pack counts[l] items of each length l, int64 [context_length + 1], into rows by best-fit decreasing.

    The number of rows is that of putting one item after the other into the fullest row with room for it: all rows with the
    same free space are filled together, each with as many items as that rule would put into it in a row.
    """
    if len(counts) != context_length + 1 or counts[0]:
        raise BadInput(f"items that are empty or longer than the context length, {context_length}", where="packing")
    full: list[RowGroup] = []
    open_groups: dict[int, list[RowGroup]] = {}
    """Free space of a row → groups of rows with that much."""
    free_spaces = 0
    """Bit s is set if some open row has free space s."""
    for length in range(context_length, 0, -1):
        items_left, first = int(counts[length]), 0
        while items_left:
            fitting = free_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                base = open_groups[space].pop()
            else:
                space, base = context_length, RowGroup((), items_left)
            per_row = min(space // length, items_left)
            num_rows = min(base.num_rows, items_left // per_row)
            filled = RowGroup((*base.item_runs, ItemRun(length, per_row, first)), num_rows)
            if fitting:
                if base.num_rows > num_rows:
                    later_runs = tuple(ItemRun(r.length, r.per_row, r.first + num_rows * r.per_row) for r in base.item_runs)
                    open_groups[space].append(RowGroup(later_runs, base.num_rows - num_rows))
                elif not open_groups[space]:
                    free_spaces &= ~(1 << space)
            first, items_left = first + num_rows * per_row, items_left - num_rows * per_row
            space_left = space - per_row * length
            if space_left:
                open_groups.setdefault(space_left, []).append(filled)
                free_spaces |= 1 << space_left
            else:
                full.append(filled)
    return full + [group for space in sorted(open_groups) for group in open_groups[space]]
