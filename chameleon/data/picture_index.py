"""Pictures for training an image tokenizer, of which none is held in memory: where each one lies, in a file made once.

Files of an index::

    index.json      the sources and their files' sizes and times, by which it is known to be up to date
    files.bin       uint32 [N]: the file that picture n lies in
    offsets.bin     int64 [N]: its first byte there
    sizes.bin       int64 [N]: its number of bytes; -1 for a file that is the picture
    weights.bin     float64 [N]: the sum of the sampling weights up to it, where a field of the records has them
    paths.txt, path_starts.bin   the names of the files, and int64 [files + 1]: where each begins
    copies-K.bin    pictures that cannot be read from where they are: of compressed archives, Parquet, data URLs

Pictures of the embedded sets are read from memory, in groups of their own.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from chameleon.data.source_types import PictureEntry, RawShard
from chameleon.data.sources import SOURCE_KINDS, expand, pictures_in_documents
from chameleon.data.webdataset import MemberBytes, SkipHandler, raise_on_skip
from chameleon.data.worker_pool import worker_pool
from chameleon.document import ImageSource
from chameleon.errors import BadInput
from chameleon.files import atomic_folder, read_json, write_json
from chameleon.tokenizers.image import read_bytes

DESCRIPTION = "index.json"
COLUMNS = {"files": "<u4", "offsets": "<i8", "sizes": "<i8", "weights": "<f8", "path_starts": "<i8"}
"""Name of a column → its dtype; each is a file `NAME.bin`."""
WHOLE_FILE = -1
FORMAT = 1


class Located(NamedTuple):
    """Where a picture lies, and its sampling weight."""

    path: str
    offset: int
    size: int
    weight: float


class ShardIndex(NamedTuple):
    """The pictures of a raw shard, and what could not be read of it."""

    pictures: list[Located]
    skipped: list[tuple[str, str, int]]
    """(where, reason, number of bytes)."""


def sampling_weight(entry: PictureEntry, weight_field: str | None) -> float:
    """Return the relative sampling weight of a picture. Raise `BadInput` where its record has no such number."""
    value = entry.fields.get(weight_field, 1.0) if weight_field else 1.0
    if not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise BadInput(f"{weight_field} is {value!r}, expected a number above 0", where=entry.name)
    return float(value)


# --- making an index -------------------------------------------------------------------------------------------------


def index_shard(weight_field: str | None, shard: RawShard, copies: Path) -> ShardIndex:
    """Find the pictures of a shard. Those that can only be read with what is around them are copied to a file."""
    skipped: list[tuple[str, str, int]] = []

    def on_skip(where: str, reason: str, num_bytes: int = 0) -> None:
        skipped.append((where, reason, num_bytes))

    pictures = []
    with ExitStack() as stack:
        file: BinaryIO | None = None
        for entry in pictures_in_documents(shard, on_skip):
            weight, source = sampling_weight(entry, weight_field), entry.source
            if isinstance(source, MemberBytes):
                pictures.append(Located(source.path, source.offset, len(source), weight))
            elif is_path(source):
                pictures.append(Located(str(source), 0, WHOLE_FILE, weight))
            else:
                try:
                    data = read_bytes(source, entry.name)  # type: ignore[arg-type]
                except BadInput as error:
                    on_skip(entry.name, error.reason)
                    continue
                file = file or stack.enter_context(open(copies, "wb"))
                pictures.append(Located(copies.name, file.tell(), len(data), weight))
                file.write(data)
    return ShardIndex(pictures, skipped)


def is_path(source: ImageSource) -> bool:
    return isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:"))


def make_index(
    folder: Path,
    shards: Sequence[RawShard],
    weight_field: str | None = None,
    on_skip: SkipHandler = raise_on_skip,
    num_workers: int = 0,
) -> None:
    """Write the index of some shards, unless it is there and up to date. It is written whole or not at all.

    num_workers: processes that read shards. What cannot be read is passed to `on_skip`.
    """
    key = index_key(shards, weight_field)
    if (folder / DESCRIPTION).is_file() and read_json(folder / DESCRIPTION).get("key") == key:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as partial_folder:
        with ExitStack() as stack:
            columns = {n: stack.enter_context(open(partial_folder / f"{n}.bin", "wb")) for n in COLUMNS}
            writer = IndexWriter(columns, stack.enter_context(open(partial_folder / "paths.txt", "wb")))
            for index in indices_of(shards, weight_field, partial_folder, num_workers):
                for skip in index.skipped:
                    on_skip(*skip)
                writer.add(index.pictures)
        if weight_field is None:
            (partial_folder / "weights.bin").unlink()
        write_json(partial_folder / DESCRIPTION, {"key": key, "pictures": writer.num_pictures})


class IndexWriter:
    """Writes the columns of an index, and the names of the files that it mentions."""

    def __init__(self, columns: Mapping[str, BinaryIO], paths: BinaryIO) -> None:
        """columns: name of each → its file. paths: the file of the names."""
        self.columns, self.paths = columns, paths
        self.archives: dict[str, int] = {}
        """Name of a file with several pictures → its index among the files."""
        self.num_files = self.num_pictures = 0
        self.total_weight = 0.0
        self.add_column("path_starts", [0])

    def add(self, pictures: Sequence[Located]) -> None:
        """Append the pictures of a shard."""
        weights = self.total_weight + np.cumsum([picture.weight for picture in pictures], dtype=np.float64)
        self.total_weight = float(weights[-1]) if len(weights) else self.total_weight
        self.add_column("files", [self.index_of_file(picture) for picture in pictures])
        self.add_column("offsets", [picture.offset for picture in pictures])
        self.add_column("sizes", [picture.size for picture in pictures])
        self.add_column("weights", weights)
        self.num_pictures += len(pictures)

    def add_column(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        self.columns[name].write(np.asarray(values, dtype=COLUMNS[name]).tobytes())

    def index_of_file(self, picture: Located) -> int:
        """Return the index of the file that a picture lies in, adding the file's name if it is new."""
        if picture.path in self.archives:
            return self.archives[picture.path]
        index = self.num_files
        if picture.size != WHOLE_FILE:  # further pictures lie in it
            self.archives[picture.path] = index
        self.paths.write(picture.path.encode("utf-8", "surrogateescape"))
        self.add_column("path_starts", [self.paths.tell()])
        self.num_files += 1
        return index


def index_key(shards: Sequence[RawShard], weight_field: str | None) -> str:
    """Return what tells an index of these shards, as they are now, from others."""
    digest = hashlib.sha256(json.dumps([FORMAT, weight_field]).encode())
    for shard in shards:
        digest.update(json.dumps(shard.identity, sort_keys=True).encode())
    return digest.hexdigest()


def indices_of(
    shards: Sequence[RawShard], weight_field: str | None, folder: Path, num_workers: int
) -> Iterator[ShardIndex]:
    """Yield the index of each shard, in order."""
    function, copies = partial(index_shard, weight_field), [folder / f"copies-{n}.bin" for n in range(len(shards))]
    if num_workers == 0 or len(shards) == 1:
        yield from map(function, shards, copies)
        return
    with worker_pool(num_workers, "index of pictures") as pool:
        yield from pool.map(function, shards, copies)


# --- drawing from it -------------------------------------------------------------------------------------------------


class IndexedPictures:
    """The pictures of an index, read from their files when they are drawn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count: int = read_json(folder / DESCRIPTION)["pictures"]
        self.has_weights = (folder / "weights.bin").is_file()
        self.columns = {
            name: np.memmap(folder / f"{name}.bin", dtype, mode="r") if self.count else np.empty(0, dtype)
            for name, dtype in COLUMNS.items()
            if name != "weights" or self.has_weights
        }

    def __len__(self) -> int:
        return self.count

    @property
    def total_weight(self) -> float:
        return float(self.columns["weights"][-1]) if self.has_weights and self.count else float(self.count)

    def draw(self, rng: np.random.Generator) -> PictureEntry:
        """Return a random picture, by the sampling weights."""
        if not self.has_weights:
            return self[int(rng.integers(self.count))]
        point = rng.random() * self.total_weight
        index = int(np.searchsorted(self.columns["weights"], point, side="right"))
        return self[min(index, self.count - 1)]

    def __getitem__(self, index: int) -> PictureEntry:
        offset, size = int(self.columns["offsets"][index]), int(self.columns["sizes"][index])
        path = self.path(int(self.columns["files"][index]))
        if size == WHOLE_FILE:
            return PictureEntry(str(path), path, str(path))
        name = f"{path}, byte {offset}"
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadInput(f"could not be read ({error.strerror})", where=path) from None
        return PictureEntry(name, data, name)

    def path(self, file: int) -> Path:
        start, end = self.columns["path_starts"][file : file + 2].tolist()
        with open(self.folder / "paths.txt", "rb") as names:
            names.seek(start)
            return self.folder / names.read(end - start).decode("utf-8", "surrogateescape")


class GroupedPictures:
    """Pictures in memory. A group is drawn by the largest weight of its members, then one of them."""

    def __init__(self, entries: Sequence[PictureEntry], weight_field: str | None = None) -> None:
        self.entries = entries
        groups: dict[str, list[PictureEntry]] = {}
        for entry in entries:
            groups.setdefault(entry.group, []).append(entry)
        self.groups = [groups[name] for name in sorted(groups)]
        largest = (max(sampling_weight(entry, weight_field) for entry in group) for group in self.groups)
        self.weights = list(accumulate(largest)) if weight_field else None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PictureEntry:
        return self.entries[index]

    @property
    def total_weight(self) -> float:
        return self.weights[-1] if self.weights else float(len(self.groups))

    def draw(self, rng: np.random.Generator) -> PictureEntry:
        """Return a random picture."""
        if self.weights is None:
            group = self.groups[rng.integers(len(self.groups))]
        else:
            point = rng.random() * self.weights[-1]
            group = self.groups[min(bisect.bisect_right(self.weights, point), len(self.groups) - 1)]
        return group[rng.integers(len(group))]


class PictureSet:
    """The pictures of several sources, drawn by their weights."""

    def __init__(self, parts: Sequence[IndexedPictures | GroupedPictures]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.weights = list(accumulate(part.total_weight for part in self.parts))
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> PictureEntry:
        part = bisect.bisect_right(self.ends, index)
        if part == len(self.parts):
            raise IndexError(index)
        return self.parts[part][index - (self.ends[part] - len(self.parts[part]))]

    def draw(self, rng: np.random.Generator) -> PictureEntry:
        """Return a random picture."""
        if len(self.parts) == 1:
            return self.parts[0].draw(rng)
        index = bisect.bisect_right(self.weights, rng.random() * self.weights[-1])
        return self.parts[min(index, len(self.parts) - 1)].draw(rng)


class PictureSources:
    """Sources of pictures, of which an index can be made and opened."""

    def __init__(self, sources: Sequence[str], *, allow_paths: bool = False, weight_field: str | None = None) -> None:
        """allow_paths: whether records may name images outside their folder."""
        self.sources, self.weight_field = sources, weight_field
        raw_shards = [shard.absolute() for source in sources for shard in expand(source, allow_paths=allow_paths)]
        self.in_memory = [shard for shard in raw_shards if SOURCE_KINDS[shard.kind].pictures is not None]
        self.in_files = [shard for shard in raw_shards if SOURCE_KINDS[shard.kind].pictures is None]

    def make_index(self, folder: Path, on_skip: SkipHandler = raise_on_skip, num_workers: int = 0) -> None:
        """Write the index of the pictures in files, see the function of that name."""
        if self.in_files:
            make_index(folder, self.in_files, self.weight_field, on_skip, num_workers)

    def open(self, folder: Path) -> PictureSet:
        """Open the pictures, given the folder of the index. Raise `BadInput` where there is none."""
        entries = [entry for shard in self.in_memory for entry in SOURCE_KINDS[shard.kind].pictures(shard)]  # type: ignore[misc]
        parts: list[IndexedPictures | GroupedPictures] = [GroupedPictures(entries, self.weight_field)]
        pictures = PictureSet([*parts, *([IndexedPictures(folder)] if self.in_files else [])])
        if not len(pictures):
            raise BadInput("no picture in any source", where=", ".join(self.sources))
        return pictures
