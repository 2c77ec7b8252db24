"""Sources: where documents and pictures come from, one small reader for each kind.

A source is a path or glob pattern, `KIND:PATTERN` to say the kind, or `emoji:TASK?split=train&per_concept=8&seed=0` for
the embedded set. It expands to raw shards; each raw shard becomes one token shard. A reader is a function from a raw
shard to samples, entered in `READERS`; the kind is guessed from the file's ending by `ENDINGS`.

A sample that cannot be read is passed to `on_skip(where, why)` and passed over; `stop` as `on_skip` makes reading strict.
"""

from __future__ import annotations

import base64
import glob
import gzip
import hashlib
import inspect
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from chameleon.data import emoji
from chameleon.data.webdataset import Skip, read_samples, stop
from chameleon.document import Conversation, Document, Image, Message, Part, Text, from_json, unicode
from chameleon.errors import BadInput

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TEXT_ENDINGS = (".txt", ".md", ".py", ".c", ".h", ".js", ".rs", ".java", ".go", ".html", ".css")
ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "jsonl": (".jsonl", ".jsonl.gz"),
    "picture": PICTURE_ENDINGS,
    "text": TEXT_ENDINGS,
}


@dataclass(frozen=True)
class Sample:
    """A document or conversation and the key by which messages name it."""

    key: str
    content: Document | Conversation


@dataclass(frozen=True)
class RawShard:
    """One unit of reading: a file, or a task over the embedded set."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells whether a token shard was made of this: kind, path and options, sizes and times of the files.

        Pictures that a document in JSON names are not looked at.
        """
        files = []
        if self.kind != "emoji":
            path = Path(self.path)
            for file in (path, path.with_suffix(".txt")) if self.kind == "picture" else (path,):
                if file.is_file():
                    files.append([file.stat().st_size, file.stat().st_mtime_ns])
        return {"kind": self.kind, "path": self.place, "options": self.options, "files": files}

    @property
    def place(self) -> str:
        """The path in full, however it was given."""
        return self.path if self.kind == "emoji" else os.path.abspath(self.path)

    @property
    def name(self) -> str:
        """A folder name for what is made of the shard: readable, and apart from those of all other shards."""
        stem = Path(self.path).name
        for ending in sorted((end for ends in ENDINGS.values() for end in ends), key=len, reverse=True):
            if stem.endswith(ending):
                stem = stem.removesuffix(ending)
                break
        whole = json.dumps([self.kind, self.place, sorted(self.options.items())])
        return f"{stem}-{hashlib.blake2b(whole.encode(), digest_size=5).hexdigest()}"


def expand(source: str) -> list[RawShard]:
    """The raw shards of a source, sorted. Raises `BadInput` where nothing matches or the kind cannot be told."""
    kind, sign, rest = source.partition(":")
    if kind == "emoji" and sign:
        task, _, options = rest.partition("?")
        shard = RawShard("emoji", task or "pairs", dict(parse_qsl(options)))
        emoji_task(shard)
        return [shard]
    given = kind if sign and kind in READERS else None
    pattern = rest if given else source
    paths = sorted(glob.glob(pattern, recursive=True))
    if paths == [pattern] and Path(pattern).is_dir():
        paths = sorted(files_of(Path(pattern), given))
    if not paths:
        raise BadInput("no file matches", where=source, remedy="check the path or pattern")
    shards = []
    for path in paths:
        found = given or guess(path)
        if found is None:
            raise BadInput(
                "kind not known from its ending", where=path, remedy=f"write KIND:PATH, KIND of {', '.join(READERS)}"
            )
        shards.append(RawShard(found, path))
    return shards


def files_of(folder: Path, given: str | None) -> Iterator[str]:
    """The files of a folder that have a reader, or that of the `given` kind; captions beside pictures are not texts."""
    for path in folder.rglob("*"):
        kind = guess(path.name)
        # Naming the kind also takes files of unknown endings, but for pictures, which lie among captions and notes.
        if not path.is_file() or (kind is None and given in (None, "picture")) or (kind and given not in (None, kind)):
            continue
        if kind == "text" and any(path.with_suffix(ending).is_file() for ending in PICTURE_ENDINGS):
            continue
        yield str(path)


def guess(path: str) -> str | None:
    """The kind of reader for a file name, or None."""
    lower = path.lower()
    return next((kind for kind, endings in ENDINGS.items() if lower.endswith(endings)), None)


def read(shard: RawShard, on_skip: Skip = stop) -> Iterator[Sample]:
    """The samples of a raw shard, in order."""
    return READERS[shard.kind](shard, on_skip)


def read_webdataset(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """Image–text shards: a picture beside `.txt` (caption) or `.json` (`caption`, or a document or conversation)."""
    for sample in read_samples(Path(shard.path), on_skip):
        key = f"{shard.path}, sample {sample['__key__']}"
        try:
            yield Sample(key, webdataset_content(sample, key))
        except BadInput as error:
            on_skip(key, error.reason)


def webdataset_content(sample: dict[str, Any], key: str) -> Document | Conversation:
    fields = {}
    if "json" in sample:
        try:
            fields = json.loads(sample["json"])
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInput(f"sidecar is not JSON ({error})", where=key) from None
        if not isinstance(fields, dict):
            raise BadInput("sidecar is not an object", where=key)
    if "parts" in fields or "messages" in fields:
        return with_members(from_json(fields, where=key), sample, key)
    pictures = [sample[end[1:]] for end in PICTURE_ENDINGS if end[1:] in sample]
    parts: list[Part] = [Image(as_data_url(data)) for data in pictures[:1]]
    caption = fields.get("caption") or fields.get("name")
    if "txt" in sample:
        caption = decode(sample["txt"], key).strip()
    if caption:
        parts.append(Text(unicode(str(caption), key)))
    if not parts:
        raise BadInput("neither picture nor text", where=key)
    return Document(tuple(parts))


def with_members(content: Document | Conversation, sample: dict[str, Any], key: str) -> Document | Conversation:
    """The content with pictures named as members of the sample put in. A shard may name no other files."""
    stem = Path(sample["__key__"]).name

    def put(part: Part) -> Part:
        if not isinstance(part, Image) or str(part.image).startswith("data:"):
            return part
        member = Path(str(part.image)).name
        data = sample.get(member.removeprefix(f"{stem}.").lower()) if member.startswith(f"{stem}.") else None
        if not isinstance(data, bytes):
            raise BadInput(f"no member {part.image} in this sample", where=key)
        return Image(as_data_url(data))

    if isinstance(content, Document):
        return Document(tuple(map(put, content.parts)))
    return Conversation(tuple(Message(m.role, Document(tuple(map(put, m.content.parts)))) for m in content.messages))


def as_data_url(data: bytes) -> str:
    return "data:image/*;base64," + base64.b64encode(data).decode()


def decode(data: bytes, where: object) -> str:
    """UTF-8 bytes to text. Raises `BadInput` naming the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 (byte {error.start})", where=where, remedy="convert it to UTF-8") from None


def read_jsonl(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """A document, a conversation, or `{"text": …}` a line."""
    path = Path(shard.path)
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                key = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(decode(line, key))
                    if isinstance(value, dict) and isinstance(value.get("text"), str):
                        yield Sample(key, Document((Text(unicode(value["text"], key)),)))
                    else:
                        yield Sample(key, from_json(value, where=key, folder=path.parent))
                except json.JSONDecodeError as error:
                    on_skip(key, f"not JSON ({error})")
                except BadInput as error:
                    on_skip(key, error.reason)
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    except (EOFError, OSError, zlib.error) as error:
        on_skip(str(path), f"damaged file ({error})")


def read_text(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """A file as one document."""
    try:
        text = decode(Path(shard.path).read_bytes(), shard.path)
    except BadInput as error:
        on_skip(shard.path, error.reason)
        return
    except OSError as error:
        on_skip(shard.path, f"could not be read ({error.strerror})")
        return
    if text:
        yield Sample(shard.path, Document((Text(text),)))


def read_picture(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """A picture; a `.txt` of the same name beside it is its caption."""
    path = Path(shard.path)
    parts: list[Part] = [Image(path)]
    caption = path.with_suffix(".txt")
    if caption.is_file():
        try:
            parts.append(Text(decode(caption.read_bytes(), caption).strip()))
        except BadInput as error:
            on_skip(str(caption), error.reason)
            return
        except OSError as error:
            on_skip(str(caption), f"could not be read ({error.strerror})")
            return
    yield Sample(shard.path, Document(tuple(parts)))


def emoji_task(shard: RawShard) -> Callable[[], Iterable[Document | Conversation]]:
    """The embedded task of that name with its options bound. Raises `BadInput` for a name or option it has not."""
    pictured = {task.__name__: task for task in (emoji.pairs, emoji.captioning, emoji.answering, emoji.drawing)}
    worded = {task.__name__: task for task in (emoji.words, emoji.code)}
    where = f"emoji:{shard.path}"
    known: dict[str, Any] = {**pictured, **worded}
    if shard.path not in known:
        raise BadInput("no such task", where=where, remedy=f"use one of {', '.join(known)}")
    task = known[shard.path]
    options: dict[str, Any] = {"split": "train", **({"per_concept": "1", "seed": "0"} if shard.path in pictured else {})}
    allowed = {"split", "concepts", *inspect.signature(task).parameters} - {"emoji"}
    for key, value in shard.options.items():
        if key not in allowed:
            raise BadInput(f"unknown option {key}", where=where, remedy=f"use {', '.join(sorted(allowed))}")
        options[key] = value
    split = options.pop("split")
    if split not in ("train", "validation"):
        raise BadInput(f"no split {split!r}", where=where, remedy="use train or validation")
    try:
        numbers = {key: int(value) for key, value in options.items()}
    except ValueError as error:
        raise BadInput(f"option is no number ({error})", where=where) from None
    limit = numbers.pop("concepts", None)

    def run() -> Iterable[Document | Conversation]:
        if shard.path in worded:
            return known[shard.path](split, **numbers)
        return known[shard.path](emoji.subset(split, limit), **numbers)

    return run


def read_emoji(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """A task over the embedded set: pairs, captioning, answering, drawing, words, code."""
    for number, content in enumerate(emoji_task(shard)()):
        yield Sample(f"emoji:{shard.path}, sample {number}", content)


READERS: dict[str, Callable[[RawShard, Skip], Iterator[Sample]]] = {
    "webdataset": read_webdataset,
    "jsonl": read_jsonl,
    "text": read_text,
    "picture": read_picture,
    "emoji": read_emoji,
}


def texts_of(sources: Iterable[str], on_skip: Skip = stop) -> Iterator[str]:
    """All text of all sources, a string for each sample; pictures are never opened."""
    for source in sources:
        for shard in expand(source):
            for sample in read(shard, on_skip):
                if isinstance(sample.content, Document):
                    yield sample.content.text
                else:
                    yield "\n".join(message.content.text for message in sample.content.messages)


# --- pictures alone, for training an image tokenizer -----------------------------------------------------------------


@dataclass(frozen=True)
class PictureEntry:
    """A picture that is opened when it is drawn. Groups are drawn equally often, and members within a group."""

    name: str
    source: bytes | Path | str
    group: str
    may_mirror: bool = True


def read_pictures(sources: Iterable[str], on_skip: Skip = stop) -> list[PictureEntry]:
    """The pictures of all sources, not opened yet. Raises `BadInput` where there is none."""
    result: list[PictureEntry] = []
    for source in sources:
        for shard in expand(source):
            if shard.kind == "emoji":
                limit = shard.options.get("concepts")
                members = emoji.subset(shard.options.get("split", "train"), int(limit) if limit else None)
                result += [PictureEntry(entry.key, entry.webp, entry.concept, entry.may_mirror) for entry in members]
            else:
                for sample in read(shard, on_skip):
                    if isinstance(sample.content, Document):
                        for number, image in enumerate(sample.content.images, 1):
                            assert isinstance(image, (str, Path))
                            name = f"{sample.key}, picture {number}" if len(sample.content.images) > 1 else sample.key
                            result.append(PictureEntry(name, image, name))
    if not result:
        raise BadInput("no picture in any source", where=", ".join(sources))
    return result
