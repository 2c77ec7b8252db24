"""Token shards: what training reads. Each raw shard becomes one folder, which is written atomically.

Files::

    NAME/ids.bin       uint32, little-endian: the token ids of all documents, concatenated; `ids-1.bin` … hold further
                       variants, the same documents with other views of their pictures
    NAME/offsets.bin   uint64, little-endian: the start of each document, and the end; n + 1 numbers
    NAME/images.bin    uint64, little-endian: the start of each image in ids.bin, so that packing does not read token ids
    NAME/pictures.bin  16 bytes for each picture that was read: its hash
    NAME/shard.json    counts, SHA-256 of the files, and the fingerprint of the tokenizers
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from chameleon.errors import BadInput
from chameleon.files import VERIFIED, atomic_folder, sha256_of, verify_once, write_json
from chameleon.tokenizers.mixed import answer_mask
from chameleon.vocabulary import Modality, Vocabulary

FORMAT = 2
IDS, OFFSETS, IMAGES, PICTURES, DESCRIPTION = "ids.bin", "offsets.bin", "images.bin", "pictures.bin", "shard.json"
HASH_BYTES = 16
MAX_OPEN_FILES = 128
TOKENIZE_AGAIN = "tokenize this shard again"
VERIFY_CHUNK = 1 << 22
"""Token ids that are checked at a time."""


def ids_file(variant: int) -> str:
    """Return the name of the file of a variant's token ids."""
    return f"ids-{variant}.bin" if variant else IDS


class ShardWriter:
    """Writes documents to a shard in progress; created by `write_shard`."""

    def __init__(
        self, files: Sequence[BinaryIO], pictures: BinaryIO, vocabulary: Vocabulary, description: dict[str, Any]
    ) -> None:
        self.files, self.pictures, self.vocabulary = files, pictures, vocabulary
        self.description = description
        """Contents of shard.json besides the counts; may be extended until the end."""
        self.offsets, self.image_starts = [0], [np.empty(0, dtype=np.int64)]
        self.token_counts: Counter[str] = Counter()
        self.answer_counts: Counter[str] = Counter()

    def add(self, token_ids: torch.Tensor, hashes: Sequence[bytes] = ()) -> None:
        """Append a document of int64 token ids [T], or [variants, T], and the hashes of its pictures."""
        variants = token_ids.view(-1, token_ids.shape[-1])
        if len(variants) != len(self.files):
            raise ValueError(f"{len(variants)} variants of a document, the shard has {len(self.files)}")
        for file, row in zip(self.files, variants, strict=True):
            file.write(row.numpy().astype("<u4").tobytes())
        first = variants[0].numpy()
        self.image_starts.append(complete_image_starts(first, self.vocabulary) + self.offsets[-1])
        self.offsets.append(self.offsets[-1] + variants.shape[1])
        modality = self.vocabulary.modality(variants[0])
        self.count_modalities(self.token_counts, modality)
        self.count_modalities(self.answer_counts, modality[answer_mask(first, self.vocabulary)])
        self.add_picture_hashes(hashes)

    def count_modalities(self, counts: Counter[str], modality: torch.Tensor) -> None:
        per_modality = torch.bincount(modality, minlength=len(Modality)).tolist()
        counts.update({kind.name.lower(): per_modality[kind] for kind in Modality})

    def add_picture_hashes(self, hashes: Sequence[bytes]) -> None:
        """Record pictures that were read, whether their document is used or not."""
        self.pictures.write(b"".join(hashes))


def image_lengths(token_ids: np.ndarray, starts: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return the tokens, boi … eoi, of the image at each start in token ids [T], 0 where there is none: int64 [starts]."""
    header = starts[:, None] + 1 + np.arange(vocabulary.dialect.header_length)
    fits = header.max(axis=1, initial=0) < len(token_ids)
    return np.where(fits, vocabulary.dialect.lengths_of_headers(token_ids[np.where(fits[:, None], header, 0)]), 0)


def complete_image_starts(token_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return the start of each complete image, boi … eoi, in token ids [T]: int64 [images]."""
    starts = np.flatnonzero(token_ids == vocabulary.boi)
    if not len(starts):
        return starts
    lengths = image_lengths(token_ids, starts, vocabulary)
    ends = starts + lengths - 1
    fits = (lengths > 0) & (ends < len(token_ids))
    return starts[fits][token_ids[ends[fits]] == vocabulary.eoi]


@contextmanager
def write_shard(
    folder: Path, fingerprint: str, vocabulary: Vocabulary, *, variants: int = 1, **description: Any
) -> Iterator[ShardWriter]:
    """Yield a writer whose documents become the shard `folder` if the block succeeds; else the folder is unchanged."""
    with atomic_folder(folder) as partial:
        with ExitStack() as stack:
            files = [stack.enter_context(open(partial / ids_file(variant), "wb")) for variant in range(variants)]
            pictures = stack.enter_context(open(partial / PICTURES, "wb"))
            writer = ShardWriter(files, pictures, vocabulary, description)
            yield writer
        np.asarray(writer.offsets, dtype="<u8").tofile(partial / OFFSETS)
        np.concatenate(writer.image_starts).astype("<u8").tofile(partial / IMAGES)
        counts = {
            "format": FORMAT,
            "documents": len(writer.offsets) - 1,
            "tokens": writer.offsets[-1],
            "variants": variants,
            "images": sum(map(len, writer.image_starts)),
            "pictures": (partial / PICTURES).stat().st_size // HASH_BYTES,
            "by_modality": dict(writer.token_counts),
            "answers_by_modality": dict(writer.answer_counts),
            "sha256": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
            "vocabulary": vocabulary.to_json(),
        }
        write_json(partial / DESCRIPTION, {**counts, "fingerprint": fingerprint, **writer.description})


@lru_cache(maxsize=MAX_OPEN_FILES)
def memory_map(path: str, dtype: str, inode: int) -> np.ndarray:
    """Memory-map a file of numbers. `inode` distinguishes it from an earlier file at the same path."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class TokenShard:
    """A shard on disk: document i is `shard[i]`, int64 [T].

    Only the description is held in memory, and at most `MAX_OPEN_FILES` files of all shards are open, so there may be any
    number of shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if self.description.get("format") != FORMAT:
                raise BadInput("written by another version of this package", where=folder, remedy=TOKENIZE_AGAIN)
            self.documents, self.tokens = self.description["documents"], self.description["tokens"]
            self.variants = self.description["variants"]
            expected_sizes = {OFFSETS: 8 * (self.documents + 1), IMAGES: 8 * self.description["images"]}
            expected_sizes[PICTURES] = HASH_BYTES * self.description["pictures"]
            expected_sizes |= {ids_file(variant): 4 * self.tokens for variant in range(self.variants)}
            self.inodes: dict[str, int] = {}
            for name, expected_size in expected_sizes.items():
                stat = (folder / name).stat()
                self.inodes[name] = stat.st_ino
                if stat.st_size != expected_size:
                    raise BadInput(
                        f"{name} does not have the size that {DESCRIPTION} states", where=folder, remedy=TOKENIZE_AGAIN
                    )
        except FileNotFoundError as error:
            raise BadInput("file is missing", where=error.filename, remedy=TOKENIZE_AGAIN) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"not a shard's description ({error})", where=folder / DESCRIPTION) from None

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index)

    def read(self, index: int, start: int = 0, end: int | None = None, variant: int = 0) -> np.ndarray:
        """Return token ids start…end, by default all, of a variant of a document: int64 [T]. Nothing else is read."""
        first, last = self.memory_map(OFFSETS, "<u8")[index : index + 2].tolist()
        last = last if end is None else first + end
        if last <= first + start:
            return np.empty(0, dtype=np.int64)
        return self.memory_map(ids_file(variant), "<u4")[first + start : last].astype(np.int64)

    def memory_map(self, name: str, dtype: str) -> np.ndarray:
        return memory_map(f"{self.folder}/{name}", dtype, self.inodes[name])

    @property
    def offsets(self) -> np.ndarray:
        """The start of each document in the token ids, and the end: int64 [n + 1]. Read from disk each time."""
        return np.fromfile(self.folder / OFFSETS, dtype="<u8").view("<i8")

    @property
    def image_starts(self) -> np.ndarray:
        """The start of each image in the token ids: int64 [images]. Read from disk each time."""
        return np.fromfile(self.folder / IMAGES, dtype="<u8").view("<i8")

    def image_lengths(self, vocabulary: Vocabulary) -> np.ndarray:
        """Tokens of each image, boi and eoi included: int64 [images]. Read from disk each time."""
        token_ids = self.memory_map(ids_file(0), "<u4") if self.tokens else np.empty(0, dtype="<u4")
        return image_lengths(token_ids, self.image_starts, vocabulary)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [n]."""
        return np.diff(self.offsets)

    def verify(self) -> None:
        """Raise `BadInput` where a file does not match its checksum, or offsets or token ids are invalid."""
        for name, expected in self.description["sha256"].items():
            if sha256_of(self.folder / name) != expected:
                raise BadInput("checksum does not match", where=self.folder / name, remedy=TOKENIZE_AGAIN)
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != self.tokens or (np.diff(offsets) < 0).any():
            raise BadInput(
                "offsets do not rise from 0 to the number of tokens", where=self.folder / OFFSETS, remedy=TOKENIZE_AGAIN
            )
        size = self.description["vocabulary"]["size"]
        for variant in range(self.variants):
            path = self.folder / ids_file(variant)
            token_ids = np.memmap(path, dtype="<u4", mode="r") if self.tokens else np.empty(0)
            for start in range(0, self.tokens, VERIFY_CHUNK):
                if (token_ids[start : start + VERIFY_CHUNK] >= size).any():
                    raise BadInput(f"a token id is not below {size}", where=path, remedy=TOKENIZE_AGAIN)


def verify_shards(shards: Iterable[TokenShard], *, again: bool = False) -> None:
    """Verify shards and note it beside them; one whose files have not changed since it was noted is not read again.

    again: read them nevertheless. Raises `BadInput` for the first one that is damaged.
    """
    for shard in shards:
        if again:
            with suppress(OSError):  # of a file system that is read-only
                (shard.folder / VERIFIED).unlink(missing_ok=True)
        verify_once(shard.folder, shard.description["sha256"], shard.verify)


def shard_folders(folder: Path) -> list[Path]:
    """Return the folders of the shards in a folder, sorted by name. Raise `BadInput` where there is none."""
    if not folder.is_dir():
        raise BadInput("no such folder", where=folder)
    folders = sorted(path.parent for path in folder.glob(f"*/{DESCRIPTION}") if not path.parent.name.startswith("."))
    if not folders:
        raise BadInput("no token shard here", where=folder, remedy="write some with `chameleon tokenize`")
    return folders


def open_shards(folder: Path, fingerprint: str | None = None) -> list[TokenShard]:
    """Return the shards in a folder, sorted by name.

    Raises `BadInput` where there is none, or where one was written with tokenizers of another `fingerprint`.
    """
    shards = [TokenShard(path) for path in shard_folders(folder)]
    for shard in shards:
        if fingerprint is not None and shard.description["fingerprint"] != fingerprint:
            raise BadInput(
                f"written with tokenizers {shard.description['fingerprint'][:12]}, the model has {fingerprint[:12]}",
                where=shard.folder,
                remedy="tokenize the sources again with this model's tokenizers",
            )
    return shards
