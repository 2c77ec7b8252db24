"""Text ↔ pieces numbered from 0: what every text tokenizer can do, and our own, sentencepiece BPE.

Ours gives every string back exactly: no normalisation, no dummy prefix, all white space kept, bytes for whatever the
vocabulary lacks. Specials and image ids live outside a text tokenizer, so no text can spell them.
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

from chameleon.errors import BadInput, reading
from chameleon.files import written_into
from chameleon.vocabulary import Vocabulary

SPACE = "\u2581"
BYTE_PIECES = 256
CUT_OUT = ("\t",)
"""Pieces that are cut out of a text before anything is merged: the trainer's own sign for a boundary."""
CHUNK_BYTES = 2048  # sentencepiece drops sentences over 4192 bytes
# What the trainer would drop a whole sentence for: its boundary sign (tab), its unknown sign, NUL, and its space sign.
RESERVED = re.compile("[\t\x00\u2585\u2581]+")


def chunks(text: str) -> Iterator[str]:
    """The text in pieces of at most `CHUNK_BYTES` bytes, cut behind newlines where there are any."""
    for run in RESERVED.split(text):
        start = 0
        while start < len(run):
            is_ascii = run[start : start + CHUNK_BYTES].isascii()
            end = start + (CHUNK_BYTES if is_ascii else CHUNK_BYTES // 4)
            if end < len(run):
                newline = run.rfind("\n", start, end)
                end = newline + 1 if newline > start else end
            yield run[start:end]
            start = end


def reservoir(items: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample of at most `size` items in one pass (Vitter's algorithm R)."""
    stream, kept = random.Random(seed), []
    for number, item in enumerate(items):
        if number < size:
            kept.append(item)
        else:
            place = stream.randrange(number + 1)
            if place < size:
                kept[place] = item
    return kept


def without_rare(sample: Sequence[str], characters: int) -> list[str]:
    """The sample cut at every character that is not among its `characters` commonest.

    Rare characters (a script of thousands of signs) are left to the bytes, so that they cannot fill a small vocabulary.
    """
    counts = Counter(character for part in sample for character in part)
    rare = "".join(re.escape(character) for character, _ in counts.most_common()[characters:])
    if not rare:
        return list(sample)
    return [run for part in sample for run in re.split(f"[{rare}]+", part) if run]


class TextTokenizer(ABC):
    """Strings ↔ pieces numbered from 0."""

    FILE: ClassVar[str]
    """The file it lies in within a bundle."""
    data: bytes
    """What that file holds."""
    bytes_of: list[bytes]
    """The UTF-8 bytes of each piece."""
    escaped_space: list[int]
    """Pieces of the bytes of `SPACE`, where that character stands for a space inside the tokenizer; else none."""

    @abstractmethod
    def __init__(self, data: bytes) -> None: ...

    def __len__(self) -> int:
        return len(self.bytes_of)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @abstractmethod
    def vocabulary(self, image_codes: int, grid: tuple[int, int], size: int | None = None) -> Vocabulary:
        """The layout that goes with this tokenizer, for pictures of `grid` codes and a model with `size` rows or more."""

    @abstractmethod
    def encode_run(self, run: str) -> list[int]:
        """Pieces of a text, which holds no `SPACE` where that has to be escaped."""

    def encode(self, text: str) -> list[int]:
        """Pieces of the text. Raises `BadInput` for lone surrogates, which no UTF-8 text holds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"lone surrogate at character {error.start}", where="text") from None
        if not self.escaped_space:
            return self.encode_run(text)
        result: list[int] = []
        for number, run in enumerate(text.split(SPACE)):
            if number:
                result += self.escaped_space
            if run:
                result += self.encode_run(run)
        return result

    def decode_bytes(self, pieces: Iterable[int]) -> bytes:
        """The UTF-8 bytes that the pieces stand for; a character may be cut at either end."""
        return b"".join(map(self.bytes_of.__getitem__, pieces))

    def decode(self, pieces: Iterable[int]) -> str:
        """The text of the pieces; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(pieces).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes `FILE` into the folder. Raises `BadInput` where that fails, and changes nothing then."""
        with written_into(folder) as place:
            (place / self.FILE).write_bytes(self.data)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote. Raises `BadInput` where the file is missing or damaged."""
        with reading("a text tokenizer", folder / cls.FILE):
            try:
                tokenizer = cls((folder / cls.FILE).read_bytes())
            except FileNotFoundError:
                raise BadInput("file is missing") from None
        return tokenizer


class SentencePieceTokenizer(TextTokenizer):
    """Our own: a sentencepiece model.

    It writes a space as `▁` (U+2581), so a real `▁` in the text goes in as its bytes.
    """

    FILE = "text_tokenizer.model"

    def __init__(self, data: bytes) -> None:
        """`data`: a sentencepiece model as `fit` makes it. Raises `BadInput` for anything else."""
        self.data = data
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise BadInput(f"no sentencepiece model ({error})", where=self.FILE) from None
        count = self.processor.GetPieceSize()
        self.bytes_of = [self.piece_bytes(number) for number in range(count)]
        self.escaped_space = [self.processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(self.processor.IsByte(number) for number in self.escaped_space):
            raise BadInput("the model has no byte pieces", where=self.FILE, remedy="fit it with `chameleon fit-text`")

    def piece_bytes(self, number: int) -> bytes:
        if self.processor.IsControl(number) or self.processor.IsUnknown(number):
            return b""
        piece = self.processor.IdToPiece(number)
        return bytes([int(piece[3:5], 16)]) if self.processor.IsByte(number) else piece.replace(SPACE, " ").encode()

    def vocabulary(self, image_codes: int, grid: tuple[int, int], size: int | None = None) -> Vocabulary:
        return Vocabulary.own(image_codes=image_codes, text_pieces=len(self), grid=grid)

    def encode_run(self, run: str) -> list[int]:
        return list(self.processor.EncodeAsIds(run))

    @classmethod
    def fit(
        cls, texts: Iterable[str], pieces: int, *, sample_bytes: int = 64 << 20, seed: int = 0
    ) -> SentencePieceTokenizer:
        """Learns `pieces` pieces, bytes and the unused piece 0 included, from a reservoir sample of the texts.

        Memory stays within a small multiple of `sample_bytes`, however many texts there are. Raises `BadInput` where
        there is no text, or too little for that many pieces.
        """
        sample = reservoir((part for text in texts for part in chunks(text)), max(1, sample_bytes // CHUNK_BYTES), seed)
        if not any(part.strip() for part in sample):
            raise BadInput("no text to learn from", where="text tokenizer")
        if pieces < BYTE_PIECES + 2:
            raise BadInput(
                f"{pieces} pieces leave no room beside the 256 bytes", where="text tokenizer", remedy="ask for more"
            )
        # A quarter of the pieces, or an alphabet where that is more, are single characters.
        characters = min(pieces - BYTE_PIECES - 2, max(64, (pieces - BYTE_PIECES) // 4))
        output = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(without_rare(sample, characters)),
                model_writer=output,
                model_type="bpe",
                vocab_size=pieces,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                character_coverage=1.0,  # `without_rare` has chosen already,
                user_defined_symbols=list(CUT_OUT),
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise BadInput(
                f"cannot learn {pieces} pieces from this text ({reason})", where="text tokenizer", remedy="ask for fewer"
            ) from None
        return cls(output.getvalue())
