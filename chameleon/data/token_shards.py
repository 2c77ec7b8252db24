"""Token shards: what training reads. One raw shard becomes one folder, written under another name and renamed when whole.

NAME/ids.bin       uint32, little-endian: the ids of all documents, one after the other; `ids-1.bin` … hold further
                   variants, the same documents with other views of their pictures
NAME/offsets.bin   uint64, little-endian: where each document starts, and the end; n + 1 numbers
NAME/images.bin    uint64, little-endian: where each picture starts in ids.bin, so that rows are planned without reading ids
NAME/pictures.bin  16 bytes for each picture that was read: a hash that tells it from every other
NAME/shard.json    counts, SHA-256 of the files, and the fingerprint of the tokenizers
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from chameleon.errors import BadInput
from chameleon.files import checksum, write_json, written_whole
from chameleon.tokenizers.mixed import answer_mask
from chameleon.vocabulary import Modality, Vocabulary

FORMAT = 2
IDS, OFFSETS, IMAGES, PICTURES, DESCRIPTION = "ids.bin", "offsets.bin", "images.bin", "pictures.bin", "shard.json"
HASH_BYTES = 16
OPEN_FILES = 128
AGAIN = "tokenize this shard again"


def ids_name(variant: int) -> str:
    """The file of a variant's ids."""
    return f"ids-{variant}.bin" if variant else IDS


class ShardWriter:
    """Collects documents in a folder that becomes a shard; made by `write_shard`."""

    def __init__(
        self, files: Sequence[BinaryIO], pictures: BinaryIO, vocabulary: Vocabulary, description: dict[str, Any]
    ) -> None:
        self.files, self.pictures, self.vocabulary = files, pictures, vocabulary
        self.description = description
        """What shard.json says beside the counts; may be added to until the end."""
        self.offsets, self.images = [0], [np.empty(0, dtype=np.int64)]
        self.counts: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()

    def add(self, ids: torch.Tensor, hashes: Sequence[bytes] = ()) -> None:
        """Appends a document of int64 ids [T], or [variants, T], and the hashes of its pictures."""
        rows = ids.view(-1, ids.shape[-1])
        if len(rows) != len(self.files):
            raise ValueError(f"{len(rows)} variants of a document, the shard has {len(self.files)}")
        for file, row in zip(self.files, rows, strict=True):
            file.write(row.numpy().astype("<u4").tobytes())
        self.images.append(whole_pictures(rows[0].numpy(), self.vocabulary) + self.offsets[-1])
        self.offsets.append(self.offsets[-1] + rows.shape[1])
        kinds = self.vocabulary.modality(rows[0])
        for counts, chosen in ((self.counts, kinds), (self.answers, kinds[answer_mask(rows[0].numpy(), self.vocabulary)])):
            found = torch.bincount(chosen, minlength=len(Modality)).tolist()
            counts.update({kind.name.lower(): found[kind] for kind in Modality})
        self.add_pictures(hashes)

    def add_pictures(self, hashes: Sequence[bytes]) -> None:
        """Notes pictures that were read, whether their document is taken or not."""
        self.pictures.write(b"".join(hashes))


def whole_pictures(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Where each whole picture, boi … eoi, starts in ids [T]: int64 [pictures]."""
    starts = np.flatnonzero(ids == vocabulary.boi)
    ends = starts + vocabulary.block_length - 1
    fits = ends < len(ids)
    return starts[fits][ids[ends[fits]] == vocabulary.eoi]


@contextmanager
def write_shard(
    folder: Path, fingerprint: str, vocabulary: Vocabulary, *, variants: int = 1, **description: Any
) -> Iterator[ShardWriter]:
    """A writer whose documents are the shard `folder` once the block ends well; else what was there stays."""
    with written_whole(folder) as place:
        with ExitStack() as stack:
            files = [stack.enter_context(open(place / ids_name(number), "wb")) for number in range(variants)]
            pictures = stack.enter_context(open(place / PICTURES, "wb"))
            writer = ShardWriter(files, pictures, vocabulary, description)
            yield writer
        np.asarray(writer.offsets, dtype="<u8").tofile(place / OFFSETS)
        np.concatenate(writer.images).astype("<u8").tofile(place / IMAGES)
        counts = {
            "format": FORMAT,
            "documents": len(writer.offsets) - 1,
            "tokens": writer.offsets[-1],
            "variants": variants,
            "images": sum(map(len, writer.images)),
            "pictures": (place / PICTURES).stat().st_size // HASH_BYTES,
            "by_modality": dict(writer.counts),
            "answers_by_modality": dict(writer.answers),
            "sha256": {path.name: checksum(path) for path in sorted(place.iterdir())},
            "vocabulary": vocabulary.to_json(),
        }
        write_json(place / DESCRIPTION, {**counts, "fingerprint": fingerprint, **writer.description})


@lru_cache(maxsize=OPEN_FILES)
def mapped(path: str, kind: str, inode: int) -> np.ndarray:
    """A file of numbers, of which only the pages that are asked for are read.

    `inode` tells it from one that stood at the path before.
    """
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))


class TokenShard:
    """A shard on disk: document i is `shard[i]`, int64 [T].

    Nothing but the description is held in memory, and `OPEN_FILES` files of all shards are held open, those read last: so
    there may be any number of shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, f"{folder}/"
        try:
            self.description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if self.description.get("format") != FORMAT:
                raise BadInput("written by another version of this package", where=folder, remedy=AGAIN)
            self.documents, self.tokens = self.description["documents"], self.description["tokens"]
            self.variants = self.description["variants"]
            wanted = {OFFSETS: 8 * (self.documents + 1), IMAGES: 8 * self.description["images"]}
            wanted[PICTURES] = HASH_BYTES * self.description["pictures"]
            wanted |= {ids_name(number): 4 * self.tokens for number in range(self.variants)}
            self.inodes: dict[str, int] = {}
            for name, size in wanted.items():
                found = (folder / name).stat()
                self.inodes[name] = found.st_ino
                if found.st_size != size:
                    raise BadInput(f"{name} does not have the size that {DESCRIPTION} says", where=folder, remedy=AGAIN)
        except FileNotFoundError as error:
            raise BadInput("file is missing", where=error.filename, remedy=AGAIN) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"not a shard's description ({error})", where=folder / DESCRIPTION) from None

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.stretch(number)

    def stretch(self, number: int, start: int = 0, end: int | None = None, variant: int = 0) -> np.ndarray:
        """Ids start…end of a document, by default all, of one of its variants: int64 [T]. Nothing else is read."""
        first, last = self.mapped(OFFSETS, "<u8")[number : number + 2].tolist()
        last = last if end is None else first + end
        if last <= first + start:
            return np.empty(0, dtype=np.int64)
        return self.mapped(ids_name(variant), "<u4")[first + start : last].astype(np.int64)

    def mapped(self, name: str, kind: str) -> np.ndarray:
        return mapped(self.place + name, kind, self.inodes[name])

    @property
    def offsets(self) -> np.ndarray:
        """Where each document starts in the ids, and the end: int64 [n + 1]. Read anew each time."""
        return np.fromfile(self.folder / OFFSETS, dtype="<u8").view("<i8")

    @property
    def images(self) -> np.ndarray:
        """Where each picture starts in the ids: int64 [pictures]. Read anew each time."""
        return np.fromfile(self.folder / IMAGES, dtype="<u8").view("<i8")

    @property
    def lengths(self) -> np.ndarray:
        """Ids in each document: int64 [n]."""
        return np.diff(self.offsets)

    def verify(self) -> None:
        """Raises `BadInput` where a file is not what it was when it was written, or offsets or ids make no sense."""
        for name, wanted in self.description["sha256"].items():
            if checksum(self.folder / name) != wanted:
                raise BadInput("checksum does not fit", where=self.folder / name, remedy=AGAIN)
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != self.tokens or (np.diff(offsets) < 0).any():
            raise BadInput("offsets do not rise from 0 to the number of ids", where=self.folder / OFFSETS, remedy=AGAIN)
        size = self.description["vocabulary"]["size"]
        for number in range(self.variants):
            ids = np.memmap(self.folder / ids_name(number), dtype="<u4", mode="r") if self.tokens else np.empty(0)
            for start in range(0, self.tokens, 1 << 22):
                if (ids[start : start + (1 << 22)] >= size).any():
                    raise BadInput(f"an id is not below {size}", where=self.folder / ids_name(number), remedy=AGAIN)


def shard_folders(folder: Path) -> list[Path]:
    """The folders of the shards in a folder, sorted by name. Raises `BadInput` where there is none."""
    if not folder.is_dir():
        raise BadInput("no such folder", where=folder)
    found = sorted(path.parent for path in folder.glob(f"*/{DESCRIPTION}") if not path.parent.name.startswith("."))
    if not found:
        raise BadInput("no token shard here", where=folder, remedy="make some with `chameleon tokenize`")
    return found


def open_shards(folder: Path, fingerprint: str | None = None) -> list[TokenShard]:
    """The shards in a folder, sorted by name.

    Raises `BadInput` where there is none, or where one was made with tokenizers of another `fingerprint`.
    """
    shards = [TokenShard(path) for path in shard_folders(folder)]
    for shard in shards:
        if fingerprint is not None and shard.description["fingerprint"] != fingerprint:
            raise BadInput(
                f"made with tokenizers {shard.description['fingerprint'][:12]}, the model has {fingerprint[:12]}",
                where=shard.folder,
                remedy="tokenize the sources again with this model's tokenizers",
            )
    return shards
