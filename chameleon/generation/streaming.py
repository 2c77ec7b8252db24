"""Ids as they come, to parts that can be shown: whole characters of text, pictures, and pictures that are forming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image as PILImage

from chameleon.document import Part, Text
from chameleon.tokenizers.mixed import MixedTokenizer


@dataclass(frozen=True)
class Forming:
    """The upper part of a picture of which more is to come."""

    image: PILImage.Image
    """As wide as the picture will be, as high as its rows of codes are decoded."""
    rows: int
    """Rows of codes it is made of."""


class Assembler:
    """Puts the ids of one row together."""

    def __init__(self, tokenizer: MixedTokenizer, previews: int = 0) -> None:
        """previews: show a picture after each so many rows of codes; 0 shows it when it is whole."""
        self.tokenizer, self.previews = tokenizer, previews
        self.waiting = b""
        self.block: list[int] = []

    def push(self, token: int) -> Iterator[Part | Forming]:
        """What the id completes."""
        v = self.tokenizer.vocabulary
        if self.block or token == v.boi:
            yield from self.rest_of_text()  # no character goes on behind a picture
            self.block.append(token)
            codes = len(self.block) - 1
            if token == v.eoi:
                yield from self.tokenizer.decode(self.block).parts
                self.block = []
            elif self.previews and codes and codes < v.image_length and codes % (v.grid[1] * self.previews) == 0:
                yield Forming(self.upper_part(), codes // v.grid[1])
            return
        self.waiting += self.tokenizer.text_bytes([token])
        whole = whole_characters(self.waiting)
        if whole:
            yield Text(self.waiting[:whole].decode("utf-8", errors="replace"))
            self.waiting = self.waiting[whole:]

    def end(self) -> Iterator[Part]:
        """What is left where the ids end: a character or a picture that was cut short."""
        yield from self.rest_of_text()
        if self.block:
            yield from self.tokenizer.decode(self.block).parts

    def rest_of_text(self) -> Iterator[Part]:
        if self.waiting:
            yield Text(self.waiting.decode("utf-8", errors="replace"))
            self.waiting = b""

    def upper_part(self) -> PILImage.Image:
        """The rows that are there, decoded as if the last went on to the bottom."""
        v = self.tokenizer.vocabulary
        rows = v.ids_to_codes(torch.tensor(self.block[1:])).view(-1, v.grid[1])
        whole = torch.cat((rows, rows[-1:].expand(v.grid[0] - len(rows), -1)))
        picture = self.tokenizer.image.decode(whole.unsqueeze(0))[0]
        return picture.crop((0, 0, picture.width, picture.height * len(rows) // v.grid[0]))


def whole_characters(data: bytes) -> int:
    """How many leading bytes make whole UTF-8 characters, or can never become any."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if 0xC0 <= byte <= 0xF4:  # a leading byte: how many should follow it
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < wanted else len(data)
        if not 0x80 <= byte < 0xC0:
            break
    return len(data)
