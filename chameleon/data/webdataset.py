"""Reading WebDataset shards: tar archives in which files that share a stem are one sample.

A member that cannot be read, or an archive that ends in the middle, is reported to `on_skip` and passed over; what
came before is kept, but for the sample the damage lies in.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from webdataset.tariterators import group_by_keys

from chameleon.errors import BadInput

Skip = Callable[[str, str], None]


def stop(where: str, why: str) -> None:
    """The strict way to skip: raises `BadInput`."""
    raise BadInput(why, where=where, remedy="repair or remove it")


class Member(tarfile.TarInfo):
    """A header whose damage is an error; tarfile itself takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the blocks that end every whole archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def members(path: Path, on_damage: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The files of an archive; `on_damage` is told why it ends early."""
    last, opened = "its beginning", None
    try:
        with tarfile.open(path, "r|*", tarinfo=Member) as archive:
            for info in archive:
                if info.isfile():
                    opened = info.name
                    file = archive.extractfile(info)
                    assert file is not None
                    yield {"fname": info.name, "data": file.read(), "__url__": str(path)}
                    last, opened = info.name, None
    except FileNotFoundError:
        raise BadInput("no such shard", where=path) from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if opened is not None:  # its header is known, so the sample before it is whole
            yield {"fname": opened, "data": b"", "__url__": str(path)}
        on_damage(f"corrupt or truncated archive after {last} ({error})")


def read_samples(path: Path, on_skip: Skip = stop) -> Iterator[dict[str, Any]]:
    """Samples of one shard as dictionaries from extension to bytes, with `__key__` and `__url__`."""
    damage: list[str] = []

    def doubled(error: Exception) -> bool:
        on_skip(str(path), str(error.args[0]))
        return True

    held = None  # one sample waits, as damage behind it may have taken files of it
    for sample in group_by_keys(members(path, damage.append), handler=doubled):
        if held is not None:
            yield held
        held = sample
    if damage:
        on_skip(str(path), damage[0] + (f"; sample {held['__key__']} may lack files and is left out" if held else ""))
    elif held is not None:
        yield held
