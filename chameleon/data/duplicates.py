"""Finding pictures that occur more than once, in parallel and in bounded memory.

Each raw shard is read by one process, which writes the hashes of its pictures in an order by their first byte. Then each of
the 256 parts of all hashes is sorted by itself, which tells for each picture whether an earlier sample has it. What is left
out does not depend on the number of processes.

Files, in a folder beside the token shards::

    K/hashes.bin        a row for each picture of raw shard K, ordered by the first byte of the key, then by sample
    K/starts.bin        int64 [257]: where each first byte begins
    K/seen.bin          a byte for each picture: whether an earlier sample has one of the same key
    K/duplicates.bin    the pictures of the samples that are left out: sample, hash, in order of the samples
    duplicates.json     which shards and filters they belong to
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from chameleon.data.filters import Filters, reason_to_filter
from chameleon.data.source_types import RawShard, Sample
from chameleon.data.sources import read
from chameleon.data.worker_pool import worker_pool
from chameleon.errors import BadInput
from chameleon.files import atomic_folder, read_json, write_json
from chameleon.tokenizers.image import ImageFile
from chameleon.tokenizers.mixed import split_turns

HASH_BYTES = 16
NUM_PARTS = 256
PICTURE = np.dtype([("key", f"V{HASH_BYTES}"), ("hash", f"V{HASH_BYTES}"), ("sample", "<u4"), ("picture", "<u4")])
DUPLICATE = np.dtype([("sample", "<u4"), ("hash", f"V{HASH_BYTES}")])
HASHES, STARTS, SEEN, DUPLICATES = "hashes.bin", "starts.bin", "seen.bin", "duplicates.bin"
DESCRIPTION = "duplicates.json"
MAX_HASHES = 1 << 26
"""Hashes that are sorted at a time."""


class Duplicates(Mapping[int, Sequence[bytes]]):
    """Index of a sample of a raw shard that is left out → the hashes of its pictures, read when it is asked for."""

    def __init__(self, file: Path | None = None) -> None:
        """file: `duplicates.bin` of the shard; None: nothing is left out."""
        self.file = file

    @cached_property
    def table(self) -> np.ndarray:
        """The file, not read: `DUPLICATE` [hashes], in order of the samples."""
        if self.file is None or not self.file.stat().st_size:
            return np.empty(0, dtype=DUPLICATE)
        return np.memmap(self.file, dtype=DUPLICATE, mode="r")

    def __getitem__(self, sample: int) -> list[bytes]:
        samples = self.table["sample"]
        start = bisect_left(samples, sample)
        if start == len(samples) or samples[start] != sample:
            raise KeyError(sample)
        return [value.tobytes() for value in self.table["hash"][start : bisect_right(samples, sample)]]

    def __iter__(self) -> Iterator[int]:
        return iter(np.unique(self.table["sample"]).tolist())

    def __len__(self) -> int:
        return len(np.unique(self.table["sample"]))

    def __reduce__(self) -> Any:
        """Pickle the file's name alone."""
        return Duplicates, (self.file,)


def find_duplicates(shards: Sequence[RawShard], filters: Filters, folder: Path, num_workers: int = 0) -> list[Duplicates]:
    """Return for each raw shard the samples all of whose pictures occur in earlier samples.

    Samples that the other filters leave out do not count as earlier ones, nor those whose images have no valid header.
    folder: for the files, which are kept and used again for the same shards and filters.
    """
    identities = [shard.identity for shard in shards]
    key = hashlib.sha256(json.dumps([identities, vars(filters)], sort_keys=True).encode()).hexdigest()
    if not ((folder / DESCRIPTION).is_file() and read_json(folder / DESCRIPTION).get("key") == key):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial_folder:
            of_shards = [partial_folder / str(index) for index in range(len(shards))]
            hash_function = hash_of(filters)
            run(partial(hash_pictures, filters, hash_function), list(zip(shards, of_shards, strict=True)), num_workers)
            run(partial(mark_seen, of_shards), [(part,) for part in range(NUM_PARTS)], num_workers)
            run(collect_duplicates, [(of_shard,) for of_shard in of_shards], num_workers)
            write_json(partial_folder / DESCRIPTION, {"key": key})
    return [Duplicates(folder / str(index) / DUPLICATES) for index in range(len(shards))]


def run(function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], num_workers: int) -> None:
    """Call a function with each of the arguments, in this process or in several."""
    if num_workers == 0:
        for values in arguments:
            function(*values)
        return
    with worker_pool(num_workers, "duplicates") as pool:
        for future in [pool.submit(function, *values) for values in arguments]:
            future.result()


def hash_of(filters: Filters) -> Callable[[ImageFile], bytes]:
    """Return the function whose value is the same for duplicates. Raise `BadInput` where a package is missing."""
    if not filters.near_duplicates:
        return byte_hash
    try:
        import imagehash  # noqa: F401 (it is used in other processes)
    except ImportError:
        raise BadInput(
            "ImageHash is not installed", where="filters.near_duplicates", remedy="pip install 'open-chameleon[near]'"
        ) from None
    return perceptual_hash


def byte_hash(image: ImageFile) -> bytes:
    return image.hash


def perceptual_hash(image: ImageFile) -> bytes:
    """Return the picture's pHash: the signs of its 64 lowest frequencies, 8 bytes; the rest is zero."""
    import imagehash

    return np.packbits(imagehash.phash(image.rgb).hash).tobytes().ljust(HASH_BYTES, b"\0")


def hash_pictures(filters: Filters, key_of: Callable[[ImageFile], bytes], shard: RawShard, folder: Path) -> None:
    """Write the hashes of a raw shard's pictures."""
    pictures: list[tuple[bytes, bytes, int, int]] = []
    for index, sample in enumerate(read(shard, lambda *_: None)):
        try:
            pictures += hashes_of_sample(sample, index, filters, key_of)
        except BadInput:  # it is reported when it is prepared
            continue
    table = np.array(pictures, dtype=PICTURE)
    first_bytes = np.frombuffer(table["key"].tobytes(), dtype="u1")[::HASH_BYTES]
    folder.mkdir()
    table[np.argsort(first_bytes, kind="stable")].tofile(folder / HASHES)
    np.cumsum([0, *np.bincount(first_bytes, minlength=NUM_PARTS)]).astype("<i8").tofile(folder / STARTS)
    np.zeros(len(table), dtype=bool).tofile(folder / SEEN)


def hashes_of_sample(
    sample: Sample, index: int, filters: Filters, key_of: Callable[[ImageFile], bytes]
) -> list[tuple[bytes, bytes, int, int]]:
    """Return the rows of a sample's pictures; none where it is left out. Raise `BadInput` for invalid ones."""
    split_turns(sample.content)
    if reason_to_filter(sample, filters) is not None:
        return []
    for image in sample.image_files:
        image.opened  # noqa: B018 (raises for an invalid header)
    return [(key_of(image), image.hash, index, picture) for picture, image in enumerate(sample.image_files)]


def mark_seen(of_shards: Sequence[Path], part: int) -> None:
    """Mark the pictures of a part, of all shards, whose key an earlier sample has. One file is open at a time."""
    starts, tables = [], []
    for folder in of_shards:
        start, end = np.fromfile(folder / STARTS, dtype="<i8", offset=8 * part, count=2).tolist()
        starts.append(start)
        tables.append(np.fromfile(folder / HASHES, dtype=PICTURE, offset=PICTURE.itemsize * start, count=end - start))
    keys = np.concatenate([table["key"] for table in tables]).view("<u8").reshape(-1, 2)
    samples = np.concatenate([table["sample"] for table in tables])
    sizes = list(map(len, tables))
    shards = np.repeat(np.arange(len(tables)), sizes)
    order = np.lexsort(keys.T)  # stable: pictures of a key stay in the order of shards and samples
    keys, samples, shards = keys[order], samples[order], shards[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    seen = np.empty(len(order), dtype=bool)
    seen[order] = (samples != samples[first]) | (shards != shards[first])
    seen_of_shards = np.split(seen, np.cumsum(sizes)[:-1])
    for folder, start, of_shard in zip(of_shards, starts, seen_of_shards, strict=True):
        with open(folder / SEEN, "r+b") as file:
            file.seek(start)
            file.write(of_shard.tobytes())


def collect_duplicates(folder: Path) -> None:
    """Write which samples of a shard have no picture but seen ones."""
    table, seen = np.fromfile(folder / HASHES, dtype=PICTURE), np.fromfile(folder / SEEN, dtype=bool)
    num_samples = int(table["sample"].max(initial=0)) + 1
    has_new = np.bincount(table["sample"], weights=~seen, minlength=num_samples) > 0
    left_out = table[~has_new[table["sample"]]]
    left_out = left_out[np.lexsort((left_out["picture"], left_out["sample"]))]
    duplicates = np.empty(len(left_out), dtype=DUPLICATE)
    duplicates["sample"], duplicates["hash"] = left_out["sample"], left_out["hash"]
    duplicates.tofile(folder / DUPLICATES)
    for name in (HASHES, STARTS, SEEN):
        (folder / name).unlink()


def duplicate_share(files: Sequence[Path]) -> float:
    """Return the share of the hashes in all files that are repetitions of another one; at most `MAX_HASHES` are held."""
    total = sum(path.stat().st_size for path in files) // HASH_BYTES
    repeated = 0
    for part in np.array_split(np.arange(NUM_PARTS), max(1, -(-total // MAX_HASHES))):
        of_files = (np.fromfile(path, dtype="u1").reshape(-1, HASH_BYTES) for path in files)
        of_part = [hashes[(part[0] <= hashes[:, 0]) & (hashes[:, 0] <= part[-1])] for hashes in of_files]
        keys = np.concatenate([np.empty((0, HASH_BYTES), "u1"), *of_part]).view("<u8")
        keys = keys[np.lexsort(keys.T)]
        repeated += int((keys[1:] == keys[:-1]).all(axis=1).sum())
    return repeated / max(1, total)
