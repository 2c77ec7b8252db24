"""Output constraints: which kinds of tokens may come next. An image is always whole, and written as its dialect says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise
from typing import Literal

from chameleon.dialect import Grid, ImageCursor
from chameleon.errors import BadInput
from chameleon.vocabulary import Vocabulary


class AllowedNext(IntFlag):
    """The kinds of tokens that may come next; outside images several may be allowed at once."""

    TEXT = 1
    """A text piece."""
    IMAGE_START = 2
    """The token boi."""
    END = 4
    """The token eos."""
    CODE = 8
    """An image code and nothing else."""
    IMAGE_END = 16
    """The token eoi and nothing else."""
    SIZE = 32
    """A token of an image's header and nothing else."""
    ROW_END = 64
    """The token after a row of codes and nothing else."""


PartKind = Literal["text", "image"]


@dataclass(frozen=True)
class OutputConstraints:
    """What one request may generate."""

    max_new_tokens: int
    """Tokens after the prompt at most, boi, eoi and eos included."""
    max_images: int = 0
    """Images at most; with a format, the number of images in it."""
    max_text_tokens: int | None = None
    """Tokens of each run of text at most."""
    format: tuple[PartKind, ...] | None = None
    """The parts to generate, in this order, each text of at least one token; None leaves them to the model."""
    grid: Grid | None = None
    """That of every image; None leaves it to the model, where the dialect has several."""

    def __post_init__(self) -> None:
        text_limit_is_valid = self.max_text_tokens is None or self.max_text_tokens >= 1
        if self.max_new_tokens < 1 or self.max_images < 0 or not text_limit_is_valid:
            raise BadInput(
                f"max_new_tokens {self.max_new_tokens}, max_images {self.max_images}, "
                f"max_text_tokens {self.max_text_tokens}",
                where="output constraints",
                remedy="expected 1 or more tokens and 0 or more images",
            )
        for kind in self.format or ():
            if kind not in ("text", "image"):
                raise BadInput(f"{kind!r} is neither text nor image", where="format")
        if self.format and ("text", "text") in pairwise(self.format):
            raise BadInput("two texts in a row are one", where="format")

    @property
    def image_limit(self) -> int:
        """Images at most."""
        return self.max_images if self.format is None else self.format.count("image")

    def min_tokens(self, vocabulary: Vocabulary, first_part: int = 0) -> int:
        """Return the least number of tokens that the format's parts from `first_part` on take."""
        parts = (self.format or ())[first_part:]
        return sum(self.min_image_length(vocabulary) if kind == "image" else 1 for kind in parts)

    def min_image_length(self, vocabulary: Vocabulary) -> int:
        """Return the least number of tokens that an image takes."""
        dialect = vocabulary.dialect
        return dialect.min_length if self.grid is None else dialect.length(self.grid)


class OutputState:
    """Tracks the output of one request and computes which kinds of tokens may come next."""

    def __init__(self, constraints: OutputConstraints, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self.constraints, self.vocabulary = constraints, vocabulary
        self.min_image_length = constraints.min_image_length(vocabulary)
        self.num_generated = 0
        self.num_images = 0
        self.text_run_length = 0
        """Text tokens since the last image."""
        self.part_index = 0
        """Index of the format's part that is being generated, or comes next."""
        self.image: ImageCursor | None = None
        """The place in the current image; None outside images."""
        for position in range(len(prompt) - 1, -1, -1):  # a prompt may end inside an image that is to be completed
            if prompt[position] == vocabulary.eoi:
                break
            if prompt[position] == vocabulary.boi:
                room = len(prompt) - position + constraints.max_new_tokens - constraints.min_tokens(vocabulary)
                self.image = ImageCursor(vocabulary.dialect, constraints.grid, room)
                for token_id in prompt[position + 1 :]:
                    is_code_next = self.allowed_next() == AllowedNext.CODE
                    self.image.push(token_id)
                    self.image.is_valid &= not is_code_next or token_id in vocabulary.image_ids
                self.num_images = 1
                break

    @property
    def is_exhausted(self) -> bool:
        """Whether `max_new_tokens` have been generated."""
        return self.num_generated >= self.constraints.max_new_tokens

    def allowed_next(self) -> AllowedNext:
        """Return the kinds of tokens that may come next."""
        if self.image is not None:
            if self.image.in_header:
                return AllowedNext.SIZE
            if self.image.is_row_end():
                return AllowedNext.ROW_END
            return AllowedNext.CODE if self.image.codes_left else AllowedNext.IMAGE_END
        tokens_left = self.constraints.max_new_tokens - self.num_generated
        limit = self.constraints.max_text_tokens
        more_text = limit is None or self.text_run_length < limit
        if self.constraints.format is not None:
            return self.allowed_next_in_format(self.constraints.format, tokens_left, more_text)
        allowed = AllowedNext.END
        if more_text:
            allowed |= AllowedNext.TEXT
        if self.num_images < self.constraints.max_images and tokens_left >= self.min_image_length:
            allowed |= AllowedNext.IMAGE_START
        return allowed

    def allowed_next_in_format(self, parts: Sequence[PartKind], tokens_left: int, more_text: bool) -> AllowedNext:
        """Return the kinds of tokens that may come next under a format.

        A text ends early enough that the parts after it still fit.
        """
        if self.part_index == len(parts):
            return AllowedNext.END
        if parts[self.part_index] == "image":
            return AllowedNext.IMAGE_START
        if not self.text_run_length:
            return AllowedNext.TEXT
        after = AllowedNext.END if self.part_index + 1 == len(parts) else AllowedNext.IMAGE_START
        has_spare = tokens_left > self.constraints.min_tokens(self.vocabulary, self.part_index + 1)
        return after | AllowedNext.TEXT if more_text and has_spare else after

    def forced_token(self) -> int | None:
        """Return the token that comes next where it is the only one allowed: it needs no pass of the model."""
        allowed, v = self.allowed_next(), self.vocabulary
        if allowed == AllowedNext.SIZE:
            assert self.image is not None
            sizes = self.image.next_sizes()
            return sizes[0] if len(sizes) == 1 else None
        forced = {
            AllowedNext.IMAGE_START: v.boi,
            AllowedNext.IMAGE_END: v.eoi,
            AllowedNext.ROW_END: v.dialect.row_end,
            AllowedNext.END: v.answer_end,
        }
        return forced.get(allowed)

    def append(self, token_id: int) -> None:
        """Update the state with a generated token."""
        v, tokens_left = self.vocabulary, self.constraints.max_new_tokens - self.num_generated
        self.num_generated += 1
        if token_id == v.boi:
            self.part_index += 1 + bool(self.text_run_length)  # the image, and a text before it
            room = tokens_left - self.constraints.min_tokens(v, self.part_index)
            self.image = ImageCursor(v.dialect, self.constraints.grid, room)
            self.num_images, self.text_run_length = self.num_images + 1, 0
        elif token_id == v.eoi:
            self.image = None
        elif self.image is not None:
            self.image.push(token_id)
        else:
            self.text_run_length += 1
