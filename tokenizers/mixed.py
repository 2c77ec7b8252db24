"""Documents and conversations ↔ token ids of the one vocabulary.

A document is `bos parts… eos`; an image is written as the vocabulary's dialect says. A conversation is `bos prompt sep
answer eos`, followed by `prompt sep answer eos` for each further turn, so the tokens of the answers follow from the token
ids alone (`answer_mask`). Where the vocabulary says so, an answer ends with `sep` instead (Lumina-mGPT).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.dialect import CODE, ShapeConfig, SquareDialect
from chameleon.document import Conversation, Document, Image, Part, Text
from chameleon.errors import BadInput, as_bad_input
from chameleon.files import atomic_update, read_json, write_json
from chameleon.tokenizers.fitting import CENTRE, CropPosition, Fit, PictureFitter
from chameleon.tokenizers.image import ImageFile, ImageTokenizer
from chameleon.tokenizers.json_text import JsonTextTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer, TextTokenizer
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import ImageBlock, Vocabulary

Content = Document | Conversation
TEXT_TOKENIZERS: tuple[type[TextTokenizer], ...] = (SentencePieceTokenizer, JsonTextTokenizer)
"""Kinds of text tokenizers, told apart by the file that a bundle has."""
SHAPES_FILE = "shapes.json"
"""In a folder of tokenizers: the shapes of images, where they are not all squares. A bundle's vocabulary tells them."""


def answer_mask(token_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return which token ids int64 [T] of a document belong to answers, the token that ends each included: bool [T]."""
    is_sep, is_eos = token_ids == vocabulary.sep, token_ids == vocabulary.eos
    if vocabulary.answer_end == vocabulary.sep:  # question sep answer sep …
        return (np.cumsum(is_sep) - is_sep) % 2 == 1
    return (np.cumsum(is_sep) > np.cumsum(is_eos) - is_eos) & ~is_sep  # eos itself still belongs to the answer


@dataclass
class Turn:
    """The parts before and, in a conversation, after `sep`. A document is one turn without an answer."""

    prompt: list[Part]
    answer: list[Part] | None


def split_turns(content: Content) -> list[Turn]:
    """Return a document as one turn without an answer, or a conversation as its pairs of prompt and answer.

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
        raise BadInput("the last message is not the assistant's, so there is no answer to train on", where="conversation")
    return turns


def merge_texts(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the parts with neighbouring texts concatenated, so that splitting a text does not change its token ids."""
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


def read_shapes(folder: Path) -> ShapeConfig | None:
    """Read the shapes of images that a folder of tokenizers states; None where all are squares of one size."""
    path = folder / SHAPES_FILE
    if not path.is_file():
        return None
    with as_bad_input("shapes of images", path):
        shapes = ShapeConfig(**read_json(path))
    return shapes


def write_shapes(folder: Path, shapes: ShapeConfig | None) -> None:
    """Write the shapes of images to a folder of tokenizers, or remove those of an earlier run."""
    if shapes is None:
        (folder / SHAPES_FILE).unlink(missing_ok=True)
        return
    with atomic_update(folder) as partial:
        write_json(partial / SHAPES_FILE, asdict(shapes))


def load_text_tokenizer(folder: Path) -> TextTokenizer:
    """Load the text tokenizer in a folder, whichever kind it is. Raise `BadInput` where there is none."""
    for kind in TEXT_TOKENIZERS:
        if (folder / kind.FILE).is_file():
            return kind.load(folder)
    raise BadInput(f"no {' or '.join(kind.FILE for kind in TEXT_TOKENIZERS)}", where=folder)


def check_compatible(vocabulary: Vocabulary, text: TextTokenizer, image: VQGANConfig, where: object) -> None:
    """Raise `BadInput` where the vocabulary does not have the sizes of the tokenizers."""
    is_square = isinstance(vocabulary.dialect, SquareDialect)
    for name, expected, actual in (
        ("text pieces", vocabulary.num_text_pieces, len(text)),
        ("image codes", vocabulary.num_image_codes, image.codebook_size),
        ("codes per image", vocabulary.grid, image.grid if is_square else vocabulary.grid),
    ):
        if expected != actual:
            raise BadInput(f"vocabulary has {expected} {name}, the tokenizers have {actual}", where=where)


class View(NamedTuple):
    """What a document shows of a picture."""

    picture: PILImage.Image
    position: CropPosition = CENTRE
    """Where it is cropped, if its shape is not that of an image."""


ViewFunction = Callable[[PILImage.Image, int, int], View]
"""(picture, its index in the document, variant) → the augmented view of the picture in that variant."""


@dataclass
class PreparedDocument:
    """A document as token ids without its image codes: all that can be done without the image tokenizer's network."""

    token_ids: np.ndarray
    """int64 [T], `CODE` in place of image codes."""
    pictures: list[np.ndarray]
    """Pictures uint8 [H, W, 3]: all of the first variant, then all of the second, and so on."""
    hashes: list[bytes]
    """`ImageFile.hash` of each picture."""
    num_variants: int = 1


class ImageSlot(NamedTuple):
    """An image among the token ids of a document."""

    part: Image
    fit: Fit


@dataclass
class DocumentPreparer:
    """Converts documents to token ids with `CODE` for image codes, and their pictures to arrays of the sizes of images."""

    text: TextTokenizer
    vocabulary: Vocabulary
    fitter: PictureFitter

    def prepare(
        self,
        content: Content,
        view: ViewFunction | None = None,
        num_variants: int = 1,
        images: Sequence[ImageFile] | None = None,
    ) -> PreparedDocument:
        """Prepare a document or conversation, in `num_variants` views of its pictures.

        In the square dialect pictures in prompts of conversations are padded so that nothing is cut off, all others cropped
        (arXiv 2405.09818, section 3.2). images: the content's images in order, where they have been opened already. Raises
        `BadInput` for a picture or text that cannot be used.
        """
        v = self.vocabulary
        prompt_fit: Fit = "pad" if isinstance(content, Conversation) else "crop"
        pieces: list[list[int] | ImageSlot] = [[v.bos]]
        for turn in split_turns(content):
            pieces += self.encode_parts(turn.prompt, prompt_fit)
            if turn.answer is None:
                pieces.append([v.eos])
            else:
                pieces += [[v.sep], *self.encode_parts(turn.answer, "crop"), [v.answer_end]]
        return self.add_pictures(pieces, view, num_variants, images)

    def prepare_prompt(self, document: Document, *, conversation: bool) -> PreparedDocument:
        """Prepare a prompt to be continued."""
        pieces = [[self.vocabulary.bos], *self.encode_parts(document.parts, "pad" if conversation else "crop")]
        return self.add_pictures([*pieces, [self.vocabulary.sep] * conversation])

    def encode_parts(self, parts: Sequence[Part], fit: Fit) -> list[list[int] | ImageSlot]:
        """Return the token ids of texts, and the slots of images, in order."""
        return [
            self.text_to_ids(part.text) if isinstance(part, Text) else ImageSlot(part, fit) for part in merge_texts(parts)
        ]

    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text. Raise `BadInput` where the text tokenizer does."""
        return list(map(self.vocabulary.text_ids.order.__getitem__, self.text.encode(text)))

    def add_pictures(
        self,
        pieces: Sequence[list[int] | ImageSlot],
        view: ViewFunction | None = None,
        num_variants: int = 1,
        images: Sequence[ImageFile] | None = None,
    ) -> PreparedDocument:
        slots = [piece for piece in pieces if isinstance(piece, ImageSlot)]
        images = images or [ImageFile(slot.part.image) for slot in slots]
        variants: list[list[np.ndarray]] = [[] for _ in range(num_variants)]
        blocks: list[list[int]] = []
        for index, (slot, image) in enumerate(zip(slots, images, strict=True)):
            try:
                picture = image.rgb
            except BadInput as error:
                if len(slots) == 1:
                    raise
                raise BadInput(f"picture {index + 1}: {error.reason}", where=image.where) from None
            grid = self.fitter.grid_for(picture.size)
            blocks.append(self.vocabulary.image_block(grid))
            for variant, pictures in enumerate(variants):
                shown = view(picture, index, variant) if view is not None else View(picture)
                pictures.append(self.fitter.fit(shown.picture, slot.fit, grid, shown.position))
        remaining = iter(blocks)
        token_ids = [
            token_id for piece in pieces for token_id in (next(remaining) if isinstance(piece, ImageSlot) else piece)
        ]
        return PreparedDocument(
            np.array(token_ids, dtype=np.int64),
            [picture for pictures in variants for picture in pictures],
            [image.hash for image in images],
            num_variants,
        )


class MixedTokenizer:
    """Text and image tokenizer behind one vocabulary."""

    def __init__(
        self,
        text: TextTokenizer,
        image: ImageTokenizer,
        vocabulary: Vocabulary | None = None,
        *,
        shapes: ShapeConfig | None = None,
        where: object = "tokenizers",
    ) -> None:
        """vocabulary: by default the text tokenizer's layout, where `shapes` are those of images, or all are squares.

        Raises `BadInput` where the sizes do not match.
        """
        self.text, self.image = text, image
        self.vocabulary = vocabulary or text.vocabulary(image.config.codebook_size, image.config.grid, shapes=shapes)
        check_compatible(self.vocabulary, text, image.config, where)

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary | None = None, device: str | torch.device = "cpu") -> MixedTokenizer:
        """Load both tokenizers of a bundle or of a folder of tokenizers."""
        text, image = load_text_tokenizer(folder), ImageTokenizer.load(folder, device)
        return cls(text, image, vocabulary, shapes=read_shapes(folder), where=folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary and both tokenizers: token shards of other tokenizers do not fit."""
        digest = hashlib.sha256(repr(sorted(self.vocabulary.to_json().items())).encode())
        digest.update(self.text.fingerprint.encode())
        digest.update(repr(sorted(self.image.config.to_json().items())).encode())
        # In bfloat16, as weights are shipped: saving and loading must not change the fingerprint.
        for name, value in sorted(self.image.network.released_state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    # --- encoding ---

    def encode(self, content: Content) -> Tensor:
        """Return the token ids int64 [T] of a document or conversation."""
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[Content]) -> list[Tensor]:
        """Return the token ids of each; the pictures of all go through the image tokenizer together."""
        prepared = [self.preparer.prepare(content) for content in contents]
        return [variants[0] for variants in self.insert_image_codes(prepared)]

    def insert_image_codes(self, prepared: Sequence[PreparedDocument]) -> list[Tensor]:
        """Return token ids int64 [variants, T] of each prepared document; pictures are encoded in batches."""
        codes = self.image.encode_arrays([picture for document in prepared for picture in document.pictures])
        flat = torch.cat([torch.empty(0, dtype=torch.int64), *(image_codes.flatten() for image_codes in codes)])
        code_ids, result = self.vocabulary.codes_to_ids(flat), []
        for document in prepared:
            token_ids = torch.from_numpy(document.token_ids).repeat(document.num_variants, 1)
            is_code = token_ids == CODE
            count = int(is_code.sum())
            token_ids[is_code], code_ids = code_ids[:count], code_ids[count:]
            result.append(token_ids)
        return result

    @cached_property
    def preparer(self) -> DocumentPreparer:
        return DocumentPreparer(self.text, self.vocabulary, self.fitter)

    @cached_property
    def fitter(self) -> PictureFitter:
        """Fits pictures to the sizes of images."""
        return PictureFitter(self.vocabulary.dialect, self.image.config.reduction)

    # --- decoding ---

    def decode(self, token_ids: Tensor | Sequence[int]) -> Document:
        """Return the document that token ids [T] stand for, whatever they are.

        An image that is not whole and valid becomes a marker in the text, and `complete` is False; misplaced special tokens
        are ignored.
        """
        values = torch.as_tensor(token_ids, dtype=torch.int64).tolist()
        v = self.vocabulary
        parts: list[Part] = []
        codes: list[Tensor] = []
        images: list[int] = []
        complete = True
        position = 0
        while position < len(values):
            start = position
            if (block := v.read_image(values, start)) is not None:
                images.append(len(parts))
                codes.append(v.image_codes(block))
                parts.append(Text(""))
                position += block.length
            elif values[start] == v.boi or values[start] in v.image_ids:
                position = self.end_of_image(values, start)
                if (block := self.with_all_codes(values[start:position])) is not None:
                    images.append(len(parts))
                    codes.append(v.image_codes(block))
                    parts.append(Text(""))
                    continue
                parts.append(Text(self.truncation_marker(values[start:position])))
                complete = False
            elif values[position] in v.text_ids:
                while position < len(values) and values[position] in v.text_ids:
                    position += 1
                parts.append(Text(self.text_bytes(values[start:position]).decode("utf-8", errors="replace")))
            else:
                position += 1
        for index, picture in zip(images, self.image.decode_all(codes), strict=True):
            parts[index] = Image(picture)
        return Document(tuple(merge_texts(parts)), complete=complete)

    def end_of_image(self, values: Sequence[int], start: int) -> int:
        """Return where an image that is not whole ends: after the tokens that only images have, and eoi."""
        v = self.vocabulary
        inside = set(v.dialect.specials.values())
        position = start + 1
        while position < len(values) and (values[position] in v.image_ids or values[position] in inside):
            position += 1
        return position + (position < len(values) and values[position] == v.eoi)

    def with_all_codes(self, values: Sequence[int]) -> ImageBlock | None:
        """Return the image of which only the tokens after its last code are missing; None for any other."""
        v = self.vocabulary
        ends = [[v.eoi], *([] if v.dialect.row_end is None else [[v.dialect.row_end, v.eoi]])]
        return next((block for end in ends if (block := v.read_image([*values, *end])) is not None), None)

    def truncation_marker(self, values: Sequence[int]) -> str:
        """Return what a document shows in place of an image that is not whole."""
        v = self.vocabulary
        num_codes = sum(token_id in v.image_ids for token_id in values)
        first = int(values[0] == v.boi)
        grid = v.dialect.grid_of_header(tuple(values[first : first + v.dialect.header_length]))
        return f"[truncated image: {num_codes} of {'?' if grid is None else grid[0] * grid[1]} codes]"

    # --- text ---

    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text. Raise `BadInput` where the text tokenizer does."""
        return self.preparer.text_to_ids(text)

    def text_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Return the UTF-8 bytes of text tokens; characters may be incomplete at either end."""
        return self.text.decode_bytes(self.vocabulary.text_ids.index_of[token_id] for token_id in token_ids)
