"""Dialects of pictures: how an image is written between the other tokens of a sequence.

An image is `boi`, a header, its codes row by row from the top, and `eoi`:

* `SquareDialect`: the header is empty, every image has the same grid (Chameleon, arXiv 2405.09818);
* `SizedDialect`: the header has two size tokens, which tell height and width in units of some codes, and each row of codes
  is closed by a row end (Lumina-mGPT, arXiv 2408.02657).

The token ids are fields; `Vocabulary` puts the dialect beside the other ids and reads and writes whole images with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from chameleon.errors import BadInput

Grid = tuple[int, int]
"""(height, width) of an image in codes."""
CODE = -1
"""Stands for an image code among the token ids of an image."""
Runs = tuple[tuple[int, int], ...]
"""An ordered list of token ids, run-length encoded as (first id, count) of consecutive ascending ids."""


def runs_of(token_ids: Iterable[int]) -> Runs:
    """Run-length encode token ids in their given order."""
    runs: list[tuple[int, int]] = []
    for token_id in token_ids:
        if runs and token_id == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((token_id, 1))
    return tuple(runs)


def ids_of(runs: Runs) -> list[int]:
    """Return the token ids of runs, in order: the inverse of `runs_of`."""
    return [token_id for first, count in runs for token_id in range(first, first + count)]


@lru_cache
def grids_of_area(target: int, max_ratio: float, max_side: int) -> tuple[Grid, ...]:
    """Return the grids of about N = target · target cells, (height, width) in cells, from wide to narrow.

    They are the steps of the staircase under the hyperbola height · width = N: for each width w the heights from
    N // (w + 1) to N // w, of those whose long side is at most `max_ratio` times the short one (Lumina-mGPT).
    """
    area = target**2
    grids = [
        (height, width)
        for width in range(min(area, max_side), 0, -1)
        for height in range(max(1, area // (width + 1)), area // width + 1)
        if max(width, height) <= max_ratio * min(width, height) and height <= max_side
    ]
    return tuple(grids)


class Dialect(ABC):
    """How an image is written as tokens. Subclasses say what the header is, and which grids there are."""

    NAME: ClassVar[str]
    header_length: ClassVar[int]
    """Tokens between boi and the first code."""
    row_end: int | None
    """Token after each row of codes, the last one included; None where there is none."""

    # --- what differs ---

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The grid of an image where no other is asked for."""

    @property
    @abstractmethod
    def grids(self) -> tuple[Grid, ...]:
        """The grids that pictures are fitted to, and that a model may choose from."""

    @abstractmethod
    def header(self, grid: Grid) -> tuple[int, ...]:
        """Return the token ids that tell a grid. Raise `BadInput` for a grid that cannot be written."""

    @abstractmethod
    def grid_of_header(self, header: Sequence[int]) -> Grid | None:
        """Return the grid that a whole header tells; None for any other token ids."""

    @abstractmethod
    def is_size(self, token_id: int) -> bool:
        """Whether a token may be in a header."""

    @property
    @abstractmethod
    def specials(self) -> dict[str, int]:
        """Names and token ids of what this dialect adds to the vocabulary."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the keys of a vocabulary's JSON form that tell the dialect."""

    # --- what follows ---

    def row_length(self, grid: Grid) -> int:
        """Return the number of tokens of a row, its end included."""
        return grid[1] + (self.row_end is not None)

    def length(self, grid: Grid) -> int:
        """Return the number of tokens that an image takes: boi, header, codes, row ends, eoi."""
        return 2 + self.header_length + grid[0] * self.row_length(grid)

    @cached_property
    def min_length(self) -> int:
        """Tokens of the smallest image among `grids`."""
        return min(map(self.length, self.grids))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the largest image among `grids`."""
        return max(map(self.length, self.grids))

    def body(self, grid: Grid) -> list[int]:
        """Return the token ids between boi and eoi, `CODE` in place of each code."""
        row = [CODE] * grid[1] + ([] if self.row_end is None else [self.row_end])
        return [*self.header(grid), *(row * grid[0])]

    def next_header_ids(self, header: Sequence[int], max_length: int) -> list[int]:
        """Return the ids that may follow the start of a header, so that the image is one of `grids`.

        max_length: tokens of the image at most. The result is empty where no image is so small.
        """
        start, fitting = tuple(header), [grid for grid in self.grids if self.length(grid) <= max_length]
        headers = [self.header(grid) for grid in fitting]
        return sorted({ids[len(start)] for ids in headers if ids[: len(start)] == start and len(ids) > len(start)})

    def lengths_of_headers(self, headers: np.ndarray) -> np.ndarray:
        """Return the tokens of the image that each header, int64 [n, header_length], tells: int64 [n], 0 for none."""
        if self.header_length == 0:
            return np.full(len(headers), self.length(self.grid), dtype=np.int64)
        unique, inverse = np.unique(headers, axis=0, return_inverse=True)
        grids = [self.grid_of_header(tuple(row)) for row in unique.tolist()]
        lengths = np.array([0 if grid is None else self.length(grid) for grid in grids], dtype=np.int64)
        return lengths[inverse.reshape(-1)]


@dataclass(frozen=True)
class SquareDialect(Dialect):
    """boi, codes, eoi: every image has the same grid, so nothing tells it."""

    NAME: ClassVar[str] = "square"
    header_length: ClassVar[int] = 0
    own_grid: Grid
    row_end: None = None

    @property
    def grid(self) -> Grid:
        return self.own_grid

    @property
    def grids(self) -> tuple[Grid, ...]:
        return (self.own_grid,)

    def header(self, grid: Grid) -> tuple[int, ...]:
        if grid != self.own_grid:
            height, width = self.own_grid
            raise BadInput(
                f"{grid[0]}×{grid[1]} codes, but all images of this model have {height}×{width}", where="size of an image"
            )
        return ()

    def grid_of_header(self, header: Sequence[int]) -> Grid | None:
        return None if header else self.own_grid

    def is_size(self, token_id: int) -> bool:
        return False

    @property
    def specials(self) -> dict[str, int]:
        return {}

    def to_json(self) -> dict[str, Any]:
        return {"grid": list(self.own_grid)}


@dataclass(frozen=True)
class ShapeConfig:
    """Which shapes the images of a new vocabulary may have."""

    target: int
    """Side in units of a square image; others have about its area."""
    unit: int = 1
    """Codes of a side that a size counts as one."""
    max_ratio: float = 4.0
    """Long side over short side at most."""
    max_units: int = 0
    """Units of a side that a size token can tell at most; 0: as many as the area and `max_ratio` allow."""

    def __post_init__(self) -> None:
        is_valid = min(self.target, self.unit) >= 1 and 1 <= self.max_ratio < math.inf
        if not is_valid or self.max_units < 0 or 0 < self.max_units < self.target:
            raise BadInput(
                f"target {self.target}, unit {self.unit}, max_ratio {self.max_ratio}, max_units {self.max_units}",
                where="shapes",
                remedy="use 1 or more, and max_units 0 or not below the target",
            )

    @property
    def num_sizes(self) -> int:
        """Number of size tokens."""
        return self.max_units or math.ceil(self.target * math.sqrt(self.max_ratio))


@dataclass(frozen=True)
class SizedDialect(Dialect):
    """boi, height, width, rows of codes each closed by a row end, eoi."""

    NAME: ClassVar[str] = "sized"
    header_length: ClassVar[int] = 2
    row_end: int
    size_ids: Runs
    """The token ids of the sizes 1, 2, … in units."""
    unit: int
    """Codes of a side that a size counts as one."""
    target: int
    """Side in units of a square image; those that pictures are fitted to have about its area."""
    max_ratio: float = 4.0
    """Long side over short side at most, of images that pictures are fitted to."""
    order: tuple[str, str] = ("height", "width")
    """What the two size tokens tell."""

    @property
    def grid(self) -> Grid:
        return self.target * self.unit, self.target * self.unit

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        units = grids_of_area(self.target, self.max_ratio, self.max_units)
        return tuple((height * self.unit, width * self.unit) for height, width in units)

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Token id → size in units."""
        return {token_id: index + 1 for index, token_id in enumerate(ids_of(self.size_ids))}

    @property
    def max_units(self) -> int:
        """The largest size."""
        return sum(count for _, count in self.size_ids)

    def header(self, grid: Grid) -> tuple[int, ...]:
        for side in grid:
            if side < self.unit or side % self.unit or side > self.max_units * self.unit:
                raise BadInput(
                    f"{grid[0]}×{grid[1]} codes, but sides are multiples of {self.unit} up to {self.max_units * self.unit}",
                    where="size of an image",
                )
        ids = ids_of(self.size_ids)
        height, width = (ids[side // self.unit - 1] for side in grid)
        return (height, width) if self.order[0] == "height" else (width, height)

    def grid_of_header(self, header: Sequence[int]) -> Grid | None:
        sides = [self.sizes.get(token_id) for token_id in header]
        if len(sides) != self.header_length or None in sides:
            return None
        first, second = (side * self.unit for side in sides if side is not None)
        return (first, second) if self.order[0] == "height" else (second, first)

    def is_size(self, token_id: int) -> bool:
        return token_id in self.sizes

    @cached_property
    def specials(self) -> dict[str, int]:
        return {"row_end": self.row_end, **{f"size_{size}": token_id for token_id, size in self.sizes.items()}}

    def to_json(self) -> dict[str, Any]:
        return {
            "dialect": {
                "name": self.NAME,
                "row_end": self.row_end,
                "size_ids": [list(run) for run in self.size_ids],
                "unit": self.unit,
                "target": self.target,
                "max_ratio": self.max_ratio,
                "order": list(self.order),
            }
        }


def dialect_from_json(value: Mapping[str, Any], *, where: object) -> Dialect:
    """Read what `Dialect.to_json` wrote among the keys of a vocabulary. Raise `BadInput` for anything else."""
    if ("grid" in value) == ("dialect" in value):
        raise BadInput("expected either grid or dialect", where=where)
    try:
        if "grid" in value:
            grid = tuple(value["grid"])
            if len(grid) != 2 or not all(type(side) is int and side >= 1 for side in grid):
                raise BadInput("the two sides of the grid must be positive integers", where=where)
            return SquareDialect(grid)
        entries = dict(value["dialect"])
        if entries.pop("name") != SizedDialect.NAME:
            raise BadInput(f"dialect {value['dialect']['name']!r} is not known", where=where)
        size_ids = tuple((int(first), int(count)) for first, count in entries["size_ids"])
        dialect = SizedDialect(**{**entries, "size_ids": size_ids, "order": tuple(entries["order"])})
        integers = [dialect.row_end, dialect.unit, dialect.target]
        is_valid = all(type(number) is int for number in integers) and min(dialect.unit, dialect.target) >= 1
        if not is_valid or sorted(dialect.order) != ["height", "width"] or not dialect.max_ratio >= 1:
            raise BadInput("a dialect's unit, target, max_ratio and order must be valid", where=where)
        if len(dialect.sizes) != dialect.max_units:
            raise BadInput("two sizes have the same id", where=where)
        if not dialect.grids:
            raise BadInput("no image fits the dialect's sizes", where=where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"dialect has wrong keys ({error})", where=where) from None
    return dialect


class ImageCursor:
    """A place inside an image: what comes next, and how much is left. It starts after boi."""

    def __init__(self, dialect: Dialect, grid: Grid | None = None, max_length: int | None = None) -> None:
        """grid: the only one that is allowed. max_length: tokens of the image at most, boi and eoi included."""
        self.dialect, self.max_length = dialect, max_length
        self.required_header = None if grid is None else dialect.header(grid)
        self.header: list[int] = []
        self.position = 0
        """Tokens after the header."""
        self.is_valid = True
        """False once a token came that cannot come there."""
        self.grid = dialect.grid_of_header(())
        """Known once the header is complete."""

    @property
    def in_header(self) -> bool:
        """Whether a size token comes next."""
        return self.grid is None

    def next_sizes(self) -> list[int]:
        """Return the size tokens that may come next."""
        if self.required_header is not None:
            return [self.required_header[len(self.header)]]
        max_length = self.max_length if self.max_length is not None else self.dialect.max_length
        return self.dialect.next_header_ids(self.header, max_length)

    @property
    def body_length(self) -> int:
        """Tokens between header and eoi; 0 in the header."""
        return 0 if self.grid is None else self.grid[0] * self.dialect.row_length(self.grid)

    def codes_before(self, position: int) -> int:
        """Return the number of codes among the first `position` tokens after the header."""
        assert self.grid is not None
        rows, column = divmod(position, self.dialect.row_length(self.grid))
        return rows * self.grid[1] + min(column, self.grid[1])

    @property
    def num_codes(self) -> int:
        """Codes so far."""
        return 0 if self.grid is None else self.codes_before(self.position)

    @property
    def codes_left(self) -> int:
        """Codes that the image still lacks; 0 in the header, where that is not known."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1] - self.num_codes

    def is_row_end(self, ahead: int = 0) -> bool:
        """Return whether the next token is a row end, or the one that comes `ahead` tokens after it."""
        if self.grid is None or self.position + ahead >= self.body_length:
            return False
        return (self.position + ahead) % self.dialect.row_length(self.grid) == self.grid[1]

    @property
    def tokens_left(self) -> int:
        """Tokens that the image still lacks, eoi included; in the header, those of the smallest image that it may be."""
        if self.grid is not None:
            return self.body_length - self.position + 1
        grids = [self.dialect.grid_of_header(self.required_header)] if self.required_header else self.dialect.grids
        start = tuple(self.header)
        fitting = [g for g in grids if g is not None and self.dialect.header(g)[: len(start)] == start]
        return min(map(self.dialect.length, fitting or self.dialect.grids)) - 1 - len(start)

    @property
    def tokens_to_last_code(self) -> int:
        """Tokens up to the image's last code, row ends included."""
        return max(0, self.body_length - (self.dialect.row_end is not None) - self.position)

    def code_offsets(self, count: int) -> list[int]:
        """Return how many tokens after the next one each of the next `count` codes comes: 0, 1, … with row ends skipped."""
        assert self.grid is not None
        row_length, first = self.dialect.row_length(self.grid), self.num_codes
        rows_and_columns = (divmod(code, self.grid[1]) for code in range(first, first + count))
        return [row * row_length + column - self.position for row, column in rows_and_columns]

    def push(self, token_id: int) -> None:
        """Go past a token; which code it is does not matter here."""
        if self.grid is None:
            self.header.append(token_id)
            self.is_valid &= self.dialect.is_size(token_id)
            if len(self.header) == self.dialect.header_length:
                self.grid = self.dialect.grid_of_header(self.header)
                self.is_valid &= self.grid is not None
                self.is_valid &= self.required_header in (None, tuple(self.header))
            return
        self.is_valid &= self.position < self.body_length and self.is_row_end() == (token_id == self.dialect.row_end)
        self.position += 1
