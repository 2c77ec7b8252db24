"""Incremental decoding of tokens to parts that can be shown: complete characters, images, and partial images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image as PILImage

from chameleon.document import Part, Text
from chameleon.tokenizers.mixed import MixedTokenizer


@dataclass(frozen=True)
class PartialImage:
    """The upper part of an image that is still being generated."""

    image: PILImage.Image
    """As wide as the complete image, and as high as the rows of codes decoded so far."""
    rows: int
    """Rows of codes decoded."""


class StreamDecoder:
    """Decodes the tokens of one request as they arrive."""

    def __init__(self, tokenizer: MixedTokenizer, preview_every_n_rows: int = 0) -> None:
        """preview_every_n_rows: yield a `PartialImage` after each so many rows of codes; 0 yields complete images only."""
        self.tokenizer, self.preview_every_n_rows = tokenizer, preview_every_n_rows
        self.text_bytes = b""
        self.image_block: list[int] = []

    def completes_image(self, token_id: int) -> bool:
        """Return whether pushing this token decodes an image or a part of one, by the image tokenizer's network."""
        is_end = token_id == self.tokenizer.vocabulary.eoi
        return bool(self.image_block) and (is_end or self.is_preview(len(self.image_block)))

    def is_preview(self, num_codes: int) -> bool:
        v = self.tokenizer.vocabulary
        preview_length = self.preview_every_n_rows * v.grid[1]
        return bool(preview_length) and 0 < num_codes < v.codes_per_image and num_codes % preview_length == 0

    def push(self, token_id: int) -> Iterator[Part | PartialImage]:
        """Add a token and yield the parts that it completes."""
        v = self.tokenizer.vocabulary
        if self.image_block or token_id == v.boi:
            yield from self.flush_text()  # a character cannot continue after an image
            self.image_block.append(token_id)
            num_codes = len(self.image_block) - 1
            if token_id == v.eoi:
                yield from self.tokenizer.decode(self.image_block).parts
                self.image_block = []
            elif self.is_preview(num_codes):
                yield PartialImage(self.decode_upper_part(), num_codes // v.grid[1])
            return
        self.text_bytes += self.tokenizer.text_bytes([token_id])
        length = complete_utf8_length(self.text_bytes)
        if length:
            yield Text(self.text_bytes[:length].decode("utf-8", errors="replace"))
            self.text_bytes = self.text_bytes[length:]

    def finish(self) -> Iterator[Part]:
        """Yield what is left at the end: a truncated character or image."""
        yield from self.flush_text()
        if self.image_block:
            yield from self.tokenizer.decode(self.image_block).parts

    def flush_text(self) -> Iterator[Part]:
        if self.text_bytes:
            yield Text(self.text_bytes.decode("utf-8", errors="replace"))
            self.text_bytes = b""

    def decode_upper_part(self) -> PILImage.Image:
        """Decode the rows of codes so far, with the last one repeated down to the bottom, and crop the repeated part."""
        v = self.tokenizer.vocabulary
        rows = v.ids_to_codes(torch.tensor(self.image_block[1:])).view(-1, v.grid[1])
        codes = torch.cat((rows, rows[-1:].expand(v.grid[0] - len(rows), -1)))
        image = self.tokenizer.image.decode(codes.unsqueeze(0))[0]
        return image.crop((0, 0, image.width, image.height * len(rows) // v.grid[0]))


def complete_utf8_length(data: bytes) -> int:
    """Return how many leading bytes are complete UTF-8 characters, or can never become any."""
    for distance in range(1, min(4, len(data) + 1)):
        byte = data[-distance]
        if 0xC0 <= byte <= 0xF4:  # a lead byte, which tells the length of its character
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - distance if distance < length else len(data)
        if not 0x80 <= byte < 0xC0:
            break
    return len(data)
