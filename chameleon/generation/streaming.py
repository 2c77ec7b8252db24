"""Incremental decoding of tokens to parts that can be shown: complete characters, images, and partial images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.dialect import ImageCursor
from chameleon.document import Image, Part, Text
from chameleon.tokenizers.mixed import MixedTokenizer


@dataclass(frozen=True)
class PartialImage:
    """The upper part of an image that is still being generated."""

    image: PILImage.Image
    """As wide as the complete image, and as high as the rows of codes decoded so far."""
    rows: int
    """Rows of codes decoded."""
    size: tuple[int, int]
    """Width and height of the complete image."""

    def filled(self) -> PILImage.Image:
        """Return it in the size of the complete image, grey where nothing is drawn yet."""
        whole = PILImage.new("RGB", self.size, (128, 128, 128))
        whole.paste(self.image, (0, 0))
        return whole


@dataclass(frozen=True)
class CodeBlock:
    """The codes of an image, or of its upper rows, which the image tokenizer is yet to decode."""

    codes: Tensor
    """int64 [h, w]; of a partial image the last row is repeated down to the bottom."""
    rows: int
    """Rows of codes that are the image's own."""

    def show(self, image: PILImage.Image) -> Image | PartialImage:
        """Return the decoded image as a part; of a partial one, what its own rows show."""
        height = len(self.codes)
        if self.rows == height:
            return Image(image)
        upper = image.crop((0, 0, image.width, image.height * self.rows // height))
        return PartialImage(upper, self.rows, image.size)


class StreamDecoder:
    """Decodes the tokens of one request as they arrive."""

    def __init__(self, tokenizer: MixedTokenizer, preview_every_n_rows: int = 0, num_previews: int = 0) -> None:
        """preview_every_n_rows: yield a `PartialImage` after each so many rows of codes; 0 yields complete images only.

        num_previews: instead, so many of each image at most, evenly spaced.
        """
        self.tokenizer, self.preview_every_n_rows, self.num_previews = tokenizer, preview_every_n_rows, num_previews
        self.text_bytes = b""
        self.image_block: list[int] = []
        """Tokens of the image that is being generated, boi first."""
        self.cursor = ImageCursor(tokenizer.vocabulary.dialect)

    def push(self, token_id: int) -> Iterator[Part | PartialImage]:
        """Add a token and yield the parts that it completes."""
        for item in self.push_undecoded(token_id):
            if isinstance(item, CodeBlock):
                yield item.show(self.tokenizer.image.decode(item.codes.unsqueeze(0))[0])
            else:
                yield item

    def push_undecoded(self, token_id: int) -> Iterator[Part | CodeBlock]:
        """Like `push`, but leave the decoding of images to the caller."""
        v = self.tokenizer.vocabulary
        if self.image_block or token_id == v.boi:
            yield from self.flush_text()  # a character cannot continue after an image
            if token_id == v.boi:
                self.cursor = ImageCursor(v.dialect)
            else:
                self.cursor.push(token_id)
            self.image_block.append(token_id)
            if token_id == v.eoi:
                block, self.image_block = self.image_block, []
                image = v.read_image(block)
                if image is not None:
                    yield CodeBlock(v.image_codes(image), image.grid[0])
                else:
                    yield from self.tokenizer.decode(block).parts
            elif self.shows_preview(token_id) and (upper_rows := self.upper_rows()) is not None:
                yield upper_rows
            return
        if token_id in v.text_ids:  # anything else has no place outside of images
            self.text_bytes += self.tokenizer.text_bytes([token_id])
        length = complete_utf8_length(self.text_bytes)
        if length:
            yield Text(self.text_bytes[:length].decode("utf-8", errors="replace"))
            self.text_bytes = self.text_bytes[length:]

    def start_image(self, token_ids: Sequence[int]) -> None:
        """Begin inside an image whose tokens so far, boi first, are in the prompt; without any, outside of one."""
        self.image_block, self.cursor = list(token_ids), ImageCursor(self.tokenizer.vocabulary.dialect)
        for token_id in token_ids[1:]:
            self.cursor.push(token_id)

    def shows_preview(self, token_id: int) -> bool:
        """Return whether a token completes the rows after which there is a preview."""
        cursor = self.cursor
        if cursor.grid is None or not cursor.is_valid or not cursor.codes_left:
            return False
        height, width = cursor.grid
        rows, column = divmod(cursor.num_codes, width)
        if column or not rows or token_id not in self.tokenizer.vocabulary.image_ids:
            return False
        if self.num_previews:
            return rows in {height * (index + 1) // (self.num_previews + 1) for index in range(self.num_previews)}
        return self.preview_every_n_rows > 0 and rows % self.preview_every_n_rows == 0

    def finish(self) -> Iterator[Part]:
        """Yield what is left at the end: a truncated character or image."""
        yield from self.flush_text()
        if self.image_block:
            yield from self.tokenizer.decode(self.image_block).parts

    def flush_text(self) -> Iterator[Part]:
        if self.text_bytes:
            yield Text(self.text_bytes.decode("utf-8", errors="replace"))
            self.text_bytes = b""

    def upper_rows(self) -> CodeBlock | None:
        """Return the rows of codes so far, with the last one repeated down to the bottom.

        None where another token stands in the place of a code: such an image is never whole.
        """
        v, grid = self.tokenizer.vocabulary, self.cursor.grid
        assert grid is not None
        codes = [token_id for token_id in self.image_block[-self.cursor.position :] if token_id in v.image_ids]
        if len(codes) != self.cursor.num_codes:
            return None
        rows = v.ids_to_codes(torch.tensor(codes)).view(-1, grid[1])
        return CodeBlock(torch.cat((rows, rows[-1:].expand(grid[0] - len(rows), -1))), len(rows))


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
