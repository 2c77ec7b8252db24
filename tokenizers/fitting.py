"""Fitting pictures to the grids of a dialect: which one, and how a picture is scaled and cut to it.

In the `square` dialect this is Meta's released preprocessing: the shorter side scaled with a Lanczos filter, centre crop;
`fit="pad"` scales the longer side and fills the rest with white, which the paper uses for pictures in prompts (arXiv
2405.09818, section 3.2), so that nothing is cut off. In the `sized` dialect it is that of Lumina-mGPT (arXiv 2408.02657):
the grid whose shape is nearest, so that little is cut off; a picture of twice the size or more is halved first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from chameleon.dialect import Dialect, Grid, SizedDialect
from chameleon.errors import BadInput

Fit = Literal["crop", "pad"]
Size = tuple[int, int]
"""(width, height) in pixels, as Pillow has it."""
CropPosition = tuple[float, float]
"""Where a crop lies in what it leaves out: from left and top, 0, to right and bottom, 1."""
CENTRE: CropPosition = (0.5, 0.5)
MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded."""


def parse_size(text: str) -> Size:
    """Return the (width, height) of "WIDTHxHEIGHT". Raise `BadInput` for anything else."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise BadInput(f"{text!r} is not WIDTHxHEIGHT in pixels", where="size", remedy="as 96x64")
    return int(match[1]), int(match[2])


def fit_square(
    picture: PILImage.Image,
    side: int,
    fit: Fit = "crop",
    resampling: PILImage.Resampling = PILImage.Resampling.LANCZOS,
) -> PILImage.Image:
    """Return an RGB picture as a square of `side` pixels: centre-cropped, or with a white border."""
    width, height = picture.size
    if (width, height) == (side, side):
        return picture
    scale = side / (min if fit == "crop" else max)(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    if fit == "crop" and size[0] * size[1] > MAX_PIXELS:  # a long strip: only scale what the square shows
        x_scale, y_scale = width / size[0], height / size[1]
        box = (-left * x_scale, -top * y_scale, (side - left) * x_scale, (side - top) * y_scale)
        return picture.resize((side, side), resampling, box=box)
    picture = picture.resize(size, resampling)
    if fit == "crop":
        return picture.crop((-left, -top, side - left, side - top))
    square = PILImage.new("RGB", (side, side), "white")
    square.paste(picture, (left, top))
    return square


def nearest_shape(size: Size, candidates: list[Size]) -> Size:
    """Return the candidate of which a picture of this size, scaled to cover it, loses the least; a tie: the widest."""

    def score(candidate: Size) -> tuple[float, Size]:
        scales = [new / old for new, old in zip(candidate, size, strict=True)]
        return min(scales) / max(scales), candidate

    return max(candidates, key=score)


def fit_cover(
    picture: PILImage.Image,
    size: Size,
    position: CropPosition = CENTRE,
    resampling: PILImage.Resampling = PILImage.Resampling.BICUBIC,
) -> PILImage.Image:
    """Return a picture scaled to cover a size, and cropped to it at a position.

    It is halved by a box filter while both sides have twice the pixels that are needed, then scaled.
    """
    if picture.size == size:
        return picture
    while picture.width >= 2 * size[0] and picture.height >= 2 * size[1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), PILImage.Resampling.BOX)
    scale = max(new / old for new, old in zip(size, picture.size, strict=True))
    scaled = (round(picture.width * scale), round(picture.height * scale))
    left, top = (int((long - short) * at) for long, short, at in zip(scaled, size, position, strict=True))
    if scaled[0] * scaled[1] > MAX_PIXELS:  # a long strip: only scale what the crop shows
        x_scale, y_scale = picture.width / scaled[0], picture.height / scaled[1]
        box = (left * x_scale, top * y_scale, (left + size[0]) * x_scale, (top + size[1]) * y_scale)
        return picture.resize(size, resampling, box=box)
    scaled_picture = picture.resize(scaled, resampling)
    return scaled_picture.crop((left, top, left + size[0], top + size[1]))


@dataclass(frozen=True)
class PictureFitter:
    """Fits pictures to the grids of a dialect."""

    dialect: Dialect
    reduction: int
    """Side in pixels of the square that one code stands for."""

    def with_shapes(self, target_side: int | None, max_ratio: float | None) -> PictureFitter:
        """Return a fitter to other shapes. Raise `BadInput` where the dialect has no such.

        target_side: side in pixels of a square picture, whose area the others have too. max_ratio: long side over short.
        """
        if target_side is None and max_ratio is None:
            return self
        if not isinstance(self.dialect, SizedDialect):
            raise BadInput(
                "these tokenizers write all images as squares of one size",
                where="target_side and max_ratio",
                remedy="leave them out, or use tokenizers of the sized dialect",
            )
        cell = self.dialect.unit * self.reduction
        target = self.dialect.target if target_side is None else target_side // cell
        ratio = self.dialect.max_ratio if max_ratio is None else max_ratio
        is_whole = target_side is None or target_side % cell == 0
        if not is_whole or not 1 <= target <= self.dialect.max_units or not ratio >= 1:
            raise BadInput(
                f"target_side {target_side}, max_ratio {max_ratio}; sides are multiples of {cell} up to "
                f"{cell * self.dialect.max_units} pixels, ratios 1 or more",
                where="target_side and max_ratio",
            )
        return replace(self, dialect=replace(self.dialect, target=target, max_ratio=float(ratio)))

    def size_of(self, grid: Grid) -> Size:
        """Return (width, height) in pixels of an image of a grid."""
        return grid[1] * self.reduction, grid[0] * self.reduction

    def grid_of_size(self, size: Size) -> Grid:
        """Return the grid of an image of (width, height) pixels. Raise `BadInput` for a size that has none."""
        grid = size[1] // self.reduction, size[0] // self.reduction
        try:
            self.dialect.header(grid)
            is_known = self.size_of(grid) == size
        except BadInput:
            is_known = False
        if is_known:
            return grid
        if isinstance(self.dialect, SizedDialect):
            cell = self.dialect.unit * self.reduction
            known = f"sizes whose sides are multiples of {cell} up to {cell * self.dialect.max_units} pixels"
        else:
            known = "{}x{}".format(*self.size_of(self.dialect.grid))
        raise BadInput(f"{size[0]}x{size[1]}, but this model draws {known}", where="size")

    def grid_for(self, size: Size) -> Grid:
        """Return the grid that a picture of (width, height) pixels is fitted to."""
        sizes = {self.size_of(grid): grid for grid in self.dialect.grids}
        return next(iter(sizes.values())) if len(sizes) == 1 else sizes[nearest_shape(size, list(sizes))]

    def fit_mask(self, mask: PILImage.Image) -> np.ndarray:
        """Return which pixels of a fitted picture a mask of the picture marks, where it is not black: bool [H, W]."""
        marked = mask.convert("L").convert("RGB")
        if isinstance(self.dialect, SizedDialect):
            size = self.size_of(self.grid_for(mask.size))
            fitted = fit_cover(marked, size, resampling=PILImage.Resampling.BOX)
        else:
            fitted = fit_square(marked, self.size_of(self.dialect.grid)[0], resampling=PILImage.Resampling.BOX)
        return np.asarray(fitted)[:, :, 0] > 0

    def fit(
        self, picture: PILImage.Image, fit: Fit = "crop", grid: Grid | None = None, position: CropPosition = CENTRE
    ) -> np.ndarray:
        """Return an RGB picture as uint8 [H, W, 3], fitted to a grid, by default that of its shape.

        fit: in the square dialect, whether what does not fit is cut off, or white is added.
        """
        if isinstance(self.dialect, SizedDialect):
            grid = grid or self.grid_for(picture.size)
            return np.asarray(fit_cover(picture, self.size_of(grid), position))
        return np.asarray(fit_square(picture, self.size_of(self.dialect.grid)[0], fit))
