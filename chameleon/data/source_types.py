"""Types of the sources of documents: what a source expands to, what is read from it, and what a kind of source provides."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chameleon.data.webdataset import SkipHandler
from chameleon.document import Conversation, Document, ImageSource
from chameleon.tokenizers.image import ImageFile

MAX_FIELD_LENGTH = 200
"""Characters of a text that counts as a field of a record (a language, a score); longer ones are its content."""
PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Sample:
    """A document or conversation, and the key by which messages name it."""

    key: str
    content: Document | Conversation
    fields: Mapping[str, str | float] = field(default_factory=dict)
    """Other texts and numbers of its record (a language, a score), by name."""

    @property
    def text(self) -> str:
        """All text, the messages of a conversation separated by newlines."""
        if isinstance(self.content, Document):
            return self.content.text
        return "\n".join(message.content.text for message in self.content.messages)

    @property
    def images(self) -> list[ImageSource]:
        """All images, in order."""
        if isinstance(self.content, Document):
            return self.content.images
        return [image for message in self.content.messages for image in message.content.images]

    @cached_property
    def image_files(self) -> list[ImageFile]:
        """All images, in order; each is read and opened once, however many filters look at it."""
        return [ImageFile(image) for image in self.images]


def record_fields(record: Any) -> dict[str, str | float]:
    """Return the numbers and short texts of a record."""
    return {
        str(name): value
        for name, value in (record.items() if isinstance(record, dict) else ())
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= MAX_FIELD_LENGTH)
    }


@dataclass(frozen=True)
class RawShard:
    """A unit of reading, which becomes one token shard: a file, or a task of a generated source."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)
    is_file: bool = True
    """Whether `path` is a file, not the name of a task."""
    allow_paths: bool = False
    """Whether records may name images outside their folder."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether a token shard is up to date: kind, path and options, sizes and times of the files.

        Image files that records name are not looked at.
        """
        stats = []
        if self.is_file:
            path = Path(self.path)
            sidecars = [path.with_suffix(extension) for extension in (".txt", ".json")] if self.kind == "picture" else []
            stats = [[f.stat().st_size, f.stat().st_mtime_ns] for f in (path, *sidecars) if f.is_file()]
        identity = {"kind": self.kind, "path": self.absolute_path, "options": self.options, "files": stats}
        return {**identity, "allow_paths": True} if self.allow_paths else identity

    @property
    def absolute_path(self) -> str:
        return os.path.abspath(self.path) if self.is_file else self.path

    def absolute(self) -> RawShard:
        """Return the same shard with absolute paths, valid in any working directory."""
        if not self.is_file:
            return self
        path_keys = [key for key in self.options if key in ("images", "questions")]
        paths = {key: os.path.abspath(self.options[key]) for key in path_keys}
        return replace(self, path=self.absolute_path, options={**self.options, **paths})

    def name(self, extensions: tuple[str, ...]) -> str:
        """Return a readable folder name that is unique to the shard; one of the `extensions` is left out."""
        stem = Path(self.path).name
        for extension in sorted(extensions, key=len, reverse=True):
            if stem.endswith(extension):
                stem = stem.removesuffix(extension)
                break
        key = json.dumps([self.kind, self.absolute_path, sorted(self.options.items())])
        return f"{stem}-{hashlib.blake2b(key.encode(), digest_size=5).hexdigest()}"

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 for a task."""
        path = Path(self.path)
        return path.stat().st_size if self.is_file and path.is_file() else 0


@dataclass(frozen=True)
class PictureEntry:
    """A picture for training an image tokenizer, not opened yet.

    Groups are sampled with equal probability, and so are the members of a group.
    """

    name: str
    source: ImageSource
    group: str
    may_mirror: bool = True
    fields: Mapping[str, str | float] = field(default_factory=dict)
    """Other fields of the picture's record."""


@dataclass(frozen=True)
class SourceKind:
    """What a kind of source provides; listed in `chameleon.data.sources.SOURCE_KINDS`."""

    read: Callable[[RawShard, SkipHandler], Iterator[Sample]]
    """Yields the samples of a shard."""
    extensions: tuple[str, ...] = ()
    """Extensions of its files, by which the kind is guessed."""
    options: tuple[str, ...] = ()
    """Options that may follow the pattern, as `KIND:PATTERN?option=value`."""
    expand: Callable[[str], list[RawShard]] | None = None
    """The shards of a source, from what follows `KIND:`; None: files by pattern."""
    pictures: Callable[[RawShard], list[PictureEntry]] | None = None
    """The pictures of a shard for training an image tokenizer; None: those of its documents."""
