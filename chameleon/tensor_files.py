"""Tensors on disk, one at a time: a checkpoint larger than memory is read and written without being held whole.

Reading: `.safetensors` files and torch's own pickles, as mappings from names to tensors that map the file into memory
for as long as a tensor lives. Pickles are read with `weights_only=True` alone, so none of them runs code. Writing: the
same two forms, tensors taken from an iterator.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


class Weights(Mapping[str, Tensor]):
    """Names and tensors, each tensor made when it is asked for."""

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it where that can be had."""
        return self[name].dtype


class Chosen(Weights):
    """Tensors of other mappings under names of their own."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        """`places`: for each name a mapping, and the name there."""
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        source, theirs = self.places[name]
        return source[theirs]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class SafetensorsFiles(Weights):
    """Tensors of one or several `.safetensors` files."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        """`places`: the file of each tensor, read only when the tensor is asked for."""
        self.places = dict(places)

    @classmethod
    def of_folder(cls, folder: Path, stem: str = "model") -> SafetensorsFiles:
        """`STEM.safetensors`, or the files that `STEM.safetensors.index.json` names.

        Raises `BadInput` naming a file that is missing, damaged, or does not hold what the index says.
        """
        index = folder / f"{stem}.safetensors.index.json"
        if not index.is_file():
            path = folder / f"{stem}.safetensors"
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
        path = self.places[name]
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"damaged ({error})", where=path) from None
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of all the files."""
        return sum(path.stat().st_size for path in set(self.places.values()))


def names_in(path: Path) -> set[str]:
    """Names of a `.safetensors` file's tensors."""
    if not path.is_file():
        raise BadInput("file is missing", where=path, remedy="copy the whole folder again")
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"damaged ({error})", where=path) from None


class TorchFile(Weights):
    """Tensors of a file that `torch.save` wrote, at the top or under `inside`."""

    def __init__(self, path: Path, inside: str | None = None) -> None:
        """Raises `BadInput` for a file that is missing or damaged, or holds more than tensors and plain values."""
        self.path, self.inside = path, inside
        self.mapped: dict[str, Tensor] | None = None
        self.handed_out, self.may_close = 0, True
        self.dtypes = {name: value.dtype for name, value in self.load().items()}

    def load(self) -> dict[str, Tensor]:
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise BadInput("file is missing", where=self.path) from None
        except RuntimeError:  # the form before torch 1.6 cannot be mapped, and is kept whole
            value = self.load_whole()
            self.may_close = False
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise self.refusal(error) from None
        if self.inside is not None:
            if not isinstance(value, dict) or not isinstance(value.get(self.inside), dict):
                raise BadInput(f"holds no {self.inside}", where=self.path)
            value = value[self.inside]
        if not isinstance(value, dict) or not all(isinstance(entry, Tensor) for entry in value.values()):
            raise BadInput("is no table of tensors", where=self.path)
        return value

    def load_whole(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise self.refusal(error) from None

    def refusal(self, error: Exception) -> BadInput:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            return BadInput(
                "the pickle wants to run code or holds more than tensors, so it is refused",
                where=self.path,
                remedy="save the tensors alone",
            )
        return BadInput(f"damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})", where=self.path)

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

    def __contains__(self, name: object) -> bool:
        return name in self.dtypes

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes[name]

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


def write_torch(
    path: Path,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    inside: str | None = None,
    progress: Progress = nothing,
) -> None:
    """Writes what `torch.save` would, one tensor at a time. `shapes`: a tensor of the same shape and dtype for each name.

    The file is first written with room for the tensors, and their bytes are put where a reader says it looks for them.
    """
    sizes = {name: (value.shape, value.dtype) for name, value in shapes.items()}
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(empty if inside is None else {inside: empty}, path)
    with FakeTensorMode():
        placed = torch.load(path, weights_only=True)
    if inside is not None:
        placed = placed[inside]
    with open(path, "r+b") as file:
        for name, value in tensors:
            file.seek(placed[name].untyped_storage()._checkpoint_offset)
            file.write(raw(value))
            progress(value.nbytes)
