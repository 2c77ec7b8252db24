"""Files of records: JSON lines, JSON arrays, Parquet and CSV, plain or compressed, as an iterator of objects.

What a record means is decided in `forms.py`. A record that cannot be read is passed to `on_skip`; of a truncated or damaged
file, the records before the damage are read.
"""

from __future__ import annotations

import codecs
import csv
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow import parquet

from chameleon.data.webdataset import SkipHandler, raise_on_skip
from chameleon.document import check_unicode
from chameleon.errors import BadInput

Record = tuple[str, Any]
"""How messages name the record, and its value."""
CODECS = {".gz": "gzip", ".zst": "zstd"}
DAMAGE_ERRORS = (EOFError, OSError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError)
MAX_LINE_BYTES = 64 << 20
"""Longer lines are skipped, so that a damaged or malicious compressed file cannot fill the memory."""
MAX_JSON_BYTES = 4 << 30
"""An annotation file is read as a whole and may not be larger."""
READ_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 64
"""Rows of a Parquet file that are read at a time: each may contain images."""
csv.field_size_limit(MAX_LINE_BYTES)  # the library's default of 128 KiB is less than a text may have


def decode_utf8(data: bytes, where: object) -> str:
    """Decode UTF-8. Raise `BadInput` that names the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 (byte {error.start})", where=where, remedy="convert it to UTF-8") from None


def parse_json(text: str, where: object) -> Any:
    """Parse JSON strictly. Raise `BadInput` for NaN, for a repeated key, and for nesting that is too deep."""

    def refuse_constant(name: str) -> Any:
        raise BadInput(f"{name} is not JSON", where=where)

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"key {repeated!r} occurs twice", where=where)
        return value

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=build_object)
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:  # also for an integer of thousands of digits
        raise BadInput(f"not JSON ({error})", where=where) from None


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed by its extension."""
    codec = CODECS.get(path.suffix.lower())
    try:
        file: Any = pyarrow.input_stream(str(path), compression=codec)
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    with file:
        yield file


def read_json_lines(path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Read one value a line; empty lines are ignored."""
    with open_decompressed(path) as file:
        for line_number, line in enumerate(split_lines(file), 1):
            where = f"{path}, line {line_number}"
            if line is None:
                on_skip(where, f"over the limit of {MAX_LINE_BYTES >> 20} MiB")
            elif line.strip():
                try:
                    yield where, parse_json(decode_utf8(line, where), where)
                except BadInput as error:
                    on_skip(where, error.reason)


def split_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yield the lines of a stream that is only read in blocks; None for a line longer than `MAX_LINE_BYTES`.

    Lines before damage in the stream are yielded before the error is raised.
    """
    line: list[bytes] = []
    length = 0
    while block := file.read(READ_BYTES):
        first, *others = bytes(block).split(b"\n")
        length += len(first)
        if length <= MAX_LINE_BYTES:
            line.append(first)
        else:
            line.clear()
        if others:
            yield b"".join(line) if length <= MAX_LINE_BYTES else None
            yield from others[:-1]
            line, length = [others[-1]], len(others[-1])
    if length > MAX_LINE_BYTES:
        yield None
    elif last := b"".join(line):
        yield last


def read_json_array(path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Read the elements of one JSON array, one at a time."""
    index = 0
    try:
        with open_decompressed(path) as file:
            for element in split_array(file, path):
                where = f"{path}, entry {index}"
                yield where, parse_json(element, where)
                index += 1
    except DAMAGE_ERRORS as error:
        raise BadInput(f"damaged file ({error})", where=path) from None


def split_array(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yield the text of each element of a JSON array. Raise `BadInput` where it is none, or one is too long."""
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")().decode
    text, at_end, expected = "", False, "["
    while True:
        text = text.lstrip()
        if expected == "]" and text[:1] == "]":  # right after the start, or after an element
            if text[1:].strip() or file.read(1).strip():
                raise BadInput("not JSON (more after the end of the array)", where=path)
            return
        if expected == "[" and text:
            if text[0] != "[":
                raise BadInput(
                    "expected an array of records",
                    where=path,
                    remedy="for annotations of COCO or VQAv2 write coco:FILE or vqa:FILE",
                )
            text, expected = text[1:], "]"
            continue
        end = end_of_element(decoder, text, path, at_end=at_end)
        if (len(text) if end is None else end) > MAX_LINE_BYTES:
            raise BadInput(f"over the limit of {MAX_LINE_BYTES >> 20} MiB for a record", where=path)
        if end is not None:
            yield text[:end]
            text = text[end:].lstrip()
            text, expected = (text[1:], "element") if text[0] == "," else (text, "]")
            continue
        if at_end:
            raise BadInput("not JSON (the file ends within the array)", where=path)
        block = bytes(file.read(max(READ_BYTES, len(text))))  # twice as much each time, else long elements take long
        at_end = not block
        text += decode(block, at_end)


def end_of_element(decoder: json.JSONDecoder, text: str, path: Path, *, at_end: bool) -> int | None:
    """Return where the first element of a text ends; None where more text is needed to know.

    Raises `BadInput` where no text could complete it.
    """
    if not text or text[0] in ",]":
        if text:
            raise BadInput("not JSON (an element is missing)", where=path)
        return None
    try:
        end = decoder.raw_decode(text)[1]
    except (ValueError, RecursionError) as error:
        if at_end or isinstance(error, RecursionError):
            raise BadInput(f"not JSON ({error})", where=path) from None
        return None
    rest = text[end:].lstrip()
    if not at_end and (not rest or text[end] in ".eE"):  # a number may go on
        return None
    if rest[:1] not in (",", "]"):
        raise BadInput("not JSON (expected a comma or the end of the array)", where=path)
    return end


def read_json_file(path: Path) -> Any:
    """Return the value of a complete JSON file. Raise `BadInput` that names it."""
    blocks, length = [], 0
    try:
        with open_decompressed(path) as file:
            while block := file.read(READ_BYTES):
                blocks.append(bytes(block))
                length += len(block)
                if length > MAX_JSON_BYTES:
                    limit = f"over the limit of {MAX_JSON_BYTES >> 20} MiB for one JSON value"
                    raise BadInput(limit, where=path, remedy="convert it to JSON lines")
            return parse_json(decode_utf8(b"".join(blocks), path), path)
    except DAMAGE_ERRORS as error:
        raise BadInput(f"damaged file ({error})", where=path) from None


def read_parquet(path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Read the rows of a Parquet file, some at a time, with columns as Python values (images may be `{"bytes": …}`)."""
    row_index = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for index_in_batch in range(len(batch)):
                where = f"{path}, row {row_index}"
                row_index += 1
                try:
                    row = batch.slice(index_in_batch, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    on_skip(where, f"not UTF-8 ({error.reason})")
                    continue
                yield where, row


def read_csv(path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file with a header."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    with open_decompressed(path) as file:
        # Invalid UTF-8 is reported when the fields of its row are checked, so that later rows are read.
        reader = csv.DictReader(csv_lines(file, path, on_skip), delimiter=delimiter, strict=True)
        yield from csv_rows(reader, path, on_skip)


def csv_lines(file: IO[bytes], path: Path, on_skip: SkipHandler) -> Iterator[str]:
    """Yield the lines of a stream, empty ones in place of those over the limit, which are reported."""
    for line_number, line in enumerate(split_lines(file), 1):
        if line is None:
            on_skip(f"{path}, line {line_number}", f"over the limit of {MAX_LINE_BYTES >> 20} MiB")
        yield (line or b"").decode("utf-8", "surrogateescape") + "\n"


def csv_rows(reader: csv.DictReader[str], path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Yield the valid rows of a reader."""
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            on_skip(f"{path}, line {reader.line_num}", f"not CSV ({error})")
            continue
        if row is None:
            return
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            on_skip(where, "not as many fields as the header")
            continue
        try:
            check_unicode("".join((*row, *row.values())), where)
        except BadInput:
            on_skip(where, "not UTF-8")
            continue
        yield where, row


RECORD_FILES = {
    "jsonl": (read_json_lines, (".jsonl", ".ndjson")),
    "json": (read_json_array, (".json",)),
    "parquet": (read_parquet, (".parquet",)),
    "csv": (read_csv, (".csv", ".tsv")),
}
"""Kind of file → its reader and extensions, to which that of a codec may be added."""


def extensions(kind: str) -> tuple[str, ...]:
    """Return the file extensions of a kind, those of compressed files included."""
    plain = RECORD_FILES[kind][1]
    return plain if kind == "parquet" else plain + tuple(extension + codec for extension in plain for codec in CODECS)


def read_record_file(kind: str, path: Path, on_skip: SkipHandler) -> Iterator[Record]:
    """Read the records of a file. Raise `BadInput` where it is missing; damage is passed to `on_skip`."""
    try:
        yield from RECORD_FILES[kind][0](path, on_skip)
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    except BadInput as error:
        if on_skip is raise_on_skip or not path.is_file():
            raise
        on_skip(str(path), error.reason)
    except DAMAGE_ERRORS as error:
        on_skip(str(path), f"damaged file ({error})")
