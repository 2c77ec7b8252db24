"""The one id space that text, pictures and structure share.

Our own layout is `[specials][image codes][text pieces]`. The originals' layout is read from the names in their
tokenizer. Whoever needs an id, a mask or the grid of a picture asks here, and ids are written nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from chameleon.errors import BadInput


class Modality(IntEnum):
    """What an id stands for. Structure are the special ids, and ids that nothing uses."""

    TEXT = 0
    IMAGE = 1
    STRUCTURE = 2


SPECIALS = ("pad", "bos", "eos", "boi", "eoi", "sep")
NAMES = {
    "pad": "<pad>",
    "bos": "<s>",
    "eos": "</s>",
    "boi": "<racm3:break>",
    "eoi": "<eoss>",
    "sep": "<reserved08706>",
}
"""Names of the special ids in the originals' tokenizers."""
IMAGE_NAME = re.compile("IMGIMG([A-J]+)Z")
"""Name of an image code there: the letters A to J spell its decimal number."""

Runs = tuple[tuple[int, int], ...]
"""An order of ids, as (first, count) of ascending runs that follow one another."""


def runs_of(ids: Iterable[int]) -> Runs:
    """The ids in their order, neighbours that ascend by one drawn together."""
    runs: list[tuple[int, int]] = []
    for number in ids:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)


def image_name(code: int) -> str:
    """The name of an image code in the originals' tokenizers."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


class IdSet:
    """The ids of one kind: the n-th of them and back, and which ids are among them."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.count = sum(count for _, count in runs)
        self.order = [number for first, count in runs for number in range(first, first + count)]
        self.ids = torch.tensor(self.order)
        self.number = {number: place for place, number in enumerate(self.order)}
        self.ranges = runs_of(sorted(self.number))

    def __contains__(self, number: int) -> bool:
        return number in self.number

    def holds(self, ids: Tensor) -> Tensor:
        """Which ids are among these: a bool tensor of the same shape."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for first, count in self.ranges:
            found |= (ids >= first) & (ids < first + count)
        return found

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """The ids of these numbers: a tensor of the same shape."""
        return numbers + self.runs[0][0] if len(self.runs) == 1 else self.ids.to(numbers.device)[numbers]

    def numbers(self, ids: Tensor) -> Tensor:
        """The inverse of `[]`, for ids that are among these."""
        if len(self.runs) == 1:
            return ids - self.runs[0][0]
        ordered, places = self.ids.to(ids.device).sort()
        return places[torch.searchsorted(ordered, ids)]


@dataclass(frozen=True)
class Vocabulary:
    """Ids of special tokens, image codes and text pieces.

    `size` counts everything. Image code c is the c-th id of `image`, text piece p the p-th id of `text`; ids in neither
    are specials, or reserved and never produced. A picture is a grid of `grid = (height, width)` codes, row by row.
    """

    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    sep: int
    image: Runs
    text: Runs
    size: int
    grid: tuple[int, int]

    @classmethod
    def own(cls, *, image_codes: int, text_pieces: int, grid: tuple[int, int]) -> Vocabulary:
        """The project's own layout: specials, then image codes, then text pieces."""
        if min(image_codes, text_pieces, *grid) < 1:
            raise BadInput("image codes, text pieces and grid must be positive", where="vocabulary")
        specials = {name: number for number, name in enumerate(SPECIALS)}
        text_start = len(SPECIALS) + image_codes
        return cls(
            **specials,
            image=((len(SPECIALS), image_codes),),
            text=((text_start, text_pieces),),
            size=text_start + text_pieces,
            grid=grid,
        )

    @classmethod
    def of_names(
        cls,
        names: Mapping[str, int],
        text: Iterable[int],
        *,
        grid: tuple[int, int],
        size: int | None = None,
        where: object = "tokenizer.json",
    ) -> Vocabulary:
        """The originals' layout: specials and image codes by their names, `text` the ids that text may be made of.

        `size`: rows of the model's embedding, where it has more than there are names. Raises `BadInput` naming a special
        that is missing, an image code that is missing or there twice, or an id that does not fit.
        """
        for name in NAMES.values():
            if name not in names:
                raise BadInput(f"no piece {name}", where=where)
        codes: dict[int, int] = {}
        for name, number in names.items():
            match = IMAGE_NAME.fullmatch(name)
            if match:
                code = int("".join(str("ABCDEFGHIJ".index(letter)) for letter in match[1]))
                if code in codes:
                    raise BadInput(f"two image pieces have number {code}, one is {name}", where=where)
                codes[code] = number
        for code in range(len(codes)):
            if code not in codes:
                raise BadInput(
                    f"{len(codes)} image pieces, but none is {image_name(code)}, code {code}",
                    where=where,
                    remedy="they must number 0…n−1",
                )
        if not codes:
            raise BadInput("no image pieces IMGIMG…Z", where=where)
        value = {
            **{field: names[name] for field, name in NAMES.items()},
            "image": runs_of(codes[code] for code in range(len(codes))),
            "text": runs_of(sorted(text)),
            "size": max(names.values()) + 1 if size is None else size,
            "grid": grid,
        }
        return cls.from_json(value, where=where)

    @cached_property
    def image_ids(self) -> IdSet:
        """Ids of the image codes, in the order of the codes."""
        return IdSet(self.image)

    @cached_property
    def text_ids(self) -> IdSet:
        """Ids of the text pieces, in the order of the pieces."""
        return IdSet(self.text)

    @property
    def image_start(self) -> int:
        """The id of image code 0."""
        return self.image[0][0]

    @property
    def text_start(self) -> int:
        """The id of text piece 0."""
        return self.text[0][0]

    @property
    def image_count(self) -> int:
        """How many image codes there are."""
        return self.image_ids.count

    @property
    def text_count(self) -> int:
        """How many text pieces there are."""
        return self.text_ids.count

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
        """The least range that holds the ids of all image codes."""
        ranges = self.image_ids.ranges
        return slice(ranges[0][0], sum(ranges[-1]))

    @property
    def specials(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SPECIALS}

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Image codes (any shape, integers in [0, image_count)) to ids of the same shape."""
        return self.image_ids[codes]

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Image ids (any shape) to codes of the same shape. Raises `BadInput` on an id that is no image code."""
        if not self.is_image(ids).all():
            raise BadInput("an id that is no image code stands inside a picture", where="vocabulary")
        return self.image_ids.numbers(ids)

    def is_image(self, ids: Tensor) -> Tensor:
        """Which ids are image codes: a bool tensor of the same shape."""
        return self.image_ids.holds(ids)

    def is_text(self, ids: Tensor) -> Tensor:
        """Which ids are text pieces: a bool tensor of the same shape."""
        return self.text_ids.holds(ids)

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
            mask[self.text_ids.ids] = True
        if image:
            mask[self.image_ids.ids] = True
        for name in specials:
            mask[getattr(self, name)] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        return {
            **self.specials,
            "image": [list(run) for run in self.image],
            "text": [list(run) for run in self.text],
            "size": self.size,
            "grid": list(self.grid),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: object = "vocabulary") -> Vocabulary:
        """Reads `to_json`'s form. Raises `BadInput` where keys are missing, unknown or do not fit together."""
        try:
            runs = {kind: tuple((int(first), int(count)) for first, count in value[kind]) for kind in ("image", "text")}
            vocabulary = cls(**{**value, **runs, "grid": tuple(value["grid"])})
            numbers = [*vocabulary.specials.values(), vocabulary.size, *vocabulary.grid]
            if len(vocabulary.grid) != 2 or not all(type(number) is int for number in numbers) or min(vocabulary.grid) < 1:
                raise BadInput("ids, size and the two sides of the grid must be whole numbers", where=where)
            for kind in ("image", "text"):
                if not 0 < sum(count for _, count in runs[kind]) <= vocabulary.size:
                    raise BadInput(f"{kind} ids do not fit into {vocabulary.size}", where=where)
            ids = [*vocabulary.specials.values(), *vocabulary.image_ids.order, *vocabulary.text_ids.order]
            beyond = [number for number in ids if not 0 <= number < vocabulary.size]
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"vocabulary has wrong keys ({error})", where=where) from None
        if beyond:
            raise BadInput(f"id {beyond[0]} is not below the size, {vocabulary.size}", where=where)
        if len(set(ids)) != len(ids):
            raise BadInput("ids of specials, image codes and text pieces overlap", where=where)
        return vocabulary
