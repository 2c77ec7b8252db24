"""Tensors on disk, one at a time: a checkpoint larger than memory is read and written without being held whole.

Reading: `.safetensors` files and torch's own pickles, as mappings from names to tensors that map the file into memory
for as long as a tensor lives. Pickles are read with `weights_only=True` alone, so none of them runs code. Writing: the
same two forms, tensors taken from an iterator.
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
MAPPED_BYTES = 1 << 24
"""What is read of one of torch's files before its memory is given back."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Progress = Callable[[int], None]
"""Is told of each tensor's bytes once they are written."""


def nothing(_: int) -> None:
    """Progress that nobody watches."""


def check_device(device: str) -> None:
    """Raises `BadInput` where tensors cannot be put on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"cannot be used ({str(error).splitlines()[0]})", where=f"device {device}") from None


class Weights(Mapping[str, Tensor]):
    """Names and tensors, each tensor made when it is asked for."""

    names: Mapping[str, Any]
    """The names, in order, and what the tensors are made from."""

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it where that can be had."""
        return self[name].dtype


class Chosen(Weights):
    """Tensors of other mappings under names of their own."""

    def __init__(self, names: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        """`names`: for each name a mapping, and the name there."""
        self.names = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        source, theirs = self.names[name]
        return source[theirs]


class SafetensorsFiles(Weights):
    """Tensors of one or several `.safetensors` files."""

    def __init__(self, names: Mapping[str, Path]) -> None:
        """`names`: the file of each tensor, read only when the tensor is asked for."""
        self.names = dict(names)

    @classmethod
    def of_folder(cls, folder: Path, stem: str = "model") -> SafetensorsFiles:
        """`STEM.safetensors`, or where there is none the files that `STEM.safetensors.index.json` names.

        Raises `BadInput` naming a file that is missing, damaged, or does not hold what the index says.
        """
        path, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if path.is_file() or not index.is_file():
            return cls(dict.fromkeys(names_in(path), path))
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table or any(Path(str(file)).name != file for file in table.values()):
            raise BadInput("weight_map must name files of this folder", where=index)
        for file in sorted(set(table.values())):
            names = names_in(folder / file)
            for name, place in table.items():
                if place == file and name not in names:
                    raise BadInput(f"tensor {name} is missing, though the index puts it here", where=folder / file)
        return cls({name: folder / file for name, file in table.items()})

    def __getitem__(self, name: str) -> Tensor:
        path = self.names[name]
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"damaged ({error})", where=path) from None
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all the files."""
        return sum(path.stat().st_size for path in set(self.names.values()))


def names_in(path: Path) -> list[str]:
    """Names of a `.safetensors` file's tensors."""
    if not path.is_file():
        raise BadInput("file is missing", where=path, remedy="copy the whole folder again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"damaged ({error})", where=path) from None


class TorchFile(Weights):
    """Tensors of a file that `torch.save` wrote, at the top or under `inside`."""

    def __init__(self, path: Path, inside: str | None = None, unless: Collection[str] = ()) -> None:
        """`unless`: names that need not hold tensors, and are passed over where they do not.

        Raises `BadInput` for a file that is missing or damaged, or holds more than tensors and plain values.
        """
        self.path, self.inside, self.unless = path, inside, unless
        self.mapped: dict[str, Tensor] | None = None
        self.handed_out, self.may_close = 0, True
        self.names: dict[str, torch.dtype] = {name: value.dtype for name, value in self.load().items()}

    def load(self) -> dict[str, Tensor]:
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise BadInput("file is missing", where=self.path) from None
        except Exception as error:  # whatever a damaged file makes the reader raise
            if "mmap" not in str(error):
                raise self.refusal(error) from None
            value = self.load_whole()  # the form before torch 1.6 cannot be mapped, and is kept
            self.may_close = False
        if self.inside is not None:
            if not isinstance(value, dict) or not isinstance(value.get(self.inside), dict):
                raise BadInput(f"holds no {self.inside}", where=self.path)
            value = value[self.inside]
        if not isinstance(value, dict):
            raise BadInput("is no table of tensors", where=self.path)
        for name, entry in value.items():
            dense = isinstance(entry, Tensor) and entry.layout == torch.strided and entry.device.type == "cpu"
            if not isinstance(name, str) or not (dense or name in self.unless):
                raise BadInput(f"{name!r} is no dense tensor", where=self.path)
        return {name: entry for name, entry in value.items() if isinstance(entry, Tensor)}

    def load_whole(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.refusal(error) from None

    def refusal(self, error: Exception) -> BadInput:
        text = str(error)
        if "GLOBAL" in text:
            return BadInput(
                "the pickle wants to run code or holds more than tensors, so it is refused",
                where=self.path,
                remedy="save the tensors alone",
            )
        # torch's text is a page of advice with the reason behind its last colon.
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        return BadInput(
            f"damaged, or no file of tensors ({reason[0] if reason else type(error).__name__})", where=self.path
        )

    def __getitem__(self, name: str) -> Tensor:
        # What the reader maps is given back with the last tensor of it, so the file is opened anew now and then.
        if self.handed_out > MAPPED_BYTES and self.may_close:
            self.mapped = None
        if self.mapped is None:
            self.mapped, self.handed_out = self.load(), 0
        value = self.mapped[name]
        self.handed_out += value.nbytes
        if value.nbytes > MAPPED_BYTES and self.may_close:
            self.mapped = None
        return value

    def dtype(self, name: str) -> torch.dtype:
        return self.names[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies in one piece."""
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().data


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    names: Iterable[str],
    *,
    stem: str = "model",
    progress: Progress = nothing,
) -> None:
    """Writes the tensors into `STEM.safetensors`, or past `MAX_FILE_BYTES` into several files with an index.

    `names`: at least those that will come. One tensor is held at a time: room for the header is left in front, and what
    it does not need is filled with blanks, as the format allows.
    """
    room = 64 + sum(len(json.dumps(name)) + 120 for name in names)
    room += -room % 8
    table: dict[str, int] = {}
    files, total = 0, 0
    stream = iter(tensors)
    held = next(stream, None)
    while held is not None or not files:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        with open(folder / f"{stem}.{files}.partial", "wb") as file:
            file.seek(8 + room)
            place = 0
            while held is not None and (place == 0 or place + held[1].nbytes <= MAX_FILE_BYTES):
                name, value = held
                header[name] = {
                    "dtype": DTYPES[value.dtype],
                    "shape": list(value.shape),
                    "data_offsets": [place, place + value.nbytes],
                }
                file.write(raw(value))
                place, total, table[name] = place + value.nbytes, total + value.nbytes, files
                progress(value.nbytes)
                del value
                held = None  # so that it is gone before the next one comes
                held = next(stream, None)
            text = json.dumps(header, separators=(",", ":")).encode()
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text.ljust(room))
        files += 1
    if files == 1:
        (folder / f"{stem}.0.partial").rename(folder / f"{stem}.safetensors")
        return
    final = [f"{stem}-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    for number, name in enumerate(final):
        (folder / f"{stem}.{number}.partial").rename(folder / name)
    write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": {name: final[number] for name, number in table.items()}},
    )


class TorchWriter:
    """Writes what `torch.save` would, one tensor at a time.

    The file is first written with room for the tensors; their bytes are put where a reader says it looks for them, and
    at the end the archive's checksums are set right.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Tensor], inside: str | None = None) -> None:
        """`shapes`: a tensor of the same shape and dtype for each name, without memory perhaps."""
        sizes = {name: (value.shape, value.dtype) for name, value in shapes.items()}
        with FakeTensorMode():
            empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
        with skip_data(materialize_fake_tensors=True):
            torch.save(empty if inside is None else {inside: empty}, path)
        with FakeTensorMode():
            placed = torch.load(path, weights_only=True)
        placed = placed if inside is None else placed[inside]
        self.path = path
        self.places = {name: value.untyped_storage()._checkpoint_offset for name, value in placed.items()}
        self.checksums: dict[int, int] = {}
        self.file = open(path, "r+b")  # noqa: SIM115

    def put(self, name: str, value: Tensor) -> None:
        """Writes a tensor's bytes."""
        place, data = self.places[name], raw(value)
        self.file.seek(place)
        self.file.write(data)
        self.checksums[place] = zlib.crc32(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()

    def close(self) -> None:
        """Writes the checksums of the archive's members, behind each and in the directory at the end."""
        with zipfile.ZipFile(self.path) as archive:
            directory, members = archive.start_dir, archive.infolist()
        for member in members:
            start = member.header_offset + 30 + sum(self.numbers("<HH", member.header_offset + 26))
            entry = 46 + sum(self.numbers("<HHH", directory + 28))
            if start in self.checksums:
                places = [directory + 16]
                if self.numbers("<I", start + member.file_size) == (0x08074B50,):  # the sign of a member's trailer
                    places.append(start + member.file_size + 4)
                for place in places:
                    self.file.seek(place)
                    self.file.write(struct.pack("<I", self.checksums[start]))
            directory += entry
        self.file.close()

    def numbers(self, form: str, place: int) -> tuple[int, ...]:
        self.file.seek(place)
        return struct.unpack(form, self.file.read(struct.calcsize(form)))
