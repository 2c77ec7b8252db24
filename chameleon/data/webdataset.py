"""Reading WebDataset shards: tar archives in which files that share a stem are one sample.

A member that cannot be read, or an archive that ends in the middle, is reported to `on_skip` and passed over; what
came before is kept.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys

from chameleon.errors import BadInput

Skip = Callable[[str, str], None]


def stop(where: str, why: str) -> None:
    """The strict way to skip: raises `BadInput`."""
    raise BadInput(why, where=where, remedy="repair or remove it, or read without --strict")


def members(path: Path, on_skip: Skip) -> Iterator[dict[str, Any]]:
    last = "its beginning"
    try:
        with tarfile.open(path, "r|*") as archive:
            for info in archive:
                if info.isfile():
                    file = archive.extractfile(info)
                    assert file is not None
                    yield {"fname": info.name, "data": file.read(), "__url__": str(path)}
                    last = info.name
    except FileNotFoundError:
        raise BadInput("no such shard", where=path) from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        on_skip(str(path), f"corrupt or truncated archive after {last} ({error})")


def read_samples(path: Path, on_skip: Skip = stop) -> Iterator[dict[str, Any]]:
    """Samples of one shard as dictionaries from extension to bytes, with `__key__` and `__url__`."""
    yield from group_by_keys(members(path, on_skip))
