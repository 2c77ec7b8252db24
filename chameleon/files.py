"""Writing files and folders atomically, their checksums, and the files that a training run keeps."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from chameleon.errors import BadInput

RUN_FILE, EVENTS_FILE = "run.json", "events.jsonl"
"""In the folder of a training run: its recipe and start, and one JSON line for each alarm, skipped step or rollback."""


@contextmanager
def temporary_folder(path: Path, target: Path) -> Iterator[Path]:
    """Create an empty folder and remove it when the block ends. Raise `BadInput` about `target` where writing fails."""
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        yield path
    except (OSError, SafetensorError) as error:
        raise BadInput(f"could not be written ({error})", where=target, remedy="nothing was changed there") from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raise `BadInput` where something is there already; an empty folder may be."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("is there already", where=folder, remedy="name a new folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to that replaces `folder` if the block succeeds, and disappears if it fails.

    Raises `BadInput` where the disk is full or the folder cannot be written; the previous contents then stay.
    """
    folder = folder.resolve()  # a symbolic link stays one, and "." gets a name
    old = folder.with_name(f".{folder.name}.old")
    remove_stale_partials(folder)
    with temporary_folder(folder.with_name(f".{folder.name}.partial-{os.getpid()}"), folder) as partial:
        yield partial
        if old.exists():  # a process was killed between the two renames below
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


def remove_stale_partials(folder: Path) -> None:
    """Remove partial folders left by processes that were killed while writing `folder`."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        process_id = path.name.rpartition("-")[2]
        if process_id.isdigit() and not is_running(int(process_id)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """Return whether a process of that number exists."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@contextmanager
def atomic_update(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files move into `folder` if the block succeeds, each replacing the file of its name.

    Other files of `folder` stay. Raises `BadInput` where the disk is full or the folder cannot be written; the previous
    files then stay. Each file is replaced atomically, but a process killed during the moves leaves old beside new files.
    """
    with temporary_folder(folder / f".partial-{os.getpid()}", folder) as partial:
        yield partial
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to that replaces `path` if the block succeeds. Raise `BadInput` where writing fails."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise BadInput(f"could not be written ({error})", where=path) from None
    finally:
        with suppress(OSError):  # of a file system that is read-only
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise `BadInput` where the file is missing or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("file is missing", where=path, remedy="is this folder a complete bundle?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})", where=path) from None
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of damaged data may have lone surrogates


def cache_folder() -> Path:
    """Return the folder for what is measured or compiled once: $CHAMELEON_CACHE, or open-chameleon in the user's cache."""
    own = os.environ.get("CHAMELEON_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open-chameleon"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


VERIFIED = "verified.json"
"""Beside files with checksums: in which state they were verified."""


def verify_once(folder: Path, sha256: Mapping[str, str], verify: Callable[[], None]) -> None:
    """Call `verify`, which compares the files of a folder with their checksums, unless it was done for them as they are.

    That is noted in the folder, with the sizes, times and inodes of the files; copies are verified anew. Raises what
    `verify` raises.
    """
    note = folder / VERIFIED
    try:
        stats = {name: (folder / name).stat() for name in sha256}
    except OSError:  # a file is missing, which `verify` tells
        verify()
        return
    of_files = {
        name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sha256[name]] for name, stat in stats.items()
    }
    state = json.dumps(of_files).encode()
    if note.is_file() and note.read_bytes() == state:
        return
    verify()
    with suppress(BadInput), atomic_file(note) as partial:  # the folder may not be writable
        partial.write_bytes(state)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run. A last line cut off by a killed process is ignored."""
    events = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:  # a text may have other line ends
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
