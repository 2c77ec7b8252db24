"""Stream tensors from and to disk one at a time, so that a checkpoint larger than memory can be converted.

Reading: `.safetensors` files and files of `torch.save`, as mappings from names to tensors that memory-map the file only
while a tensor is alive. Pickles are only read with `weights_only=True`, so that they cannot run code. Writing: the same
two formats, from an iterator of tensors. The safetensors library itself writes a dictionary that holds all tensors.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from chameleon.errors import BadInput
from chameleon.files import read_json, write_json

MAX_FILE_BYTES = 4 * 10**9
MAX_MAPPED_BYTES = 1 << 24
"""Bytes read from one of torch's files before its memory map is closed and opened again."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()} | {
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a dtype in a `.safetensors` header → the dtype."""
Progress = Callable[[int], None]
"""Called with the number of bytes of each tensor after it was written."""


def no_progress(_: int) -> None:
    """Report nothing."""


class LazyTensors(Mapping[str, Tensor]):
    """A mapping from names to tensors in which each tensor is read or computed on access."""

    names: Mapping[str, Any]
    """The names in order, each with what its tensor is read from."""

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, without reading its data where possible."""
        return self[name].dtype


class RenamedTensors(LazyTensors):
    """Tensors of other mappings under new names."""

    def __init__(self, names: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        """`names`: new name → (mapping, name in that mapping)."""
        self.names = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        source, source_name = self.names[name]
        return source[source_name]


class SafetensorsFiles(LazyTensors):
    """Tensors of one or several `.safetensors` files."""

    def __init__(self, names: Mapping[str, Path]) -> None:
        """`names`: name of a tensor → its file."""
        self.names = dict(names)

    @classmethod
    def from_folder(cls, folder: Path, stem: str = "model") -> SafetensorsFiles:
        """Open `STEM.safetensors`, or if there is none the files listed in `STEM.safetensors.index.json`.

        Raises `BadInput` that names a file which is missing, damaged, or lacks a tensor of the index.
        """
        path, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if path.is_file() or not index.is_file():
            return cls(dict.fromkeys(tensor_names(path), path))
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or any(Path(str(file)).name != file for file in weight_map.values())
        ):
            raise BadInput("weight_map must name files of this folder", where=index)
        for file in sorted(set(weight_map.values())):
            names_in_file = set(tensor_names(folder / file))
            for name, file_of_name in weight_map.items():
                if file_of_name == file and name not in names_in_file:
                    raise BadInput(f"tensor {name} of the index is missing in this file", where=folder / file)
        return cls({name: folder / file for name, file in weight_map.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.box(name, ())

    def box(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Return a tensor, or the part of it that slices with steps of 1 select; nothing else is read."""
        path = self.names[name]
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_slice(name)[slices] if slices else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"damaged ({error})", where=path) from None
        return value

    @property
    def nbytes(self) -> int:
        """Size of all the files in bytes."""
        return sum(path.stat().st_size for path in set(self.names.values()))


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a `.safetensors` file."""
    if not path.is_file():
        raise BadInput("file is missing", where=path, remedy="copy the whole folder again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"damaged ({error})", where=path) from None


class TorchFile(LazyTensors):
    """Tensors of a dictionary that `torch.save` wrote, or of the dictionary under its key `inside`."""

    def __init__(self, path: Path, inside: str | None = None, optional: Collection[str] = ()) -> None:
        """`optional`: keys that are ignored where they do not hold a tensor.

        Raises `BadInput` for a file that is missing, damaged, or holds other values than tensors and plain ones.
        """
        self.path, self.inside, self.optional = path, inside, optional
        self.mapped: dict[str, Tensor] | None = None
        self.bytes_read, self.can_remap = 0, True
        self.names: dict[str, torch.dtype] = {name: value.dtype for name, value in self.load().items()}

    def load(self) -> dict[str, Tensor]:
        """Memory-map the file and return its tensors."""
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise BadInput("file is missing", where=self.path) from None
        except Exception as error:  # a damaged file can make the reader raise anything
            if "mmap" not in str(error):
                raise self.explain(error) from None
            value = self.load_into_memory()  # the format before torch 1.6 cannot be memory-mapped
            self.can_remap = False
        if self.inside is not None:
            if not isinstance(value, dict) or not isinstance(value.get(self.inside), dict):
                raise BadInput(f"has no key {self.inside}", where=self.path)
            value = value[self.inside]
        if not isinstance(value, dict):
            raise BadInput("is not a dictionary of tensors", where=self.path)
        for name, entry in value.items():
            is_dense = isinstance(entry, Tensor) and entry.layout == torch.strided and entry.device.type == "cpu"
            if not isinstance(name, str) or not (is_dense or name in self.optional):
                raise BadInput(f"{name!r} is not a dense tensor", where=self.path)
        return {name: entry for name, entry in value.items() if isinstance(entry, Tensor)}

    def load_into_memory(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.explain(error) from None

    def explain(self, error: Exception) -> BadInput:
        """Return a one-line error for what `torch.load` raised."""
        text = str(error)
        if "GLOBAL" in text:
            return BadInput(
                "the pickle would run code or holds other objects than tensors, so it is refused",
                where=self.path,
                remedy="save the tensors alone",
            )
        # torch's message is a page of advice; the reason stands after its last colon.
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        return BadInput(
            f"damaged, or not a file of tensors ({reason[0] if reason else type(error).__name__})", where=self.path
        )

    def __getitem__(self, name: str) -> Tensor:
        # The pages of a memory map are only released with its last tensor, so the file is mapped again now and then.
        if self.bytes_read > MAX_MAPPED_BYTES and self.can_remap:
            self.mapped = None
        if self.mapped is None:
            self.mapped, self.bytes_read = self.load(), 0
        value = self.mapped[name]
        self.bytes_read += value.nbytes
        if value.nbytes > MAX_MAPPED_BYTES and self.can_remap:
            self.mapped = None
        return value

    def dtype(self, name: str) -> torch.dtype:
        return self.names[name]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size


def raw_bytes(value: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous."""
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().data


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    names: Iterable[str],
    *,
    stem: str = "model",
    progress: Progress = no_progress,
) -> None:
    """Write tensors to `STEM.safetensors`, or past `MAX_FILE_BYTES` to several files with an index.

    `names`: at least the names of all tensors to come. One tensor is held at a time: space for the header is reserved at
    the start of each file, and what it does not need is padded with blanks, as the format allows.
    """
    header_bytes = 64 + sum(len(json.dumps(name)) + 120 for name in names)
    header_bytes += -header_bytes % 8
    file_index_of: dict[str, int] = {}
    num_files, total_size = 0, 0
    stream = iter(tensors)
    pending = next(stream, None)
    while pending is not None or not num_files:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        with open(folder / f"{stem}.{num_files}.partial", "wb") as file:
            file.seek(8 + header_bytes)
            offset = 0
            while pending is not None and (offset == 0 or offset + pending[1].nbytes <= MAX_FILE_BYTES):
                name, value = pending
                header[name] = {
                    "dtype": DTYPES[value.dtype],
                    "shape": list(value.shape),
                    "data_offsets": [offset, offset + value.nbytes],
                }
                file.write(raw_bytes(value))
                file_index_of[name] = num_files
                offset, total_size = offset + value.nbytes, total_size + value.nbytes
                progress(value.nbytes)
                del value
                pending = None  # release the tensor before the next one is read
                pending = next(stream, None)
            text = json.dumps(header, separators=(",", ":")).encode()
            file.seek(0)
            file.write(header_bytes.to_bytes(8, "little") + text.ljust(header_bytes))
        num_files += 1
    if num_files == 1:
        (folder / f"{stem}.0.partial").rename(folder / f"{stem}.safetensors")
        return
    file_names = [f"{stem}-{index:05d}-of-{num_files:05d}.safetensors" for index in range(1, num_files + 1)]
    for index, file_name in enumerate(file_names):
        (folder / f"{stem}.{index}.partial").rename(folder / file_name)
    weight_map = {name: file_names[index] for name, index in file_index_of.items()}
    write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


class TorchWriter:
    """Write a file as `torch.save` would, one tensor at a time.

    The archive is first written without the tensors' data, then each tensor is written at the offset that `torch.load`
    reads it from, and at the end the archive's CRC-32 checksums are corrected.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Tensor], inside: str | None = None) -> None:
        """`shapes`: for each name a tensor of its shape and dtype, which may be on `meta`."""
        shape_and_dtype = {name: (value.shape, value.dtype) for name, value in shapes.items()}
        with FakeTensorMode():
            empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shape_and_dtype.items()}
        with skip_data(materialize_fake_tensors=True):
            torch.save(empty if inside is None else {inside: empty}, path)
        with FakeTensorMode():
            loaded = torch.load(path, weights_only=True)
        loaded = loaded if inside is None else loaded[inside]
        self.path = path
        self.offsets = {name: value.untyped_storage()._checkpoint_offset for name, value in loaded.items()}
        self.checksums: dict[int, int] = {}
        self.file = open(path, "r+b")  # noqa: SIM115

    def write(self, name: str, value: Tensor) -> None:
        """Write the data of one tensor."""
        offset, data = self.offsets[name], raw_bytes(value)
        self.file.seek(offset)
        self.file.write(data)
        self.checksums[offset] = zlib.crc32(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()

    def close(self) -> None:
        """Write the checksums of the archive's members, after each member and in the central directory."""
        with zipfile.ZipFile(self.path) as archive:
            directory, members = archive.start_dir, archive.infolist()
        for member in members:
            start = member.header_offset + 30 + sum(self.read_struct("<HH", member.header_offset + 26))
            entry_size = 46 + sum(self.read_struct("<HHH", directory + 28))
            if start in self.checksums:
                crc_offsets = [directory + 16]
                if self.read_struct("<I", start + member.file_size) == (0x08074B50,):  # a data descriptor follows
                    crc_offsets.append(start + member.file_size + 4)
                for offset in crc_offsets:
                    self.file.seek(offset)
                    self.file.write(struct.pack("<I", self.checksums[start]))
            directory += entry_size
        self.file.close()

    def read_struct(self, format: str, offset: int) -> tuple[int, ...]:
        self.file.seek(offset)
        return struct.unpack(format, self.file.read(struct.calcsize(format)))
