"""Augmentation of drawings on white: the same thing as another artist might have drawn it."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageChops, ImageFilter, ImageOps

from chameleon.data.colours import from_hsv, hsv

COMPRESSION_NOISE = 8
"""Largest difference from white that still counts as background."""


def change_style(picture: PILImage.Image, rng: random.Random, max_hue: float = 7) -> PILImage.Image:
    """Return the picture as another artist might have drawn it: with changes that leave its caption true.

    Small turns, hues turned by up to `max_hue` degrees (the default stays within the names of colours), outlines, flat
    colours, a shadow, a tinted background, each with some probability.
    """
    picture = picture.rotate(rng.uniform(-8, 8), PILImage.Resampling.BICUBIC, fillcolor="white")
    if rng.random() < 0.25:
        picture = flatten_colours(picture)
    picture = shift_colours(picture, rng.uniform(-max_hue, max_hue), rng.uniform(0.75, 1.2), rng.uniform(0.85, 1.1))
    if rng.random() < 0.4:
        picture = draw_outline(picture, rng.choice((3, 3, 5)), rng.uniform(0.5, 1))
    shape = foreground(picture)
    if rng.random() < 0.15:
        shadow = ImageChops.offset(shape.filter(ImageFilter.GaussianBlur(1.5)), rng.randint(-2, 3), rng.randint(1, 3))
        background = PILImage.composite(PILImage.new("RGB", picture.size, (190, 190, 190)), white_like(picture), shadow)
        picture = PILImage.composite(picture, background, shape)
    elif rng.random() < 0.15:
        tint = tuple(rng.randint(200, 255) for _ in range(3))
        picture = PILImage.composite(picture, PILImage.new("RGB", picture.size, tint), shape)
    return picture


def warp(picture: PILImage.Image, rng: random.Random, max_shift: float = 0.06) -> PILImage.Image:
    """Return the picture bent smoothly, as another hand might have drawn its proportions.

    Points of a 4×4 grid are shifted by up to about `max_shift` of the side in each direction, those between them by cubic
    interpolation: an elastic distortion (Simard, Steinkraus and Platt, 2003) of few degrees of freedom.
    """
    border = picture.width // 8
    framed = ImageOps.expand(picture, border, "white")  # what is moved in from outside is white
    pixels = torch.from_numpy(np.array(framed, dtype=np.float32)).permute(2, 0, 1)[None]
    shifts = torch.tensor([rng.uniform(-2 * max_shift, 2 * max_shift) for _ in range(32)]).view(1, 2, 4, 4)
    displacement = F.interpolate(shifts, pixels.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    sampling_grid = F.affine_grid(torch.eye(2, 3)[None], list(pixels.shape), align_corners=False) + displacement
    bent = F.grid_sample(pixels, sampling_grid, padding_mode="border", align_corners=False)
    values = bent[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    return ImageOps.crop(PILImage.fromarray(values), border)


def stretch(picture: PILImage.Image, rng: random.Random, max_stretch: float = 0.25) -> PILImage.Image:
    """Return the picture made narrower or lower by up to `max_stretch` of the side, on white."""
    width, height = picture.size
    shrunk = rng.randrange(2)
    sides = [width, height]
    sides[shrunk] = round(sides[shrunk] * (1 - rng.uniform(0, max_stretch)))
    result = white_like(picture)
    result.paste(picture.resize((sides[0], sides[1])), ((width - sides[0]) // 2, (height - sides[1]) // 2))
    return result


def erase_part(picture: PILImage.Image, rng: random.Random, max_side: float = 0.4) -> PILImage.Image:
    """Return the picture with a white rectangle whose sides are up to `max_side` of its own (arXiv 1708.04896)."""
    width, height = (round(side * rng.uniform(0.15, max_side)) for side in picture.size)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    result = picture.copy()
    result.paste("white", (left, top, left + width, top + height))
    return result


def white_like(picture: PILImage.Image) -> PILImage.Image:
    return PILImage.new("RGB", picture.size, "white")


def foreground(picture: PILImage.Image) -> PILImage.Image:
    """Return a mask of what is not white background: 8-bit greyscale."""
    difference = ImageChops.difference(picture, white_like(picture)).convert("L")
    return difference.point(lambda value: min(255, max(0, value - COMPRESSION_NOISE) * 12))  # soft edges stay soft


def flatten_colours(picture: PILImage.Image) -> PILImage.Image:
    """Return the picture in 16 colours."""
    reduced = picture.filter(ImageFilter.MedianFilter(3)).quantize(16, PILImage.Quantize.MEDIANCUT).convert("RGB")
    return PILImage.composite(reduced, picture, foreground(picture))


def draw_outline(picture: PILImage.Image, width: int, strength: float) -> PILImage.Image:
    """Return the picture with dark lines around its shape and along its edges."""
    shape = foreground(picture)
    line = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(width)), shape.filter(ImageFilter.MinFilter(3)))
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda value: min(255, max(0, value - 20) * 2))
    inner = ImageOps.expand(ImageOps.crop(edges, 1), 1)  # the filter takes the sides of a picture for edges
    mask = ImageChops.lighter(line, inner).point(lambda value: int(value * strength))
    return PILImage.composite(PILImage.new("RGB", picture.size, (25, 25, 25)), picture, mask)


def shift_colours(picture: PILImage.Image, hue: float, saturation: float, value: float) -> PILImage.Image:
    """Return the picture with its hues turned by `hue` degrees, saturation and value scaled; white and black stay."""
    values = hsv(np.asarray(picture, dtype=np.float32) / 255)
    values[..., 0] = (values[..., 0] + hue) % 360
    values[..., 1] = np.clip(values[..., 1] * saturation, 0, 1)
    has_colour = values[..., 1] > 0.1
    values[..., 2] = np.where(has_colour, np.clip(values[..., 2] * value, 0, 1), values[..., 2])
    return PILImage.fromarray((from_hsv(values) * 255).round().astype(np.uint8))
