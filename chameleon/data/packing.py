"""Packing documents into rows of the context length.

Documents are cut only where they exceed the context, and never inside a picture. Best fit by falling length leaves
little unfilled. Nothing looks across documents in a row, so which ones share it does not matter to the model.

Rows are planned from how many items there are of each length alone: a plan takes a moment for any number of items, and
little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chameleon.errors import BadInput


class Cuts(NamedTuple):
    """Stretches of documents, int64 [stretches] each."""

    document: np.ndarray
    """Which of the given documents."""
    start: np.ndarray
    """The id that is the first input, counted from the document's start."""
    size: np.ndarray
    """How many targets: ids start + 1 … start + size."""


def cut(starts: np.ndarray, ends: np.ndarray, pictures: np.ndarray, block: int, context: int) -> Cuts:
    """Stretches of at most `context` targets that make up documents, each as long as it may be.

    A document's ids are starts[i] … ends[i] of one file, int64 [documents]; `pictures`, int64, rising, is where in it
    pictures start, each of `block` ids, none of which is parted: the stretch ends before it. A later stretch begins with
    the last id of the one before, so that each id but a document's first is a target once. Raises `BadInput` where a
    picture does not fit the context.
    """
    if len(pictures) and block > context:
        raise BadInput(f"a picture takes {block} ids, the context is {context}", where="packing", remedy="raise it")
    which = np.flatnonzero(ends - starts > 1)
    first, last = starts[which], ends[which] - 1  # ids that the stretch under way begins with, and the final one
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(which):
        end = np.minimum(first + context, last)
        if len(pictures):
            place = np.searchsorted(pictures, end, side="right") - 1
            before = pictures[np.maximum(place, 0)]
            parted = (end < last) & (place >= 0) & (before > first) & (end < before + block - 1)
            end = np.where(parted, before - 1, end)
        found.append((which, first - starts[which], end - first))
        rest = end < last
        which, first, last = which[rest], end[rest], last[rest]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.empty(0, np.int64)] * 3
    by_document = np.argsort(columns[0], kind="stable")
    return Cuts(*(column[by_document] for column in columns))


class Stack(NamedTuple):
    """Items of one length in rows that are alike: row j holds `each` items, `first + j·each …` of those of this length."""

    length: int
    each: int
    first: int


@dataclass
class Alike:
    """Rows that hold the same lengths."""

    stacks: tuple[Stack, ...]
    rows: int


def pack(counts: np.ndarray, context: int) -> list[Alike]:
    """Rows for counts[l] items of each length l, int64 [context + 1]: best fit by falling length, many items at a time.

    As many rows as if each item were put by itself into the fullest row that has room for it: the rows of one room are
    filled together, each with as many items of the length as that rule would put in it before it turns to another.
    """
    if len(counts) != context + 1 or counts[0]:
        raise BadInput(f"items longer than the context, {context}, or empty", where="packing")
    full: list[Alike] = []
    open_rows: dict[int, list[Alike]] = {}
    rooms = 0  # bit r: some open row has room r
    for length in range(context, 0, -1):
        left, first = int(counts[length]), 0
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                base = open_rows[room].pop()
            else:
                room, base = context, Alike((), left)
            each = min(room // length, left)
            rows = min(base.rows, left // each)
            taken = Alike((*base.stacks, Stack(length, each, first)), rows)
            if fitting:
                if base.rows > rows:
                    later = tuple(Stack(s.length, s.each, s.first + rows * s.each) for s in base.stacks)
                    open_rows[room].append(Alike(later, base.rows - rows))
                elif not open_rows[room]:
                    rooms &= ~(1 << room)
            first, left = first + rows * each, left - rows * each
            over = room - each * length
            if over:
                open_rows.setdefault(over, []).append(taken)
                rooms |= 1 << over
            else:
                full.append(taken)
    return full + [alike for room in sorted(open_rows) for alike in open_rows[room]]
