"""Files of records: JSON lines, JSON arrays, Parquet and CSV, plain or compressed, as an iterator of objects.

What a record means is decided in `forms.py`. A record that cannot be read is passed to `on_skip`; of a truncated or damaged
file, the records before the damage are read.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
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
LONGEST_TOKEN = 16
"""Characters of what JSON allows at most between two places at which a parser can fail, strings apart."""
PARQUET_BATCH_ROWS = 64
"""Rows of a Parquet file that are read at a time: each may contain images."""
BLANKS = re.compile(r"[ \t\n\r]*")
csv.field_size_limit(MAX_LINE_BYTES)  # the library's default of 128 KiB is less than a text may have


def decode_utf8(data: bytes, where: object) -> str:
    """Decode UTF-8. Raise `BadInput` that names the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 (byte {error.start})", where=where, remedy="convert it to UTF-8") from None


def strict_decoder(where: object) -> json.JSONDecoder:
    """Return a decoder that raises `BadInput` for NaN and for a repeated key."""

    def refuse_constant(name: str) -> Any:
        raise BadInput(f"{name} is not JSON", where=where)

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"key {repeated!r} occurs twice", where=where)
        return value

    return json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=build_object)


def parse_json(text: str, where: object) -> Any:
    """Parse JSON strictly. Raise `BadInput` for NaN, for a repeated key, and for nesting that is too deep."""
    try:
        return strict_decoder(where).decode(text)
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
    try:
        with open_decompressed(path) as file:
            text = JsonStream(file, path)
            if text.next_character() != "[":
                raise BadInput(
                    "expected an array of records",
                    where=path,
                    remedy="for annotations of COCO or VQAv2 write coco:FILE or vqa:FILE",
                )
            text.position += 1
            end_mark = text.next_character()
            index = 0
            while end_mark != "]":
                where = f"{path}, entry {index}"
                yield where, text.next_value(where)
                end_mark = text.next_character()
                if end_mark not in (",", "]"):
                    raise BadInput("not JSON (expected a comma or the end of the array)", where=path)
                text.position += end_mark == ","
                index += 1
            text.position += 1
            if text.next_character():
                raise BadInput("not JSON (more after the end of the array)", where=path)
    except DAMAGE_ERRORS as error:
        raise BadInput(f"damaged file ({error})", where=path) from None


class JsonStream:
    """JSON that is read from a file value by value. Only what has not been parsed yet is held."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.position = "", 0
        self.damage: UnicodeDecodeError | None = None
        """What comes after `text` where that is no UTF-8."""

    def read_more(self) -> bool:
        """Read at least as much again as is left; return whether there was more. Raise `BadInput` past the limit."""
        rest = self.text[self.position :]
        if len(rest) > MAX_LINE_BYTES:
            raise self.over_limit()
        if self.damage is not None:
            raise self.damage
        block = bytes(self.file.read(max(READ_BYTES, len(rest))))
        try:
            decoded = self.decode(block, not block)
        except UnicodeDecodeError as error:
            self.damage, decoded = error, error.object[: error.start].decode()
        self.text, self.position = rest + decoded, 0
        return bool(block)

    def over_limit(self) -> BadInput:
        return BadInput(f"over the limit of {MAX_LINE_BYTES >> 20} MiB for a record", where=self.path)

    def next_character(self) -> str:
        """Go to the next character that is no blank, and return it; "" at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.position)
            assert blanks is not None  # it may be empty
            self.position = blanks.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""

    def next_value(self, where: object) -> Any:
        """Parse the value that comes next and go past it. Raise `BadInput` where there is none."""
        if self.next_character() in (",", "]", ""):
            raise BadInput("not JSON (an element is missing)", where=where)
        decoder = strict_decoder(where)
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except BadInput:
                raise
            except (ValueError, RecursionError) as error:
                if not self.may_be_cut(error) or not self.read_more():
                    raise BadInput(f"not JSON ({error})", where=where) from None
                continue
            length = end - self.position
            if length > MAX_LINE_BYTES:
                raise self.over_limit()
            is_number = isinstance(value, (int, float))
            if is_number and self.text[end : end + 1] in ("", ".", "e", "E") and self.read_more():
                continue  # the digits so far may not have been all
            self.position += length
            return value

    def may_be_cut(self, error: ValueError | RecursionError) -> bool:
        """Return whether a value could not be parsed since the rest of it has not been read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.pos >= len(self.text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")


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
