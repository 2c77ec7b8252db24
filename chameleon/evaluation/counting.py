"""Counting the separate things in a drawing on white."""

from __future__ import annotations

from collections import deque

import numpy as np
from PIL import Image as PILImage

NUMBERS = (1, 2, 3, 4)
NUMBER_WORDS = ("one", "two", "three", "four")
COUNTED_THINGS = (
    *("red apple", "red heart", "star", "banana", "lemon", "tomato", "mushroom", "fish", "bird", "snail"),
    *(
        "key",
        "balloon",
        "bell",
        "leaf fluttering in wind",
        "strawberry",
        "candle",
        "open book",
        "ring",
        "soccer ball",
        "cat face",
    ),
)
IRREGULAR = {"fish": "fish", "strawberry": "strawberries", "maple leaf": "maple leaves"}
WHITE_LEVEL = 236
"""A pixel whose darkest channel is at least this belongs to the background."""
MIN_AREA = 0.006
"""Share of the picture that a thing covers; smaller specks are not counted."""


def several(number: int, thing: str) -> str:
    """Return "three stars"."""
    if number == 1:
        return f"one {thing}"
    plural = IRREGULAR.get(thing, f"{thing}es" if thing.endswith("o") else f"{thing}s")
    return f"{NUMBER_WORDS[number - 1]} {plural}"


def count_objects(picture: PILImage.Image) -> int:
    """Return the number of connected regions of a picture that are not white and not tiny (8 neighbours)."""
    filled = np.asarray(picture.convert("RGB")).min(axis=2) < WHITE_LEVEL
    height, width = filled.shape
    seen, count = np.zeros_like(filled), 0
    for start in zip(*np.nonzero(filled), strict=True):
        if seen[start]:
            continue
        seen[start], area, queue = True, 0, deque([start])
        while queue:
            row, column = queue.popleft()
            area += 1
            for y in range(max(0, row - 1), min(height, row + 2)):
                for x in range(max(0, column - 1), min(width, column + 2)):
                    if filled[y, x] and not seen[y, x]:
                        seen[y, x] = True
                        queue.append((y, x))
        count += area >= MIN_AREA * filled.size
    return count


def side_by_side(picture: PILImage.Image, number: int) -> PILImage.Image:
    """Return a picture of the same size in which a thing stands `number` times."""
    columns = 1 if number == 1 else 2
    side = picture.width // columns
    page = PILImage.new("RGB", picture.size, "white")
    small = picture.resize((int(side * 0.9), int(side * 0.9)), PILImage.Resampling.LANCZOS)
    for index in range(number):
        row, column = divmod(index, columns)
        page.paste(small, (column * side + side // 20, row * side + side // 20))
    return page
