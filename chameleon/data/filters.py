"""Filters: plain functions that say why a sample is not wanted, and the options that call them.

Each is `function(candidate, limit) -> reason or None`, entered under the name of its field in `Filters`. A reason names the
filter and its limit, not the sample, so that a report can count by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chameleon.data.sources import Sample
from chameleon.errors import BadInput
from chameleon.tokenizers.image import picture_bytes, picture_size

FILTERED = "filter: "
"""What the reasons of filters begin with: such samples could have been used, but were not wanted."""
ALL_SEEN = f"{FILTERED}all pictures came before"
LANGUAGE_FIELDS = ("language", "lang", "LANGUAGE")


@dataclass
class Filters:
    """What samples must be to be taken; what is left out asks nothing."""

    min_side: int | None = None
    """Pixels that the shorter side of every picture has at least."""
    max_aspect: float | None = None
    """The longer side of every picture is at most this many times the shorter."""
    min_text: int | None = None
    """Characters that the text has at least, in a conversation all its texts together."""
    max_text: int | None = None
    languages: list[str] | None = None
    """Tags of which the field `language` or `lang` holds one; `en` also takes `en-GB`. Samples without it are not taken."""
    min_score: dict[str, float] = field(default_factory=dict)
    """Fields that hold at least this number, such as {aesthetic: 5.5}. Samples without the field are not taken."""
    unique_pictures: bool = False
    """Leave out documents all of whose pictures came before, byte for byte, in any of the sources (see `tokenize`)."""

    def check(self) -> None:
        """Raises `BadInput` for limits that no sample could meet, or that ask nothing."""
        for name in ("min_side", "max_aspect", "min_text", "max_text"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} is {value}, expected more than 0", where="filters")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise BadInput(f"max_aspect is {self.max_aspect}, no picture is below 1", where="filters")
        if self.min_text is not None and self.max_text is not None and self.min_text > self.max_text:
            raise BadInput("min_text is more than max_text", where="filters")
        if self.languages is not None and not self.languages:
            raise BadInput("languages is an empty list", where="filters", remedy="name some, or leave it out")


def sizes(sample: Sample) -> list[tuple[int, int]]:
    """Width and height of each picture. Raises `BadInput` for one that cannot be read."""
    return [picture_size(picture_bytes(image)) for image in sample.images]


def min_side(sample: Sample, pixels: int) -> str | None:
    return f"a picture's side is under {pixels}" if any(min(size) < pixels for size in sizes(sample)) else None


def max_aspect(sample: Sample, ratio: float) -> str | None:
    narrow = any(max(size) > ratio * min(size) for size in sizes(sample))
    return f"a picture's aspect is over {ratio:g}" if narrow else None


def min_text(sample: Sample, characters: int) -> str | None:
    return f"text is under {characters} characters" if len(sample.text) < characters else None


def max_text(sample: Sample, characters: int) -> str | None:
    return f"text is over {characters} characters" if len(sample.text) > characters else None


def languages(sample: Sample, tags: Sequence[str]) -> str | None:
    found = next((sample.fields[name] for name in LANGUAGE_FIELDS if name in sample.fields), None)
    tag = str(found).lower().replace("_", "-")
    wanted = [name.lower() for name in tags]
    good = found is not None and any(tag == name or tag.startswith(f"{name}-") for name in wanted)
    return None if good else f"language is none of {', '.join(tags)}"


def min_score(sample: Sample, limits: Mapping[str, float]) -> str | None:
    for name, limit in limits.items():
        try:
            value = float(sample.fields[name])  # in a CSV numbers are texts
        except (KeyError, ValueError):
            return f"no number {name}"
        if not value >= limit:
            return f"{name} is under {limit:g}"
    return None


FILTERS: dict[str, Callable[[Sample, Any], str | None]] = {
    name.__name__: name for name in (min_text, max_text, languages, min_score, min_side, max_aspect)
}
"""In the order of their calls: what costs least comes first."""


def refusal(sample: Sample, filters: Filters) -> str | None:
    """Why the filters do not take the sample, or None. Raises `BadInput` where a picture cannot be read."""
    asked = dataclasses.asdict(filters)
    for name, refuses in FILTERS.items():
        if asked[name] not in (None, {}):
            reason = refuses(sample, asked[name])
            if reason is not None:
                return FILTERED + reason
    return None
