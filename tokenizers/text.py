"""Text ↔ pieces: sentencepiece BPE that gives every string back exactly.

No normalisation, no dummy prefix, all white space kept, bytes for whatever the vocabulary lacks. sentencepiece writes a
space as `▁` (U+2581), so a real `▁` in the text goes in as its bytes; decoding joins the bytes of all pieces. Specials
and image ids live outside this model, so no text can spell them.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from chameleon.errors import BadInput
from chameleon.files import written_into

MODEL_FILE = "text_tokenizer.model"
SPACE = "\u2581"
BYTE_PIECES = 256
CHUNK_BYTES = 2048  # sentencepiece drops sentences over 4192 bytes
# What the trainer would drop a whole sentence for: its boundary sign (tab), its unknown sign, NUL, and its space sign.
RESERVED = re.compile("[\t\x00\u2585\u2581]+")


def chunks(text: str) -> Iterator[str]:
    """The text in pieces of at most `CHUNK_BYTES` bytes, cut behind newlines where there are any."""
    for run in RESERVED.split(text):
        start = 0
        while start < len(run):
            end = start + CHUNK_BYTES // 4
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


class TextTokenizer:
    """Strings ↔ pieces numbered from 0."""

    def __init__(self, model: bytes) -> None:
        """`model`: a sentencepiece model as `fit` makes it. Raises `BadInput` for anything else."""
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise BadInput(f"no sentencepiece model ({error})", where=MODEL_FILE) from None
        count = self.processor.GetPieceSize()
        self.bytes_of = [self.piece_bytes(number) for number in range(count)]
        escaped = [self.processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(self.processor.IsByte(number) for number in escaped):
            raise BadInput("the model has no byte pieces", where=MODEL_FILE, remedy="fit it with `chameleon fit-text`")
        self.escaped_space = escaped

    def piece_bytes(self, number: int) -> bytes:
        if self.processor.IsControl(number) or self.processor.IsUnknown(number):
            return b""
        piece = self.processor.IdToPiece(number)
        return bytes([int(piece[3:5], 16)]) if self.processor.IsByte(number) else piece.replace(SPACE, " ").encode()

    def __len__(self) -> int:
        return len(self.bytes_of)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Pieces of the text. Raises `BadInput` for lone surrogates, which no UTF-8 text holds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"lone surrogate at character {error.start}", where="text") from None
        result: list[int] = []
        for number, run in enumerate(text.split(SPACE)):
            if number:
                result += self.escaped_space
            if run:
                result += self.processor.EncodeAsIds(run)
        return result

    def decode_bytes(self, pieces: Iterable[int]) -> bytes:
        """The UTF-8 bytes that the pieces stand for; a character may be cut at either end."""
        return b"".join(map(self.bytes_of.__getitem__, pieces))

    def decode(self, pieces: Iterable[int]) -> str:
        """The text of the pieces; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(pieces).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes `text_tokenizer.model` into the folder. Raises `BadInput` where that fails, and changes nothing then."""
        with written_into(folder) as place:
            (place / MODEL_FILE).write_bytes(self.model)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Reads what `save` wrote. Raises `BadInput` where the file is missing or damaged."""
        try:
            return cls((folder / MODEL_FILE).read_bytes())
        except FileNotFoundError:
            raise BadInput("file is missing", where=folder / MODEL_FILE) from None
        except BadInput as error:
            raise BadInput(str(error), where=folder) from None

    @classmethod
    def fit(cls, texts: Iterable[str], pieces: int, *, sample_bytes: int = 64 << 20, seed: int = 0) -> TextTokenizer:
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
                user_defined_symbols=["\t"],
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
