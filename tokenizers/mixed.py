"""Documents and conversations ↔ token ids of the one vocabulary.

A document is `bos parts… eos`; an image is `boi`, its codes, `eoi`. A conversation is `bos prompt sep answer eos`, followed
by `prompt sep answer eos` for each further turn, so the tokens of the answers follow from the token ids alone
(`answer_mask`).
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
from chameleon.tokenizers.image import Fit, ImageFile, ImageTokenizer, fit_square
from chameleon.tokenizers.json_text import JsonTextTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer, TextTokenizer
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import Vocabulary

Content = Document | Conversation
TEXT_TOKENIZERS: tuple[type[TextTokenizer], ...] = (SentencePieceTokenizer, JsonTextTokenizer)
"""Kinds of text tokenizers, told apart by the file that a bundle has."""


def answer_mask(token_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return which token ids int64 [T] belong to answers, from after `sep` to `eos` inclusive: bool [T]."""
    is_sep, is_eos = token_ids == vocabulary.sep, token_ids == vocabulary.eos
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


def load_text_tokenizer(folder: Path) -> TextTokenizer:
    """Load the text tokenizer in a folder, whichever kind it is. Raise `BadInput` where there is none."""
    for kind in TEXT_TOKENIZERS:
        if (folder / kind.FILE).is_file():
            return kind.load(folder)
    raise BadInput(f"no {' or '.join(kind.FILE for kind in TEXT_TOKENIZERS)}", where=folder)


def check_compatible(vocabulary: Vocabulary, text: TextTokenizer, image: VQGANConfig, where: object) -> None:
    """Raise `BadInput` where the vocabulary does not have the sizes of the tokenizers."""
    for name, expected, actual in (
        ("text pieces", vocabulary.num_text_pieces, len(text)),
        ("image codes", vocabulary.num_image_codes, image.codebook_size),
        ("codes per image", vocabulary.grid, image.grid),
    ):
        if expected != actual:
            raise BadInput(f"vocabulary has {expected} {name}, the tokenizers have {actual}", where=where)


CODE_PLACEHOLDER = -1
"""Stands in prepared token ids where an image code is to be inserted."""
ViewFunction = Callable[[PILImage.Image, int, int], PILImage.Image]
"""(picture, its index in the document, variant) → the augmented view of the picture in that variant."""


@dataclass
class PreparedDocument:
    """A document as token ids without its image codes: all that can be done without the image tokenizer's network."""

    token_ids: np.ndarray
    """int64 [T], `CODE_PLACEHOLDER` in place of image codes."""
    pictures: list[np.ndarray]
    """Pictures uint8 [R, R, 3]: all of the first variant, then all of the second, and so on."""
    hashes: list[bytes]
    """`ImageFile.hash` of each picture."""
    num_variants: int = 1


@dataclass
class DocumentPreparer:
    """Converts documents to token ids with placeholders, and their pictures to arrays of the network's resolution."""

    text: TextTokenizer
    vocabulary: Vocabulary
    resolution: int

    def prepare(
        self,
        content: Content,
        view: ViewFunction | None = None,
        num_variants: int = 1,
        images: Sequence[ImageFile] | None = None,
    ) -> PreparedDocument:
        """Prepare a document or conversation, in `num_variants` views of its pictures.

        Pictures in prompts of conversations are padded so that nothing is cut off, all others cropped (arXiv 2405.09818,
        section 3.2). images: the content's images in order, where they have been opened already. Raises `BadInput` for a
        picture or text that cannot be used.
        """
        v, token_ids = self.vocabulary, [self.vocabulary.bos]
        parts: list[tuple[Fit, Image]] = []
        prompt_fit: Fit = "pad" if isinstance(content, Conversation) else "crop"
        for turn in split_turns(content):
            token_ids += self.encode_parts(turn.prompt, prompt_fit, parts)
            if turn.answer is not None:
                token_ids += [v.sep, *self.encode_parts(turn.answer, "crop", parts)]
            token_ids.append(v.eos)
        return self.add_pictures(token_ids, parts, view, num_variants, images)

    def prepare_prompt(self, document: Document, *, conversation: bool) -> PreparedDocument:
        """Prepare a prompt to be continued."""
        parts: list[tuple[Fit, Image]] = []
        fit: Fit = "pad" if conversation else "crop"
        token_ids = [self.vocabulary.bos, *self.encode_parts(document.parts, fit, parts)]
        return self.add_pictures(token_ids + [self.vocabulary.sep] * conversation, parts, None, 1, None)

    def encode_parts(self, parts: Sequence[Part], fit: Fit, images: list[tuple[Fit, Image]]) -> list[int]:
        """Return token ids of parts with placeholders; append each image, with how it is to be fitted, to `images`."""
        v, token_ids = self.vocabulary, []
        for part in merge_texts(parts):
            if isinstance(part, Text):
                token_ids += self.text_to_ids(part.text)
            else:
                token_ids += [v.boi, *[CODE_PLACEHOLDER] * v.codes_per_image, v.eoi]
                images.append((fit, part))
        return token_ids

    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text. Raise `BadInput` where the text tokenizer does."""
        return list(map(self.vocabulary.text_ids.order.__getitem__, self.text.encode(text)))

    def add_pictures(
        self,
        token_ids: list[int],
        parts: Sequence[tuple[Fit, Image]],
        view: ViewFunction | None,
        num_variants: int,
        images: Sequence[ImageFile] | None,
    ) -> PreparedDocument:
        images = images or [ImageFile(part.image) for _, part in parts]
        variants: list[list[np.ndarray]] = [[] for _ in range(num_variants)]
        for index, ((fit, _), image) in enumerate(zip(parts, images, strict=True)):
            try:
                picture = image.rgb
            except BadInput as error:
                if len(parts) == 1:
                    raise
                raise BadInput(f"picture {index + 1}: {error.reason}", where=image.where) from None
            for variant, pictures in enumerate(variants):
                shown = view(picture, index, variant) if view is not None else picture
                pictures.append(np.asarray(fit_square(shown, self.resolution, fit)))
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
        where: object = "tokenizers",
    ) -> None:
        """vocabulary: by default the text tokenizer's layout. Raises `BadInput` where the sizes do not match."""
        self.text, self.image = text, image
        self.vocabulary = vocabulary or text.vocabulary(image.config.codebook_size, image.config.grid)
        check_compatible(self.vocabulary, text, image.config, where)

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary | None = None, device: str | torch.device = "cpu") -> MixedTokenizer:
        """Load both tokenizers of a bundle or of a folder of tokenizers."""
        return cls(load_text_tokenizer(folder), ImageTokenizer.load(folder, device), vocabulary, where=folder)

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
        pictures = [picture for document in prepared for picture in document.pictures]
        code_ids = self.vocabulary.codes_to_ids(self.image.encode_arrays(pictures)).flatten(1)
        result, first = [], 0
        for document in prepared:
            token_ids = torch.from_numpy(document.token_ids).repeat(document.num_variants, 1)
            end = first + len(document.pictures)
            token_ids[token_ids == CODE_PLACEHOLDER] = code_ids[first:end].flatten()
            first = end
            result.append(token_ids)
        return result

    @cached_property
    def preparer(self) -> DocumentPreparer:
        return DocumentPreparer(self.text, self.vocabulary, self.image.config.resolution)

    # --- decoding ---

    def decode(self, token_ids: Tensor | Sequence[int]) -> Document:
        """Return the document that token ids [T] stand for, whatever they are.

        An image with too few or too many codes becomes a marker in the text, and `complete` is False; misplaced special
        tokens are ignored.
        """
        values = torch.as_tensor(token_ids, dtype=torch.int64).tolist()
        v = self.vocabulary
        parts: list[Part] = []
        complete = True
        position = 0
        while position < len(values):
            start = position
            if values[position] == v.boi or values[position] in v.image_ids:
                has_boi = values[position] == v.boi
                position += has_boi
                first_code = position
                while position < len(values) and values[position] in v.image_ids:
                    position += 1
                codes = values[first_code:position]
                position += position < len(values) and values[position] == v.eoi
                if len(codes) == v.codes_per_image and has_boi:
                    grid = v.ids_to_codes(torch.tensor(codes)).view(1, *v.grid)
                    parts.append(Image(self.image.decode(grid)[0]))
                else:
                    parts.append(Text(f"[truncated image: {len(codes)} of {v.codes_per_image} codes]"))
                    complete = False
            elif values[position] in v.text_ids:
                while position < len(values) and values[position] in v.text_ids:
                    position += 1
                parts.append(Text(self.text_bytes(values[start:position]).decode("utf-8", errors="replace")))
            else:
                position += 1
        return Document(tuple(merge_texts(parts)), complete=complete)

    # --- text ---

    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text. Raise `BadInput` where the text tokenizer does."""
        return self.preparer.text_to_ids(text)

    def text_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Return the UTF-8 bytes of text tokens; characters may be incomplete at either end."""
        return self.text.decode_bytes(self.vocabulary.text_ids.index_of[token_id] for token_id in token_ids)
