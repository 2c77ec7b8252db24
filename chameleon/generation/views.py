"""Views of a picture for test-time augmentation: the picture itself, and the same a little shifted and scaled."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image as PILImage

from chameleon.document import Document, Image
from chameleon.errors import BadInput
from chameleon.tokenizers.image import affine_augment, load_picture

MAX_SHIFT, MIN_ZOOM, MAX_ZOOM = 0.04, 0.95, 1.03
"""Shifts are fractions of the sides."""


def check_views(num_views: int, max_batch_size: int) -> None:
    """Raise `BadInput` for a number of views that cannot be read together, each in a sequence of its own."""
    if not 1 <= num_views <= max_batch_size:
        raise BadInput(f"{num_views} views", where="views", remedy=f"use 1 to {max_batch_size} (max_batch_size)")


def views_of_document(document: Document, count: int) -> list[Document]:
    """Return the document in `count` views of its images, the first of which is the document itself."""
    views = [document]
    for number in range(1, count):
        parts = (Image(view_of(load_picture(p.image), number)) if isinstance(p, Image) else p for p in document.parts)
        views.append(Document(tuple(parts), document.complete))
    return views


def view_of(picture: PILImage.Image, number: int) -> PILImage.Image:
    """Return the picture shifted by up to 4% and scaled by 0.95 to 1.03, the same for each `number`.

    What was outside gets the median colour of the picture's border.
    """
    rng = random.Random(number)
    zoom = rng.uniform(MIN_ZOOM, MAX_ZOOM)
    shift = (rng.uniform(-MAX_SHIFT, MAX_SHIFT), rng.uniform(-MAX_SHIFT, MAX_SHIFT))
    return affine_augment(picture, zoom, shift, outside=border_colour(picture))


def border_colour(picture: PILImage.Image) -> tuple[int, ...]:
    """Return the median colour of the outermost pixels of an RGB picture."""
    pixels = np.asarray(picture)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return tuple(int(value) for value in np.median(border, axis=0))
