"""What may come next: a picture is exactly its grid of codes, and none starts where it would not fit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.vocabulary import Vocabulary


class Next(IntEnum):
    """The kinds of ids that may follow."""

    TEXT = 0
    """Text or the end."""
    TEXT_OR_IMAGE = 1
    """Text, the end, or the start of a picture."""
    IMAGE_START = 2
    """The start of a picture and nothing else."""
    CODE = 3
    """An image code."""
    IMAGE_END = 4
    """The end of a picture and nothing else."""
    END = 5
    """The end and nothing else."""


def masks(vocabulary: Vocabulary) -> Tensor:
    """bool [len(Next), vocab_size]: which ids each kind allows."""
    v = vocabulary
    table = {
        Next.TEXT: v.mask(text=True, specials=("eos",)),
        Next.TEXT_OR_IMAGE: v.mask(text=True, specials=("eos", "boi")),
        Next.IMAGE_START: v.mask(specials=("boi",)),
        Next.CODE: v.mask(image=True),
        Next.IMAGE_END: v.mask(specials=("eoi",)),
        Next.END: v.mask(specials=("eos",)),
    }
    return torch.stack([table[kind] for kind in Next])


@dataclass(frozen=True)
class Rules:
    """What one row may produce."""

    max_new: int
    """Ids after the prompt at most, structure included."""
    max_images: int = 0
    text: bool = True
    """Whether text may be produced; without it a row is `max_images` pictures and the end."""

    def __post_init__(self) -> None:
        if self.max_new < 1 or self.max_images < 0:
            raise BadInput(
                f"{self.max_new} ids with {self.max_images} pictures", where="what to make", remedy="ask for some"
            )


class ModalityState:
    """Follows one row and says what may come next."""

    def __init__(self, rules: Rules, vocabulary: Vocabulary, prompt: list[int]) -> None:
        self.rules, self.vocabulary = rules, vocabulary
        self.made = 0
        self.images = 0
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
        """The kind of the next id."""
        if self.codes_left is not None:
            return Next.CODE if self.codes_left else Next.IMAGE_END
        room = self.rules.max_new - self.made
        may_draw = self.images < self.rules.max_images and room >= self.vocabulary.block_length
        if not self.rules.text:
            return Next.IMAGE_START if may_draw else Next.END
        return Next.TEXT_OR_IMAGE if may_draw else Next.TEXT

    def push(self, token: int) -> None:
        """Takes note of the id that came."""
        self.made += 1
        if token == self.vocabulary.boi:
            self.codes_left, self.images = self.vocabulary.image_length, self.images + 1
        elif token == self.vocabulary.eoi:
            self.codes_left = None
        elif self.codes_left is not None:
            self.codes_left -= 1
