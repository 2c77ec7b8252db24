"""Documents and conversations ↔ ids of the one vocabulary.

A document is `bos parts… eos`; a picture is `boi`, its codes, `eoi`. A conversation is `bos prompt sep answer eos`, and
each further turn `prompt sep answer eos`: where the loss lies follows from the ids alone (`answer_mask`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.document import Conversation, Document, Image, Part, Text
from chameleon.errors import BadInput
from chameleon.tokenizers.image import (
    Fit,
    ImageTokenizer,
    describe,
    fit_square,
    load_picture,
    picture_bytes,
    picture_hash,
)
from chameleon.tokenizers.json_text import JsonTextTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer, TextTokenizer
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import Vocabulary

Content = Document | Conversation


def answer_mask(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Which ids of one sequence, int64 [T], belong to answers: from behind `sep` up to and with `eos`. bool [T]."""
    is_sep, is_eos = ids == vocabulary.sep, ids == vocabulary.eos
    return (np.cumsum(is_sep) > np.cumsum(is_eos) - is_eos) & ~is_sep  # eos itself is still answer


@dataclass
class Turn:
    """What stands before and, in a conversation, after `sep`. A document has no answer."""

    prompt: list[Part]
    answer: list[Part] | None


def turns_of(content: Content) -> list[Turn]:
    """A document as one turn without an answer; a conversation as its pairs of prompt and answer.

    Raises `BadInput` for a conversation that does not end with an answer.
    """
    if isinstance(content, Document):
        return [Turn(list(content.parts), None)]
    turns: list[Turn] = []
    prompt: list[Part] = []
    for message in content.messages:
        if message.role == "assistant":
            turns.append(Turn(prompt, list(message.content.parts)))
            prompt = []
        else:
            prompt += message.content.parts
    if not turns or prompt:
        raise BadInput("the last message is no assistant's, so there is nothing to learn from it", where="conversation")
    return turns


def merged(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts with neighbouring texts joined, so that cutting a text in two does not change its ids."""
    text = ""
    for part in parts:
        if isinstance(part, Text):
            text += part.text
            continue
        if text:
            yield Text(text)
            text = ""
        yield part
    if text:
        yield Text(text)


def load_text_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer of a bundle's folder, whichever kind it is. Raises `BadInput` where there is none."""
    kinds: tuple[type[TextTokenizer], ...] = (SentencePieceTokenizer, JsonTextTokenizer)
    for kind in kinds:
        if (folder / kind.FILE).is_file():
            return kind.load(folder)
    raise BadInput(f"no {' or '.join(kind.FILE for kind in kinds)}", where=folder)


def check_fit(vocabulary: Vocabulary, text: TextTokenizer, image: VQGANConfig, where: object) -> None:
    """Raises `BadInput` where the three do not fit together."""
    for name, wanted, found in (
        ("text pieces", vocabulary.text_count, len(text)),
        ("image codes", vocabulary.image_count, image.codebook_size),
        ("codes a picture", vocabulary.grid, image.grid),
    ):
        if wanted != found:
            raise BadInput(f"vocabulary says {wanted} {name}, the tokenizers have {found}", where=where)


OPEN = -1
"""Stands in prepared ids where an image code belongs."""
View = Callable[[PILImage.Image, int, int], PILImage.Image]
"""What variant `v` shows of picture `n` of a document, as a function of (picture, n, v)."""


@dataclass
class Prepared:
    """A document all but its image codes: what any process can make of it without the image tokenizer's network."""

    ids: np.ndarray
    """int64 [T], `OPEN` where an image code belongs."""
    squares: list[np.ndarray]
    """Pictures uint8 [R, R, 3]: all of the first variant, then all of the second, and so on."""
    hashes: list[bytes]
    """`picture_hash` of each picture."""
    variants: int = 1


@dataclass
class Preparer:
    """Documents to ids with open places for the image codes, and pictures to squares."""

    text: TextTokenizer
    vocabulary: Vocabulary
    resolution: int

    def prepare(self, content: Content, view: View | None = None, variants: int = 1) -> Prepared:
        """A document or conversation as ids, in `variants` views of its pictures.

        Pictures in prompts of conversations are bordered so that nothing is lost, all others cropped (RECIPE 3). Raises
        `BadInput` for a picture or a text that cannot be used.
        """
        v, ids = self.vocabulary, [self.vocabulary.bos]
        pictures: list[tuple[Fit, Image]] = []
        prompt_fit: Fit = "pad" if isinstance(content, Conversation) else "crop"
        for turn in turns_of(content):
            ids += self.part_ids(turn.prompt, prompt_fit, pictures)
            if turn.answer is not None:
                ids += [v.sep, *self.part_ids(turn.answer, "crop", pictures)]
            ids.append(v.eos)
        return self.with_squares(ids, pictures, view, variants)

    def prepare_prompt(self, document: Document, *, conversation: bool) -> Prepared:
        """A prompt that is to be continued."""
        pictures: list[tuple[Fit, Image]] = []
        ids = [self.vocabulary.bos, *self.part_ids(document.parts, "pad" if conversation else "crop", pictures)]
        return self.with_squares(ids + [self.vocabulary.sep] * conversation, pictures, None, 1)

    def part_ids(self, parts: Sequence[Part], fit: Fit, pictures: list[tuple[Fit, Image]]) -> list[int]:
        """Ids of parts; each picture is added to `pictures` with how it is to be fitted."""
        v, ids = self.vocabulary, []
        for part in merged(parts):
            if isinstance(part, Text):
                ids += self.text_to_ids(part.text)
            else:
                ids += [v.boi, *[OPEN] * v.image_length, v.eoi]
                pictures.append((fit, part))
        return ids

    def text_to_ids(self, text: str) -> list[int]:
        """Ids of a text alone. Raises `BadInput` where the tokenizer does."""
        return list(map(self.vocabulary.text_ids.order.__getitem__, self.text.encode(text)))

    def with_squares(
        self, ids: list[int], pictures: Sequence[tuple[Fit, Image]], view: View | None, variants: int
    ) -> Prepared:
        squares: list[list[np.ndarray]] = [[] for _ in range(variants)]
        hashes = []
        for number, (fit, part) in enumerate(pictures):
            try:
                data = picture_bytes(part.image)
                whole = load_picture(data, describe(part.image))
            except BadInput as error:
                if len(pictures) == 1:
                    raise
                raise BadInput(f"picture {number + 1}: {error.reason}", where=describe(part.image)) from None
            hashes.append(picture_hash(data))
            for variant in range(variants):
                shown = view(whole, number, variant) if view is not None else whole
                squares[variant].append(np.asarray(fit_square(shown, self.resolution, fit)))
        return Prepared(np.array(ids, dtype=np.int64), [one for some in squares for one in some], hashes, variants)


class MixedTokenizer:
    """Both tokenizers behind one vocabulary."""

    def __init__(
        self,
        text: TextTokenizer,
        image: ImageTokenizer,
        vocabulary: Vocabulary | None = None,
        *,
        where: object = "tokenizers",
    ) -> None:
        """Raises `BadInput` where the three do not fit together. `vocabulary`: left out, the text tokenizer's layout."""
        self.text, self.image = text, image
        self.vocabulary = vocabulary or text.vocabulary(image.config.codebook_size, image.config.grid)
        check_fit(self.vocabulary, text, image.config, where)

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary | None = None, device: str | torch.device = "cpu") -> MixedTokenizer:
        """Reads both tokenizers of a bundle or of a folder of tokenizers."""
        return cls(load_text_tokenizer(folder), ImageTokenizer.load(folder, device), vocabulary, where=folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary and both tokenizers: shards made with others do not fit."""
        digest = hashlib.sha256(repr(sorted(self.vocabulary.to_json().items())).encode())
        digest.update(self.text.fingerprint.encode())
        digest.update(repr(sorted(self.image.config.to_json().items())).encode())
        # bfloat16 is how weights are shipped: the fingerprint must not change by saving and loading.
        for name, value in sorted(self.image.network.released_state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    # --- encoding ---

    def encode(self, content: Content) -> Tensor:
        """Ids int64 [T] of a document or conversation."""
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[Content]) -> list[Tensor]:
        """Ids of each; the pictures of all go through the image tokenizer together."""
        return [variants[0] for variants in self.finish([self.preparer.prepare(content) for content in contents])]

    def finish(self, prepared: Sequence[Prepared]) -> list[Tensor]:
        """Ids int64 [variants, T] of each prepared document; the pictures of all go through the network together."""
        squares = [square for entry in prepared for square in entry.squares]
        blocks = self.vocabulary.codes_to_ids(self.image.encode_squares(squares)).flatten(1)
        result, done = [], 0
        for entry in prepared:
            ids = torch.from_numpy(entry.ids).repeat(entry.variants, 1)
            count = len(entry.squares)
            ids[ids == OPEN] = blocks[done : done + count].flatten()
            done += count
            result.append(ids)
        return result

    @cached_property
    def preparer(self) -> Preparer:
        return Preparer(self.text, self.vocabulary, self.image.config.resolution)

    def encode_prompt(self, document: Document, *, conversation: bool) -> Tensor:
        """Ids [T] of a prompt to be continued: `bos parts`, and `sep` where the answer of a conversation is to come."""
        return self.finish([self.preparer.prepare_prompt(document, conversation=conversation)])[0][0]

    # --- decoding ---

    def decode(self, ids: Tensor | Sequence[int]) -> Document:
        """The document that ids [T] spell, whatever they are.

        A picture with too few or too many codes becomes a marker in the text and `complete` is False; stray structure
        is passed over.
        """
        values = torch.as_tensor(ids, dtype=torch.int64).tolist()
        v = self.vocabulary
        parts: list[Part] = []
        complete = True
        position = 0
        while position < len(values):
            start = position
            if values[position] == v.boi or values[position] in v.image_ids:
                opened = values[position] == v.boi
                position += opened
                first = position
                while position < len(values) and values[position] in v.image_ids:
                    position += 1
                codes = values[first:position]
                closed = position < len(values) and values[position] == v.eoi
                position += closed
                if len(codes) == v.image_length and opened:
                    grid = v.ids_to_codes(torch.tensor(codes)).view(1, *v.grid)
                    parts.append(Image(self.image.decode(grid)[0]))
                else:
                    parts.append(Text(f"[picture cut short: {len(codes)} of {v.image_length} codes]"))
                    complete = False
            elif values[position] in v.text_ids:
                while position < len(values) and values[position] in v.text_ids:
                    position += 1
                parts.append(Text(self.text_bytes(values[start:position]).decode("utf-8", errors="replace")))
            else:
                position += 1
        return Document(tuple(merged(parts)), complete=complete)

    # --- text ---

    def text_to_ids(self, text: str) -> list[int]:
        """Ids of a text alone. Raises `BadInput` where the tokenizer does."""
        return self.preparer.text_to_ids(text)

    def text_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of text ids; a character may be cut at either end."""
        return self.text.decode_bytes(self.vocabulary.text_ids.number[number] for number in ids)
