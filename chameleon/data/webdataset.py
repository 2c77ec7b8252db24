"""Reads WebDataset shards: tar archives in which files that share a stem are one sample.

Python's tarfile stops at the first damaged header. This reader continues at the next valid one, since members start at
multiples of 512 bytes, and reports how many bytes were unreadable. (Grouping files into samples is webdataset's.)
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from webdataset.tariterators import group_by_keys

from chameleon.errors import BadInput


class SkipHandler(Protocol):
    """Called for each sample, or part of a file, that cannot be read."""

    def __call__(self, where: str, reason: str, num_bytes: int = 0) -> None:
        """num_bytes: bytes of a damaged file that could not be read."""


BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
"""Larger members are skipped: no image or text is that large, but a damaged header may claim any size."""
DAMAGE = "\0damage"
"""Extension of the entry that stands for a damaged place; no file name contains NUL."""
LONG_NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
TYPES_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
"""Members of these types have no data, whatever size their header has."""


def raise_on_skip(where: str, reason: str, num_bytes: int = 0) -> None:
    """Raise `BadInput` instead of skipping: the strict `SkipHandler`."""
    raise BadInput(reason, where=where, remedy="repair or remove it")


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    data: bytes
    offset: int = 0
    """Its first byte in the archive."""


class MemberBytes(bytes):
    """The bytes of a file of an archive that is not compressed, and where they lie in it."""

    path: str
    offset: int

    @classmethod
    def of(cls, member: Member, path: Path) -> MemberBytes:
        data = cls(member.data)
        data.path, data.offset = str(path), member.offset
        return data


@dataclass(frozen=True)
class Damage:
    """A place in an archive that could not be read."""

    reason: str
    num_bytes: int
    """Bytes skipped until the next valid header, or the end."""


class TarReader:
    """Reads the members of a tar archive one after the other, from a stream that cannot seek."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.offset = 0

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; fewer only at the end of the stream."""
        chunks = []
        while count and (chunk := self.stream.read(min(count, 1 << 20))):
            chunks.append(chunk)
            count -= len(chunk)
        data = b"".join(chunks)
        self.offset += len(data)
        return data

    def entries(self) -> Iterator[Member | Damage]:
        """Yield the archive's files, and each place that could not be read."""
        extended_name: str | None = None
        has_end_mark, num_zero_blocks = False, 0
        try:
            while block := self.read(BLOCK):
                if block == bytes(BLOCK):
                    num_zero_blocks += 1
                    continue
                has_end_mark |= num_zero_blocks >= 2
                num_zero_blocks = 0
                header = parse_header(block)
                if header is None:
                    start = self.offset - len(block)
                    header, num_skipped = self.find_next_header(len(block))
                    if header is not None or not has_end_mark:  # whatever follows the end mark does not count
                        yield Damage(f"damaged header at byte {start}", num_skipped)
                    extended_name = None
                    if header is None:
                        return
                size = 0 if header.type in TYPES_WITHOUT_DATA else header.size
                name, extended_name = extended_name or header.name, None
                if not 0 <= size <= MAX_MEMBER_BYTES:
                    limit = MAX_MEMBER_BYTES >> 20
                    reason = f"member {name} claims {size} bytes, over the limit of {limit} MiB"
                    yield Damage(reason, self.skip(size))
                    continue
                start = self.offset
                data = self.read(size)
                if len(data) < size:
                    yield Member(name, b"")  # so that the sample before it is known to be complete
                    yield Damage(f"truncated archive, in member {name}", len(data))
                    return
                self.read(-size % BLOCK)
                if header.type in LONG_NAME_TYPES:
                    extended_name = parse_extended_name(header.type, data)
                elif header.isreg():
                    yield Member(name, data, start)
        except (EOFError, OSError, zlib.error) as error:  # of the decompressor
            yield Damage(f"truncated archive, after byte {self.offset} ({error})", 0)
            return
        if not has_end_mark and not num_zero_blocks:
            yield Damage("truncated archive, without the mark of its end", 0)

    def find_next_header(self, num_skipped: int) -> tuple[tarfile.TarInfo | None, int]:
        """Return the next valid header, or None, and the bytes skipped before it, `num_skipped` included.

        Zeros at the end of the archive are its end mark and do not count.
        """
        num_zeros = 0
        while block := self.read(BLOCK):
            if block == bytes(len(block)):
                num_zeros += len(block)
                continue
            if len(block) == BLOCK and (header := parse_header(block)) is not None:
                return header, num_skipped + num_zeros
            num_skipped, num_zeros = num_skipped + num_zeros + len(block), 0
        return None, num_skipped

    def skip(self, size: int) -> int:
        """Skip a member's data and return how many bytes there were. Damaged sizes may be negative."""
        start, end = self.offset, self.offset + max(0, size + -size % BLOCK)
        while self.offset < end and self.read(min(end - self.offset, 1 << 20)):
            pass
        return self.offset - start


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in a block of 512 bytes, or None where it is not a valid one."""
    try:
        return tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return None


def parse_extended_name(kind: bytes, data: bytes) -> str | None:
    """Return the name in a GNU long-name entry or a pax header, or None where it has none."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    for record in data.split(b"\n"):  # "LENGTH path=NAME"
        key, _, value = record.partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def open_archive(path: Path) -> IO[bytes]:
    """Open a tar archive, decompressed if it is gzipped. Raise `BadInput` where it is missing."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise BadInput("no such shard", where=path) from None
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_gzip else file  # type: ignore[return-value]


def read_samples(path: Path, on_skip: SkipHandler = raise_on_skip) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as dictionaries from extension to bytes, with `__key__` and `__url__`.

    Each damaged place is reported to `on_skip`, and so are the samples on both sides of it, which may lack members.
    """
    damages: deque[Damage] = deque()

    def members() -> Iterator[dict[str, Any]]:
        for index, entry in enumerate(TarReader(stream).entries()):
            if isinstance(entry, Member):
                data = entry.data if is_compressed else MemberBytes.of(entry, path)
                yield {"fname": entry.name, "data": data, "__url__": str(path)}
            else:  # as a sample of its own, so that those before and after it are not joined
                damages.append(entry)
                yield {"fname": f"\0{index}.{DAMAGE}", "data": b"", "__url__": str(path)}

    def on_duplicate(error: Exception) -> bool:
        on_skip(str(path), str(error.args[0]))
        return True

    def skip_incomplete(sample: dict[str, Any]) -> None:
        on_skip(f"{path}, sample {sample['__key__']}", "may lack members, next to a damaged place in the archive")

    with open_archive(path) as stream:
        is_compressed = isinstance(stream, gzip.GzipFile)
        previous: dict[str, Any] | None = None  # held back, since damage after it may have taken some of its members
        is_after_damage = False
        for sample in group_by_keys(members(), handler=on_duplicate):
            if DAMAGE in sample:
                damage = damages.popleft()
                on_skip(str(path), damage.reason, damage.num_bytes)
                if previous is not None:
                    skip_incomplete(previous)
                previous, is_after_damage = None, True
            elif is_after_damage:
                skip_incomplete(sample)
                is_after_damage = False
            else:
                if previous is not None:
                    yield previous
                previous = sample
        if previous is not None:
            yield previous
