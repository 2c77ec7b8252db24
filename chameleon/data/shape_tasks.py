"""The embedded emoji in pictures of several shapes, for models of the sized dialect (recipe `shapes`).

Flags are 3 : 2, two emoji side by side 2 : 1, a banner of one above the other 1 : 2, single ones square. One of six single
emoji is drawn in another shape, which the prompt then names, as "cat, 96x64"; of the others one prompt in six does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from PIL import Image as PILImage
from PIL import ImageChops

from chameleon.data.labelled import LabelledPicture, View, augment, sample_by_concept
from chameleon.data.picture_tasks import EMPTY_PROMPT_SHARE, turn, with_style
from chameleon.document import Conversation, Image, Text

Size = tuple[int, int]
"""(width, height) in pixels."""
SQUARE: Size = (80, 80)
FLAG: Size = (96, 64)
SIDE_BY_SIDE: Size = (112, 56)
BANNER: Size = (56, 112)
OTHER_SHAPES: tuple[Size, ...] = (FLAG, (64, 96))
OTHER_SHAPE_SHARE = 1 / 6
NAMED_SIZE_SHARE = 1 / 6
"""Share of prompts that name the size though it is the usual one."""
PAIR_SHARE = 0.08
"""Share of two emoji side by side, and of two above each other."""
CAPTION_SHARE = 0.2
"""Share of conversations that ask what a picture shows."""


def shapes(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield drawings by prompts, and captions of pictures, in all shapes. One prompt in ten is empty, for guidance."""
    entries = [entry for entry in pictures if not entry.is_variant]
    for entry, rng in sample_by_concept(entries, per_concept, seed):
        caption, picture, is_usual_shape = shaped(entry, rng.choice(entries), rng, view)
        names_size = not is_usual_shape or rng.random() < NAMED_SIZE_SHARE
        prompt = f"{caption}, {picture.width}x{picture.height}" if names_size else caption
        if rng.random() < CAPTION_SHARE:
            yield turn([Image(picture)], Text(caption))
        else:
            yield turn([] if rng.random() < EMPTY_PROMPT_SHARE else [Text(prompt)], Image(picture))


def shaped(
    entry: LabelledPicture, other: LabelledPicture, rng: random.Random, view: View
) -> tuple[str, PILImage.Image, bool]:
    """Return a caption, its picture, and whether that has the usual shape: a flag, a single emoji, or two of them."""
    if entry.subgroup == "country-flag":
        return entry.name, as_flag(entry.picture), True
    kind = rng.random()
    if kind < PAIR_SHARE:
        return f"{entry.name} and {other.name}", joined([view(entry, rng), view(other, rng)], SIDE_BY_SIDE), True
    if kind < 2 * PAIR_SHARE:
        return f"{entry.name} above {other.name}", joined([view(entry, rng), view(other, rng)], BANNER), True
    size = rng.choice(OTHER_SHAPES) if rng.random() < OTHER_SHAPE_SHARE else SQUARE
    return with_style(entry.name, entry, rng), joined([view(entry, rng)], size), size == SQUARE


def as_flag(picture: PILImage.Image) -> PILImage.Image:
    """Return a flag without the white around it, as wide and high as flags are."""
    white = PILImage.new("RGB", picture.size, "white")
    marked = ImageChops.difference(picture, white).convert("L").point(lambda value: 255 * (value > 12))
    return picture.crop(marked.getbbox() or (0, 0, *picture.size)).resize(FLAG, PILImage.Resampling.LANCZOS)


def joined(pictures: Sequence[PILImage.Image], size: Size) -> PILImage.Image:
    """Return square pictures on white, beside each other in a wide picture, below each other in a tall one."""
    width, height = size
    side = min(width, height, max(width, height) // len(pictures))
    canvas = PILImage.new("RGB", size, "white")
    across, down = (len(pictures), 1) if width >= height else (1, len(pictures))
    left, top = (width - side * across) // 2, (height - side * down) // 2
    for index, picture in enumerate(pictures):
        corner = (left + side * (index % across), top + side * (index // across))
        canvas.paste(picture.resize((side, side), PILImage.Resampling.LANCZOS), corner)
    return canvas
