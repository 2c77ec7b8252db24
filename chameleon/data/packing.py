"""Packing documents into rows of the context length.

Documents are cut only where they exceed the context, and never inside a picture. Best fit by falling length leaves
little unfilled. Nothing looks across documents in a row, so which ones share it does not matter to the model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from chameleon.errors import BadInput
from chameleon.vocabulary import Vocabulary


class Piece(NamedTuple):
    """A stretch of a document: ids start…end."""

    document: int
    start: int
    end: int


def cut(ids: np.ndarray, context: int, vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Stretches of at most `context` ids that make up the document [T]; a picture is never parted.

    Raises `BadInput` where one picture alone does not fit.
    """
    if vocabulary.block_length > context:
        raise BadInput(
            f"a picture takes {vocabulary.block_length} ids, the context is {context}", where="packing", remedy="raise it"
        )
    inside = np.cumsum(ids == vocabulary.boi) - np.cumsum(ids == vocabulary.eoi)
    may_end = np.append(inside == 0, True)  # whether a stretch may end behind this id
    stretches, start = [], 0
    while start < len(ids):
        end = min(start + context, len(ids))
        while end > start and end < len(ids) and not may_end[end - 1]:
            end -= 1
        if end == start:  # an unclosed picture: nothing but a plain cut is left
            end = min(start + context, len(ids))
        stretches.append((start, end))
        start = end
    return stretches


def pack(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Rows of item numbers whose lengths (each ≤ context) sum to at most `context`: best fit by falling length.

    O(items): the open rows of each remaining room are kept in a list, and which rooms exist in one big integer.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0  # bit r: some open row has room r
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if not 0 < length <= context:
            raise BadInput(f"item of {length} ids in a context of {context}", where="packing")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(item)
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows
