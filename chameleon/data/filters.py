"""Filters: functions that return the reason to drop a sample, and the options that call them.

A filter is `function(sample, limit) -> reason or None`, listed under the name of its field in `Filters`. A reason names the
filter and its limit, not the sample, so that a report can count by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chameleon.data.source_types import Sample
from chameleon.errors import BadInput

FILTERED = "filter: "
"""Prefix of the reasons of filters: such samples are readable but were filtered out."""
ALL_DUPLICATES = f"{FILTERED}all its pictures are duplicates"
LANGUAGE_FIELDS = ("language", "lang", "LANGUAGE")


@dataclass
class Filters:
    """What samples must satisfy; a field that is left out does not filter."""

    min_side: int | None = None
    """Least length of the shorter side of every picture, in pixels."""
    max_aspect: float | None = None
    """Largest ratio of the longer to the shorter side of every picture."""
    min_text: int | None = None
    """Least number of characters of the text, in a conversation of all its texts together."""
    max_text: int | None = None
    """Largest number of characters of the text."""
    languages: list[str] | None = None
    """Tags of which the field `language` or `lang` must have one (`en` includes `en-GB`); others are left out."""
    min_score: dict[str, float] = field(default_factory=dict)
    """Fields that must have at least this value, such as {aesthetic: 5.5}. Samples without the field are left out."""
    unique_images: bool = False
    """Leave out documents all of whose pictures are duplicates of earlier ones, byte for byte, in any of the sources."""
    near_duplicates: bool = False
    """The same with pictures that look alike: of the same pHash, the signs of their 64 lowest frequencies (the package
    ImageHash), so scaled, recompressed or slightly changed copies too."""

    def check(self) -> None:
        """Raise `BadInput` for limits that no sample could satisfy."""
        for name in ("min_side", "max_aspect", "min_text", "max_text"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise BadInput(f"{name} is {limit}, expected more than 0", where="filters")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise BadInput(f"max_aspect is {self.max_aspect}, no picture is below 1", where="filters")
        if self.min_text is not None and self.max_text is not None and self.min_text > self.max_text:
            raise BadInput("min_text is more than max_text", where="filters")
        if self.languages is not None and not self.languages:
            raise BadInput("languages is an empty list", where="filters", remedy="name some, or leave it out")


def min_side(sample: Sample, pixels: int) -> str | None:
    too_small = any(min(image.size) < pixels for image in sample.image_files)
    return f"a picture's side is under {pixels}" if too_small else None


def max_aspect(sample: Sample, ratio: float) -> str | None:
    too_long = any(max(image.size) > ratio * min(image.size) for image in sample.image_files)
    return f"a picture's aspect is over {ratio:g}" if too_long else None


def min_text(sample: Sample, characters: int) -> str | None:
    return f"text is under {characters} characters" if len(sample.text) < characters else None


def max_text(sample: Sample, characters: int) -> str | None:
    return f"text is over {characters} characters" if len(sample.text) > characters else None


def languages(sample: Sample, tags: Sequence[str]) -> str | None:
    language = next((sample.fields[name] for name in LANGUAGE_FIELDS if name in sample.fields), None)
    tag = str(language).lower().replace("_", "-")
    allowed_tags = [allowed.lower() for allowed in tags]
    matches = language is not None and any(tag == allowed or tag.startswith(f"{allowed}-") for allowed in allowed_tags)
    return None if matches else f"language is none of {', '.join(tags)}"


def min_score(sample: Sample, limits: Mapping[str, float]) -> str | None:
    for name, limit in limits.items():
        try:
            value = float(sample.fields[name])  # in a CSV numbers are texts
        except (KeyError, ValueError, TypeError, OverflowError):
            return f"no number {name}"
        if not value >= limit:
            return f"{name} is under {limit:g}"
    return None


FILTERS: dict[str, Callable[[Sample, Any], str | None]] = {
    function.__name__: function for function in (min_text, max_text, languages, min_score, min_side, max_aspect)
}
"""In the order of their calls, the cheapest first."""


def reason_to_filter(sample: Sample, filters: Filters) -> str | None:
    """Return why the filters leave the sample out, or None. Raise `BadInput` where an image cannot be read."""
    limits = dataclasses.asdict(filters)
    for name, function in FILTERS.items():
        if limits[name] not in (None, {}):
            reason = function(sample, limits[name])
            if reason is not None:
                return FILTERED + reason
    return None
