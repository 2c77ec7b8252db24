"""The vocabulary: the token ids of special tokens, image codes and text pieces in one id space.

The project's own layout is `[specials][image codes][text pieces]`; the layout of Meta's and Lumina's models is read from
the names in their tokenizer.json. Code that needs a token id, a mask over the vocabulary or the length of an image asks
this module, and token ids are written nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chameleon.dialect import (
    CODE,
    Dialect,
    Grid,
    Runs,
    ShapeConfig,
    SizedDialect,
    SquareDialect,
    dialect_from_json,
    ids_of,
    runs_of,
)
from chameleon.errors import BadInput


class Modality(IntEnum):
    """What a token id stands for. STRUCTURE: special tokens, and reserved ids that nothing uses."""

    TEXT = 0
    IMAGE = 1
    STRUCTURE = 2


SPECIALS = ("pad", "bos", "eos", "boi", "eoi", "sep")
SPECIAL_PIECES = {
    "pad": "<pad>",
    "bos": "<s>",
    "eos": "</s>",
    "boi": "<racm3:break>",
    "eoi": "<eoss>",
    "sep": "<reserved08706>",
}
"""Names of the special tokens in the tokenizers of Meta's models."""
ROW_END_PIECE = "<reserved08799>"
"""Name of the row end of the sized dialect in the tokenizers of Lumina's models, which use reserved tokens of Meta's."""
IMAGE_PIECE = re.compile("IMGIMG([A-J]+)Z")
"""Name of an image code in those tokenizers: the letters A to J spell its decimal digits."""


def image_piece(code: int) -> str:
    """Return the name of an image code in the tokenizers of Meta's models."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def size_piece(units: int) -> str:
    """Return the name of a size of the sized dialect in the tokenizers of Lumina's models."""
    return f"<reserved{8800 + units:05d}>"


class IdSet:
    """The ordered token ids of one kind, with conversion between an id and its index (image code or text piece)."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.order = ids_of(runs)
        """Index → token id."""
        self.count = len(self.order)
        self.ids = torch.tensor(self.order)
        self.index_of = {token_id: index for index, token_id in enumerate(self.order)}
        self.ranges = runs_of(sorted(self.index_of))

    def __contains__(self, token_id: int) -> bool:
        return token_id in self.index_of

    def contains(self, token_ids: Tensor) -> Tensor:
        """Return which of the token ids are in the set: a bool tensor of the same shape."""
        result = torch.zeros_like(token_ids, dtype=torch.bool)
        for first, count in self.ranges:
            result |= (token_ids >= first) & (token_ids < first + count)
        return result

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the token ids at the indices: a tensor of the same shape."""
        return indices + self.runs[0][0] if len(self.runs) == 1 else self.ids.to(indices.device)[indices]

    def indices(self, token_ids: Tensor) -> Tensor:
        """Return the index of each token id, all of which must be in the set: the inverse of `[]`."""
        if len(self.runs) == 1:
            return token_ids - self.runs[0][0]
        sorted_ids, order = self.ids.to(token_ids.device).sort()
        return order[torch.searchsorted(sorted_ids, token_ids)]


class ImageBlock(NamedTuple):
    """An image found among token ids."""

    grid: Grid
    """(height, width) in codes."""
    length: int
    """Tokens, boi and eoi included."""
    code_ids: list[int]
    """Token ids of the codes in row-major order."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of special tokens, image codes and text pieces.

    `size` counts every id. Image code c is the c-th id of `image`, text piece p the p-th id of `text`; ids in neither are
    special tokens, or reserved and never generated. An image is a grid of codes, written as the `dialect` says.
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
    dialect: Dialect
    """How images are written."""
    answer_end: int
    """Token that ends an answer, and what is generated: `eos`, or `sep` as in Lumina-mGPT."""

    @classmethod
    def build(cls, *, image_codes: int, text_pieces: int, grid: Grid, shapes: ShapeConfig | None = None) -> Vocabulary:
        """Create the project's own layout: special tokens, then image codes, then text pieces.

        shapes: those of images, which are then written in the sized dialect; else all have the grid.
        """
        if min(image_codes, text_pieces, *grid) < 1:
            raise BadInput("image codes, text pieces and grid must be positive", where="vocabulary")
        specials = {name: token_id for token_id, name in enumerate(SPECIALS)}
        dialect: Dialect = SquareDialect(grid)
        if shapes is not None:
            row_end = len(SPECIALS)
            sizes = ((row_end + 1, shapes.num_sizes),)
            dialect = SizedDialect(row_end, sizes, shapes.unit, shapes.target, shapes.max_ratio)
        image_start = len(SPECIALS) + len(dialect.specials)
        text_start = image_start + image_codes
        return cls(
            **specials,
            image=((image_start, image_codes),),
            text=((text_start, text_pieces),),
            size=text_start + text_pieces,
            dialect=dialect,
            answer_end=specials["eos"],
        )

    @classmethod
    def from_names(
        cls,
        names: Mapping[str, int],
        text: Iterable[int],
        *,
        grid: Grid,
        shapes: ShapeConfig | None = None,
        size: int | None = None,
        where: object = "tokenizer.json",
    ) -> Vocabulary:
        """Create the layout of Meta's models from the names of its tokens; `text` are the ids of the text pieces.

        shapes: those of images in the layout of Lumina's models, which write images in the sized dialect and end answers
        with `sep`. size: rows of the model's embedding, where it has more than there are names. Raises `BadInput` that
        names a missing special token, a missing or duplicated image code, or an id that does not fit.
        """
        size_names = [size_piece(units) for units in range(1, shapes.num_sizes + 1)] if shapes is not None else []
        needed = [*SPECIAL_PIECES.values(), *([] if shapes is None else [ROW_END_PIECE, *size_names])]
        for name in needed:
            if name not in names:
                raise BadInput(f"no piece {name}", where=where)
        dialect: Dialect = SquareDialect(grid)
        if shapes is not None:
            size_ids = runs_of(names[name] for name in size_names)
            dialect = SizedDialect(names[ROW_END_PIECE], size_ids, shapes.unit, shapes.target, shapes.max_ratio)
        id_of_code: dict[int, int] = {}
        for name, token_id in names.items():
            match = IMAGE_PIECE.fullmatch(name)
            if match:
                code = int("".join(str("ABCDEFGHIJ".index(letter)) for letter in match[1]))
                if code in id_of_code:
                    raise BadInput(f"two image pieces for code {code}, one is {name}", where=where)
                id_of_code[code] = token_id
        for code in range(len(id_of_code)):
            if code not in id_of_code:
                raise BadInput(
                    f"{len(id_of_code)} image pieces, but none is {image_piece(code)}, code {code}",
                    where=where,
                    remedy="their codes must be 0…n−1",
                )
        if not id_of_code:
            raise BadInput("no image pieces IMGIMG…Z", where=where)
        value: dict[str, Any] = {
            **{field: names[name] for field, name in SPECIAL_PIECES.items()},
            "image": runs_of(id_of_code[code] for code in range(len(id_of_code))),
            "text": runs_of(sorted(text)),
            "size": max(names.values()) + 1 if size is None else size,
            **dialect.to_json(),
        }
        if shapes is not None:
            value["answer_end"] = value["sep"]
        return cls.from_json(value, where=where)

    @cached_property
    def image_ids(self) -> IdSet:
        """The token ids of the image codes, in the order of the codes."""
        return IdSet(self.image)

    @cached_property
    def text_ids(self) -> IdSet:
        """The token ids of the text pieces, in the order of the pieces."""
        return IdSet(self.text)

    @property
    def image_start(self) -> int:
        """The token id of image code 0."""
        return self.image[0][0]

    @property
    def text_start(self) -> int:
        """The token id of text piece 0."""
        return self.text[0][0]

    @property
    def num_image_codes(self) -> int:
        """Size of the image codebook."""
        return self.image_ids.count

    @property
    def num_text_pieces(self) -> int:
        """Number of text pieces."""
        return self.text_ids.count

    @property
    def grid(self) -> Grid:
        """The grid of an image where no other is asked for: (height, width) in codes."""
        return self.dialect.grid

    @property
    def image_slice(self) -> slice:
        """The smallest range that contains the token ids of all image codes."""
        ranges = self.image_ids.ranges
        return slice(ranges[0][0], sum(ranges[-1]))

    @property
    def specials(self) -> dict[str, int]:
        """Names and token ids of the special tokens, those of the dialect included."""
        return {name: getattr(self, name) for name in SPECIALS} | self.dialect.specials

    # --- images ---

    def image_block(self, grid: Grid) -> list[int]:
        """Return the token ids of an image, `CODE` in place of each code. Raise `BadInput` for a grid without a header."""
        return [self.boi, *self.dialect.body(grid), self.eoi]

    def started_image(self, code_ids: Sequence[int], grid: Grid) -> tuple[int, ...]:
        """Return the token ids of an image from boi to the last of its first codes, which are given as token ids."""
        block = self.image_block(grid)
        positions = [index for index, token_id in enumerate(block) if token_id == CODE][: len(code_ids)]
        for position, code_id in zip(positions, code_ids, strict=True):
            block[position] = code_id
        return tuple(block[: positions[-1] + 1 if positions else 1 + self.dialect.header_length])

    def read_image(self, token_ids: Sequence[int], start: int = 0) -> ImageBlock | None:
        """Return the image whose boi is at `start`; None where there is no whole and valid one."""
        if start >= len(token_ids) or token_ids[start] != self.boi:
            return None
        first = start + 1 + self.dialect.header_length
        grid = self.dialect.grid_of_header(tuple(token_ids[start + 1 : first]))
        if grid is None:
            return None
        length = self.dialect.length(grid)
        block = token_ids[start : start + length]
        if len(block) != length:
            return None
        code_ids = []
        for token_id, expected_id in zip(block, self.image_block(grid), strict=True):
            if expected_id == CODE and token_id in self.image_ids:
                code_ids.append(token_id)
            elif token_id != expected_id:
                return None
        return ImageBlock(grid, length, code_ids)

    def image_codes(self, block: ImageBlock) -> Tensor:
        """Return the codes int64 [h, w] of an image."""
        return self.ids_to_codes(torch.tensor(block.code_ids)).view(block.grid)

    # --- kinds of tokens ---

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Map image codes (any shape, integers in [0, num_image_codes)) to token ids of the same shape."""
        return self.image_ids[codes]

    def ids_to_codes(self, token_ids: Tensor) -> Tensor:
        """Map token ids of image codes (any shape) to codes of the same shape. Raise `BadInput` for other token ids."""
        if not self.is_image(token_ids).all():
            raise BadInput("a token inside an image is not an image code", where="vocabulary")
        return self.image_ids.indices(token_ids)

    def is_image(self, token_ids: Tensor) -> Tensor:
        """Return which token ids are image codes: a bool tensor of the same shape."""
        return self.image_ids.contains(token_ids)

    def is_text(self, token_ids: Tensor) -> Tensor:
        """Return which token ids are text pieces: a bool tensor of the same shape."""
        return self.text_ids.contains(token_ids)

    def modality(self, token_ids: Tensor) -> Tensor:
        """Return the `Modality` of each token id: an int64 tensor of the same shape."""
        result = torch.full_like(token_ids, Modality.STRUCTURE, dtype=torch.int64)
        result[self.is_image(token_ids)] = Modality.IMAGE
        result[self.is_text(token_ids)] = Modality.TEXT
        return result

    def mask(self, *, text: bool = False, image: bool = False, specials: Iterable[str] = ()) -> Tensor:
        """Return a bool tensor [size] that is True at the token ids of the named kinds."""
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
            **{name: getattr(self, name) for name in SPECIALS},
            "image": [list(run) for run in self.image],
            "text": [list(run) for run in self.text],
            "size": self.size,
            **self.dialect.to_json(),
            **({} if self.answer_end == self.eos else {"answer_end": self.answer_end}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: object = "vocabulary") -> Vocabulary:
        """Read the form of `to_json`. Raise `BadInput` where keys are missing, unknown or inconsistent."""
        try:
            runs = {kind: tuple((int(first), int(count)) for first, count in value[kind]) for kind in ("image", "text")}
            fields = {"answer_end": value["eos"], **value, **runs, "dialect": dialect_from_json(value, where=where)}
            vocabulary = cls(**{name: field for name, field in fields.items() if name != "grid"})
            if not all(type(n) is int for n in (*vocabulary.specials.values(), vocabulary.size)):
                raise BadInput("token ids and size must be integers", where=where)
            if vocabulary.answer_end not in (vocabulary.eos, vocabulary.sep):
                raise BadInput("answer_end is neither eos nor sep", where=where)
            for kind in ("image", "text"):
                if not 0 < sum(count for _, count in runs[kind]) <= vocabulary.size:
                    raise BadInput(f"{kind} ids do not fit into {vocabulary.size}", where=where)
            token_ids = [*vocabulary.specials.values(), *vocabulary.image_ids.order, *vocabulary.text_ids.order]
            out_of_range = [token_id for token_id in token_ids if not 0 <= token_id < vocabulary.size]
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"vocabulary has wrong keys ({error})", where=where) from None
        if out_of_range:
            raise BadInput(f"id {out_of_range[0]} is not below the size, {vocabulary.size}", where=where)
        if len(set(token_ids)) != len(token_ids):
            raise BadInput("ids of specials, image codes and text pieces overlap", where=where)
        return vocabulary
