"""The one id space that text, pictures and structure share.

Our own layout is `[specials][image codes][text pieces]`. Other layouts (the originals') place the same three kinds of
ids elsewhere; whoever needs an id, a mask or the grid of a picture asks here, and ids are written nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from chameleon.errors import BadInput


class Modality(IntEnum):
    """What an id stands for. Structure are the special ids."""

    TEXT = 0
    IMAGE = 1
    STRUCTURE = 2


SPECIALS = ("pad", "bos", "eos", "boi", "eoi", "sep")


@dataclass(frozen=True)
class Vocabulary:
    """Ids of special tokens, image codes and text pieces.

    `size` counts everything. Image code c has the id `image_start + c`, text piece p the id `text_start + p`. A picture
    is a grid of `grid = (height, width)` codes, row by row.
    """

    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    sep: int
    image_start: int
    image_count: int
    text_start: int
    text_count: int
    grid: tuple[int, int]

    @classmethod
    def own(cls, *, image_codes: int, text_pieces: int, grid: tuple[int, int]) -> Vocabulary:
        """The project's own layout: specials, then image codes, then text pieces."""
        if min(image_codes, text_pieces, *grid) < 1:
            raise BadInput("image codes, text pieces and grid must be positive", where="vocabulary")
        specials = {name: number for number, name in enumerate(SPECIALS)}
        return cls(
            **specials,
            image_start=len(SPECIALS),
            image_count=image_codes,
            text_start=len(SPECIALS) + image_codes,
            text_count=text_pieces,
            grid=grid,
        )

    @property
    def size(self) -> int:
        """How many ids there are in all."""
        return len(SPECIALS) + self.image_count + self.text_count

    @property
    def image_length(self) -> int:
        """How many codes a picture has."""
        return self.grid[0] * self.grid[1]

    @property
    def block_length(self) -> int:
        """How many ids a picture takes in a sequence: boi, its codes, eoi."""
        return self.image_length + 2

    @property
    def image_slice(self) -> slice:
        """The ids of the image codes, a contiguous range in code order."""
        return slice(self.image_start, self.image_start + self.image_count)

    @property
    def text_slice(self) -> slice:
        """The ids of the text pieces, a contiguous range."""
        return slice(self.text_start, self.text_start + self.text_count)

    @property
    def specials(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SPECIALS}

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Image codes (any shape, integers in [0, image_count)) to ids of the same shape."""
        return codes + self.image_start

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Image ids (any shape) to codes of the same shape. Raises `BadInput` on an id that is no image code."""
        codes = ids - self.image_start
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.image_count):
            raise BadInput("an id that is no image code stands inside a picture", where="vocabulary")
        return codes

    def is_image(self, ids: Tensor) -> Tensor:
        """Which ids are image codes: a bool tensor of the same shape."""
        return (ids >= self.image_start) & (ids < self.image_start + self.image_count)

    def is_text(self, ids: Tensor) -> Tensor:
        """Which ids are text pieces: a bool tensor of the same shape."""
        return (ids >= self.text_start) & (ids < self.text_start + self.text_count)

    def modality(self, ids: Tensor) -> Tensor:
        """The `Modality` of each id: an int64 tensor of the same shape."""
        result = torch.full_like(ids, Modality.STRUCTURE, dtype=torch.int64)
        result[self.is_image(ids)] = Modality.IMAGE
        result[self.is_text(ids)] = Modality.TEXT
        return result

    def mask(self, *, text: bool = False, image: bool = False, specials: Iterable[str] = ()) -> Tensor:
        """A bool tensor [size] of the ids of the named kinds."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        if text:
            mask[self.text_slice] = True
        if image:
            mask[self.image_slice] = True
        for name in specials:
            mask[getattr(self, name)] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        return {
            **self.specials,
            "image_start": self.image_start,
            "image_count": self.image_count,
            "text_start": self.text_start,
            "text_count": self.text_count,
            "grid": list(self.grid),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], *, where: object = "vocabulary") -> Vocabulary:
        """Reads `to_json`'s form. Raises `BadInput` where keys are missing, unknown or do not fit together."""
        try:
            vocabulary = cls(**{**value, "grid": tuple(value["grid"])})
        except (KeyError, TypeError) as error:
            raise BadInput(f"vocabulary has wrong keys ({error})", where=where) from None
        counts = vocabulary.mask(text=True, image=True, specials=SPECIALS).sum()
        if counts != vocabulary.size:
            raise BadInput("ids of specials, image codes and text pieces overlap", where=where)
        return vocabulary
