"""Writing files and folders whole or not at all, and their checksums."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from chameleon.errors import BadInput


@contextmanager
def partial_folder(place: Path, target: Path) -> Iterator[Path]:
    """A fresh folder at `place` that is gone when the block ends. Raises `BadInput` about `target` where writing fails."""
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
    except (OSError, SafetensorError) as error:
        raise BadInput(f"could not be written ({error})", where=target, remedy="nothing was changed there") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `folder` when the block ends well; else nothing of it stays.

    Raises `BadInput` where the disk is full or the place cannot be written; what was at `folder` before is then kept.
    """
    folder = folder.resolve()  # so that a link stays one, and "." has a name
    old = folder.with_name(f".{folder.name}.old")
    remove_left_over(folder)
    with partial_folder(folder.with_name(f".{folder.name}.partial-{os.getpid()}"), folder) as partial:
        yield partial
        if old.exists():  # a process was killed between the lines below
            shutil.rmtree(old) if folder.exists() else old.rename(folder)
        try:
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def remove_left_over(folder: Path) -> None:
    """Removes what processes that were killed while they wrote `folder` have left."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files move into `folder` when the block ends well, each replacing its namesake.

    Other files of `folder` stay. Raises `BadInput` where the disk is full or the place cannot be written; what was there
    before is then kept. Files are whole at any time, but a process that is killed while they move leaves old beside new.
    """
    with partial_folder(folder / f".partial-{os.getpid()}", folder) as partial:
        yield partial
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `BadInput` where it is missing or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("file is missing", where=path, remedy="is this folder a bundle, and whole?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})", where=path) from None
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


RECORD, EVENTS = "run.json", "events.jsonl"
"""Files of a run's folder: what it is, and what happened to it."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, a JSON object a line; a line that a kill has torn is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
