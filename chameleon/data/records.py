"""Files of records: JSON lines, JSON arrays, Parquet and CSV, plain or compressed, as an iterator of objects.

What a record says is `forms.py`'s matter. A record that cannot be read is passed to `on_skip` and passed over; a file
that ends in the middle is reported, and what came before is kept.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow import parquet

from chameleon.data.webdataset import Skip
from chameleon.document import unicode
from chameleon.errors import BadInput

Record = tuple[str, Any]
"""How messages name it, and what it holds."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
DAMAGE = (EOFError, OSError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError)
csv.field_size_limit(1 << 30)  # the library's own limit of 128 KiB is less than a text may have
ROWS = 64  # of a Parquet file held at a time: a row may hold pictures


def decode(data: bytes, where: object) -> str:
    """UTF-8 bytes to text. Raises `BadInput` naming the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 (byte {error.start})", where=where, remedy="convert it to UTF-8") from None


def strict_json(text: str, where: object) -> Any:
    """A JSON value. Raises `BadInput` for what JSON has not (NaN), for a key given twice, and for half surrogate pairs."""

    def constant(name: str) -> Any:
        raise BadInput(f"{name} is no JSON", where=where)

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"key {double!r} is there twice", where=where)
        return value

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=object_of)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})", where=where) from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed as its ending says."""
    codec = COMPRESSED.get(path.suffix.lower())
    try:
        file: Any = pyarrow.input_stream(str(path), compression=codec)
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    with file:
        yield file


def json_lines(path: Path, on_skip: Skip) -> Iterator[Record]:
    """A value a line; empty lines are none."""
    number = 0
    with opened(path) as file:
        for number, line in enumerate(lines_of(file), 1):
            key = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield key, strict_json(decode(line, key), key)
            except BadInput as error:
                on_skip(key, error.reason)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of a stream that reads blocks alone; what came before damage is given first."""
    rest: list[bytes] = []
    while block := file.read(1 << 20):
        first, *others = bytes(block).split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if last := b"".join(rest):
        yield last


def json_array(path: Path, on_skip: Skip) -> Iterator[Record]:
    """The entries of one JSON array."""
    value = json_file(path)
    if not isinstance(value, list):
        raise BadInput(
            "expected an array of records",
            where=path,
            remedy="for annotations of COCO or VQAv2 write coco:FILE or vqa:FILE",
        )
    for number, entry in enumerate(value):
        yield f"{path}, entry {number}", entry


def json_file(path: Path) -> Any:
    """The value of a whole JSON file. Raises `BadInput` naming it."""
    try:
        with opened(path) as file:
            return strict_json(decode(file.read(), path), path)
    except DAMAGE as error:
        raise BadInput(f"damaged file ({error})", where=path) from None


def parquet_rows(path: Path, on_skip: Skip) -> Iterator[Record]:
    """The rows of a Parquet file, some at a time; columns as Python values, pictures as `{"bytes": …}` perhaps."""
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            for place in range(len(batch)):
                key = f"{path}, row {number}"
                number += 1
                try:
                    row = batch.slice(place, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    on_skip(key, f"not UTF-8 ({error.reason})")
                    continue
                yield key, row


def csv_rows(path: Path, on_skip: Skip) -> Iterator[Record]:
    """The rows of a CSV or TSV file under its header; the delimiter is what the ending says."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    with opened(path) as file:
        # A row that is not UTF-8 is named when its fields are seen, so that those behind it are read.
        lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in lines_of(file))
        yield from csv_fields(csv.DictReader(lines, delimiter=delimiter, strict=True), path, on_skip)


def csv_fields(rows: csv.DictReader[str], path: Path, on_skip: Skip) -> Iterator[Record]:
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            on_skip(f"{path}, line {rows.line_num}", f"not CSV ({error})")
            continue
        if row is None:
            return
        key = f"{path}, line {rows.line_num}"
        if None in row or None in row.values():
            on_skip(key, "not as many fields as the header")
            continue
        try:
            unicode("".join((*row, *row.values())), key)
        except BadInput:
            on_skip(key, "not UTF-8")
            continue
        yield key, row


FILES = {
    "jsonl": (json_lines, (".jsonl", ".ndjson")),
    "json": (json_array, (".json",)),
    "parquet": (parquet_rows, (".parquet",)),
    "csv": (csv_rows, (".csv", ".tsv")),
}
"""Kind → its reader and endings, to which a compression's may be added."""


def endings(kind: str) -> tuple[str, ...]:
    """The endings of a kind's files, compressed ones too."""
    plain = FILES[kind][1]
    return plain if kind == "parquet" else plain + tuple(end + more for end in plain for more in COMPRESSED)


def read_records(kind: str, path: Path, on_skip: Skip) -> Iterator[Record]:
    """The records of a file. Raises `BadInput` where it is missing; damage is passed to `on_skip`."""
    try:
        yield from FILES[kind][0](path, on_skip)
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    except BadInput as error:
        if not path.is_file():
            raise
        on_skip(str(path), error.reason)
    except DAMAGE as error:
        on_skip(str(path), f"damaged file ({error})")
