"""What may come next: a picture is exactly its grid of codes, and none starts where it would not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise
from typing import Literal

from chameleon.errors import BadInput
from chameleon.vocabulary import Vocabulary


class Next(IntFlag):
    """What may follow; outside pictures several may."""

    TEXT = 1
    """A text piece."""
    IMAGE_START = 2
    """The start of a picture."""
    END = 4
    """The end of the row."""
    CODE = 8
    """An image code and nothing else."""
    IMAGE_END = 16
    """The end of a picture and nothing else."""


FORCED = {Next.IMAGE_START: "boi", Next.IMAGE_END: "eoi", Next.END: "eos"}
"""Where one id alone may come, it needs no model."""
PartKind = Literal["text", "image"]


@dataclass(frozen=True)
class Rules:
    """What one row may produce."""

    max_new: int
    """Ids after the prompt at most, structure included."""
    max_images: int = 0
    """Pictures at most; with a format, as many as it has."""
    max_text: int | None = None
    """Ids of one run of text at most."""
    format: tuple[PartKind, ...] | None = None
    """The parts to make, in this order, each text at least one id; None leaves them to the model."""

    def __post_init__(self) -> None:
        if self.max_new < 1 or self.max_images < 0 or (self.max_text is not None and self.max_text < 1):
            raise BadInput(
                f"{self.max_new} ids with {self.max_images} pictures", where="what to make", remedy="ask for some"
            )
        for kind in self.format or ():
            if kind not in ("text", "image"):
                raise BadInput(f"{kind!r} is neither text nor image", where="format")
        if self.format and ("text", "text") in pairwise(self.format):
            raise BadInput("two texts in a row are one", where="format")

    @property
    def wants_images(self) -> int:
        """Pictures at most."""
        return self.max_images if self.format is None else self.format.count("image")

    def least(self, vocabulary: Vocabulary, start: int = 0) -> int:
        """Ids that the format's parts from number `start` on take at least."""
        return sum(vocabulary.block_length if kind == "image" else 1 for kind in (self.format or ())[start:])


class ModalityState:
    """Follows one row and says what may come next."""

    def __init__(self, rules: Rules, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self.rules, self.vocabulary = rules, vocabulary
        self.made = 0
        self.images = 0
        self.run = 0
        """Ids of text since the last picture."""
        self.part = 0
        """Number of the format's part that is being made, or comes next."""
        self.codes_left: int | None = None  # None outside pictures
        for position in range(len(prompt) - 1, -1, -1):  # a prompt may end inside a picture that is to be completed
            if prompt[position] == vocabulary.eoi:
                break
            if prompt[position] == vocabulary.boi:
                self.codes_left = vocabulary.image_length - (len(prompt) - position - 1)
                self.images = 1
                break

    @property
    def done(self) -> bool:
        """Whether the row has produced all it may."""
        return self.made >= self.rules.max_new

    def next(self) -> Next:
        """What the next id may be."""
        if self.codes_left is not None:
            return Next.CODE if self.codes_left else Next.IMAGE_END
        room = self.rules.max_new - self.made
        more_text = self.rules.max_text is None or self.run < self.rules.max_text
        if self.rules.format is not None:
            return self.next_of_format(self.rules.format, room, more_text)
        kind = Next.END
        if more_text:
            kind |= Next.TEXT
        if self.images < self.rules.max_images and room >= self.vocabulary.block_length:
            kind |= Next.IMAGE_START
        return kind

    def next_of_format(self, parts: Sequence[PartKind], room: int, more_text: bool) -> Next:
        """The same where the parts are given. A text ends in time for what must come behind it."""
        if self.part == len(parts):
            return Next.END
        if parts[self.part] == "image":
            return Next.IMAGE_START
        if not self.run:
            return Next.TEXT
        after = Next.END if self.part + 1 == len(parts) else Next.IMAGE_START
        spare = room > self.rules.least(self.vocabulary, self.part + 1)
        return after | Next.TEXT if more_text and spare else after

    def push(self, token: int) -> None:
        """Takes note of the id that came."""
        v = self.vocabulary
        self.made += 1
        if self.codes_left:  # an image code, whichever
            self.codes_left -= 1
        elif token == v.boi:
            self.part += 1 + bool(self.run)  # the picture, and a text that went before
            self.codes_left, self.images, self.run = v.image_length, self.images + 1, 0
        elif token == v.eoi:
            self.codes_left = None
        else:
            self.run += 1
