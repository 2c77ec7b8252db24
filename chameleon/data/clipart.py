"""The embedded clip art: drawings of the Open Clip Art Library in the public domain, each with a name and keywords.

The shards are written by `build_clipart.py`; `embedded/ATTRIBUTIONS.md` names the source. A twentieth of the names is held
out for validation.
"""

from __future__ import annotations

from functools import cache

from chameleon.data.labelled import LabelledPicture, choose_concepts, read_labelled

STYLES = ("clip art", "line art")


@cache
def load(split: str | None = None) -> tuple[LabelledPicture, ...]:
    """Return all drawings of a split ("train", "validation"; None: both), in the order of the shards."""
    if split is not None:
        return tuple(entry for entry in load() if entry.split == split)
    return read_labelled("clipart-*.tar.gz")


def subset(split: str, concepts: int | None = None) -> tuple[LabelledPicture, ...]:
    """Return the drawings of a split; with `concepts`, of that many names only."""
    if concepts is None:
        return load(split)
    chosen = choose_concepts(load(), concepts)
    return tuple(entry for entry in load(split) if entry.concept in chosen)
