"""Names of colours, the main colour of a picture, and pictures in another colour."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

# (hue in degrees below which a colour has this name, name)
HUES = (
    (14, "red"),
    (42, "orange"),
    (68, "yellow"),
    (165, "green"),
    (255, "blue"),
    (290, "purple"),
    (340, "pink"),
    (361, "red"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b")
WORD_ABOUT_COLOURS = re.compile(rf"{COLOUR_WORD.pattern}|\b(blonde?|cyan|gold|golden|rainbow|silver|violet|colour\w*)\b")
"""Colours and other words that are untrue of a picture in other colours."""


class Target(NamedTuple):
    """How a picture is given a colour."""

    hue: float
    """Of its main colour, in degrees."""
    saturation: float
    """Factor of saturations."""
    value: float
    """Factor of values."""
    min_value: float = 0.0
    """Least mean value that the coloured pixels get: dark orange would be brown."""


TARGETS = {
    "red": Target(0, 1.0, 1.0, 0.7),
    "orange": Target(29, 1.0, 1.05, 0.85),
    "yellow": Target(52, 1.0, 1.1, 0.85),
    "green": Target(115, 0.85, 0.85),
    "blue": Target(214, 0.95, 0.95),
    "purple": Target(273, 0.8, 0.9),
    "pink": Target(325, 0.75, 1.05, 0.8),
    "brown": Target(22, 0.8, 0.6),
    "black": Target(0, 0.15, 0.2),
    "grey": Target(0, 0.06, 0.8),
}
"""Colours that a picture can be given."""
BLACK_BELOW, GREY_BELOW, WHITE_ABOVE = 0.22, 0.16, 0.85
"""Limits of value, saturation and value of the colours without a hue."""
MIN_VISIBLE = 100
"""Pixels of a picture below which it has no main colour."""
MIN_SHARE = 0.6
"""Share of the visible pixels that a dominant colour has."""
BACKGROUND_ABOVE = 0.97
"""Least value of each component of a pixel that counts as the white background."""


def hsv(pixels: np.ndarray) -> np.ndarray:
    """Return hue in degrees, saturation and value, float32 [..., 3], of pixels [..., 3] with components in [0, 1]."""
    largest, smallest = pixels.max(-1), pixels.min(-1)
    chroma = largest - smallest
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    hue = np.select(
        [chroma == 0, largest == red, largest == green],
        [np.zeros_like(chroma), (green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return np.stack((hue * 60 % 360, chroma / np.maximum(largest, 1e-9), largest), axis=-1).astype(np.float32)


def from_hsv(values: np.ndarray) -> np.ndarray:
    """Return pixels [..., 3] with components in [0, 1]: the inverse of `hsv`."""
    hue, saturation, value = np.moveaxis(values, -1, 0)
    k = (np.array([5, 3, 1]) + hue[..., None] / 60) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def colour_indices(pixels: np.ndarray) -> np.ndarray:
    """Return the indices in `COLOURS` of pixels [..., 3] with components in [0, 1]: int [...]."""
    hue, saturation, value = np.moveaxis(hsv(pixels), -1, 0)
    named = np.array([COLOURS.index(name) for _, name in HUES])
    indices = named[np.searchsorted([limit for limit, _ in HUES], hue, side="right")]
    is_brown = ((indices == COLOURS.index("orange")) & (value < 0.72)) | ((indices == COLOURS.index("red")) & (value < 0.5))
    indices = np.where(is_brown, COLOURS.index("brown"), indices)
    without_hue = np.where(value > WHITE_ABOVE, COLOURS.index("white"), COLOURS.index("grey"))
    indices = np.where(saturation < GREY_BELOW, without_hue, indices)
    return np.where(value < BLACK_BELOW, COLOURS.index("black"), indices)


def colour_name(red: float, green: float, blue: float) -> str:
    """Return the everyday name of a colour with components in [0, 1]; dark orange and red are brown."""
    return COLOURS[int(colour_indices(np.array([red, green, blue])))]


def largest_colour(pixels: np.ndarray) -> tuple[str, float] | None:
    """Return the commonest colour of pixels [N, 3] in [0, 1] and its share; None for fewer than `MIN_VISIBLE`."""
    if len(pixels) < MIN_VISIBLE:
        return None
    counts = np.bincount(colour_indices(pixels), minlength=len(COLOURS))
    return COLOURS[int(counts.argmax())], float(counts.max() / counts.sum())


def dominant_colour(rgba: PILImage.Image) -> str | None:
    """Return the name of the colour of at least `MIN_SHARE` of the visible pixels (alpha > 128), or None."""
    pixels = np.asarray(rgba.convert("RGBA"), dtype=np.float32).reshape(-1, 4)
    largest = largest_colour(pixels[pixels[:, 3] > 128][:, :3] / 255)
    return largest[0] if largest is not None and largest[1] >= MIN_SHARE else None


def main_colour(picture: PILImage.Image) -> str | None:
    """Return the commonest colour of an RGB picture outside its white background, or None where there is little else."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).reshape(-1, 3) / 255
    largest = largest_colour(pixels[pixels.min(1) < BACKGROUND_ABOVE])
    return largest and largest[0]


def recolour(picture: PILImage.Image, colour: str) -> PILImage.Image:
    """Return an RGB picture whose main hue is turned to that of `colour`, and all other hues by the same angle.

    Grey, black and white pixels stay as they are.
    """
    values = hsv(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
    hue, saturation, value = np.moveaxis(values, -1, 0)
    has_hue = (saturation >= GREY_BELOW) & (value >= BLACK_BELOW)
    if not has_hue.any():
        return picture
    angles = np.deg2rad(hue[has_hue])
    weights = (saturation * value)[has_hue]
    main_hue = np.rad2deg(np.arctan2((weights * np.sin(angles)).sum(), (weights * np.cos(angles)).sum()))
    target = TARGETS[colour]
    value_factor = max(target.value, target.min_value / value[has_hue].mean())
    turned = (hue + target.hue - main_hue) % 360, saturation * target.saturation, (value * value_factor).clip(0, 1)
    result = from_hsv(np.where(has_hue[..., None], np.stack(turned, axis=-1), values))
    return PILImage.fromarray((result * 255).round().astype(np.uint8))
