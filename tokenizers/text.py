"""Text ↔ pieces numbered from 0: the interface of text tokenizers, and the project's own, sentencepiece BPE.

It round-trips every string exactly: no normalisation, no dummy prefix, all white space kept, byte fallback for whatever the
vocabulary lacks. Special tokens and image codes are not part of a text tokenizer, so no text can spell them.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import sentencepiece

from chameleon.dialect import Grid, ShapeConfig
from chameleon.errors import BadInput, as_bad_input
from chameleon.files import atomic_update
from chameleon.vocabulary import Vocabulary

SPACE = "\u2581"
BYTE_PIECES = 256
USER_DEFINED_PIECES = ("\t",)
"""Pieces that are split off a text before BPE merges: sentencepiece's trainer uses the tab as a boundary mark."""
CHUNK_BYTES = 2048
"""Length of training sentences; sentencepiece drops those over 4192 bytes."""
# The trainer drops a whole sentence for its boundary mark (tab), its mark of unknown characters, NUL, and its space mark.
TRAINER_RESERVED = re.compile("[\t\x00\u2585\u2581]+")


def training_chunks(text: str) -> Iterator[str]:
    """Yield the text in chunks of at most `CHUNK_BYTES` bytes, split after newlines where possible."""
    for run in TRAINER_RESERVED.split(text):
        start = 0
        while start < len(run):
            is_ascii = run[start : start + CHUNK_BYTES].isascii()
            end = start + (CHUNK_BYTES if is_ascii else CHUNK_BYTES // 4)
            if end < len(run):
                newline = run.rfind("\n", start, end)
                end = newline + 1 if newline > start else end
            yield run[start:end]
            start = end


def reservoir_sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """Return a uniform sample of at most `size` items in one pass (Vitter's algorithm R)."""
    rng, sample = random.Random(seed), []
    for index, item in enumerate(items):
        if index < size:
            sample.append(item)
        else:
            replaced = rng.randrange(index + 1)
            if replaced < size:
                sample[replaced] = item
    return sample


def split_at_rare_characters(sample: Sequence[str], num_characters: int) -> list[str]:
    """Split the sample at every character that is not among its `num_characters` most common ones.

    Rare characters (a script of thousands of them) are left to byte fallback, so that they cannot fill a small vocabulary.
    """
    counts = Counter(character for part in sample for character in part)
    rare = "".join(re.escape(character) for character, _ in counts.most_common()[num_characters:])
    if not rare:
        return list(sample)
    return [run for part in sample for run in re.split(f"[{rare}]+", part) if run]


class TextTokenizer(ABC):
    """Strings ↔ pieces numbered from 0. A subclass is listed in `chameleon.tokenizers.mixed.TEXT_TOKENIZERS`."""

    FILE: ClassVar[str]
    """Name of its file in a bundle."""
    data: bytes
    """Contents of that file."""
    bytes_of: list[bytes]
    """The UTF-8 bytes of each piece."""
    escaped_space: list[int]
    """Byte pieces that spell `SPACE`, where the tokenizer uses that character for a space; else empty."""

    @abstractmethod
    def __init__(self, data: bytes) -> None: ...

    def __len__(self) -> int:
        return len(self.bytes_of)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @abstractmethod
    def vocabulary(
        self, image_codes: int, grid: Grid, size: int | None = None, *, shapes: ShapeConfig | None = None
    ) -> Vocabulary:
        """Return the vocabulary of this tokenizer, for images of `grid` codes and a model with `size` or more ids.

        shapes: those of images, where they are not all of one grid.
        """

    @abstractmethod
    def encode_run(self, run: str) -> list[int]:
        """Return the pieces of a text that contains no `SPACE` where that has to be escaped."""

    def encode(self, text: str) -> list[int]:
        """Return the pieces of a text. Raise `BadInput` for lone surrogates, which UTF-8 cannot encode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"lone surrogate at character {error.start}", where="text") from None
        if not self.escaped_space:
            return self.encode_run(text)
        pieces: list[int] = []
        for index, run in enumerate(text.split(SPACE)):
            if index:
                pieces += self.escaped_space
            if run:
                pieces += self.encode_run(run)
        return pieces

    def decode_bytes(self, pieces: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of pieces; characters may be incomplete at either end."""
        return b"".join(map(self.bytes_of.__getitem__, pieces))

    def decode(self, pieces: Iterable[int]) -> str:
        """Return the text of pieces; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(pieces).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write `FILE` to the folder. Raise `BadInput` where that fails; the folder is then unchanged."""
        with atomic_update(folder) as partial:
            (partial / self.FILE).write_bytes(self.data)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. Raise `BadInput` where the file is missing or damaged."""
        with as_bad_input("a text tokenizer", folder / cls.FILE):
            try:
                tokenizer = cls((folder / cls.FILE).read_bytes())
            except FileNotFoundError:
                raise BadInput("file is missing") from None
        return tokenizer


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model, which stores a space as `▁` (U+2581); a `▁` in the text is encoded as bytes."""

    FILE = "text_tokenizer.model"

    def __init__(self, data: bytes) -> None:
        """`data`: a sentencepiece model as `fit` trains it. Raises `BadInput` for anything else."""
        self.data = data
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise BadInput(f"not a sentencepiece model ({error})", where=self.FILE) from None
        self.bytes_of = [self.piece_bytes(piece) for piece in range(self.processor.GetPieceSize())]
        self.escaped_space = [self.processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(self.processor.IsByte(piece) for piece in self.escaped_space):
            raise BadInput("the model has no byte pieces", where=self.FILE, remedy="train it with `chameleon fit-text`")

    def piece_bytes(self, piece: int) -> bytes:
        """Return the UTF-8 bytes of a piece."""
        if self.processor.IsControl(piece) or self.processor.IsUnknown(piece):
            return b""
        name = self.processor.IdToPiece(piece)
        return bytes([int(name[3:5], 16)]) if self.processor.IsByte(piece) else name.replace(SPACE, " ").encode()

    def vocabulary(
        self, image_codes: int, grid: Grid, size: int | None = None, *, shapes: ShapeConfig | None = None
    ) -> Vocabulary:
        return Vocabulary.build(image_codes=image_codes, text_pieces=len(self), grid=grid, shapes=shapes)

    def encode_run(self, run: str) -> list[int]:
        return list(self.processor.EncodeAsIds(run))

    @classmethod
    def fit(
        cls, texts: Iterable[str], num_pieces: int, *, sample_bytes: int = 64 << 20, seed: int = 0
    ) -> SentencePieceTokenizer:
        """Train a BPE of `num_pieces` pieces, bytes and the unused piece 0 included, on a reservoir sample of the texts.

        Memory is a small multiple of `sample_bytes`, however many texts there are. Raises `BadInput` where there is no
        text, or too little for that many pieces.
        """
        chunks = (chunk for text in texts for chunk in training_chunks(text))
        sample = reservoir_sample(chunks, max(1, sample_bytes // CHUNK_BYTES), seed)
        if not any(part.strip() for part in sample):
            raise BadInput("no text to train on", where="text tokenizer")
        if num_pieces < BYTE_PIECES + 2:
            raise BadInput(
                f"{num_pieces} pieces leave no room beside the 256 bytes", where="text tokenizer", remedy="ask for more"
            )
        # A quarter of the pieces, or an alphabet where that is more, are single characters.
        num_characters = min(num_pieces - BYTE_PIECES - 2, max(64, (num_pieces - BYTE_PIECES) // 4))
        output = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(split_at_rare_characters(sample, num_characters)),
                model_writer=output,
                model_type="bpe",
                vocab_size=num_pieces,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                character_coverage=1.0,  # rare characters have been removed already
                user_defined_symbols=list(USER_DEFINED_PIECES),
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise BadInput(
                f"cannot train {num_pieces} pieces on this text ({reason})", where="text tokenizer", remedy="ask for fewer"
            ) from None
        return cls(output.getvalue())
