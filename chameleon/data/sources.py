"""Sources: where documents and pictures come from, one small reader for each kind.

A source is a path or glob pattern with braces, `KIND:PATTERN` to say the kind, `KIND:PATTERN?images=DIR` to say where its
pictures lie, or `emoji:TASK?split=train&per_concept=8&seed=0` for the embedded set. It expands to raw shards; each raw
shard becomes one token shard. A reader is a function from a raw shard to samples, entered in `READERS`; the kind is
guessed from the file's ending by `ENDINGS`. Files of records are read by `records.py`, what a record says by `forms.py`.

A sample that cannot be read is passed to `on_skip(where, why)` and passed over; `stop` as `on_skip` makes reading strict.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from chameleon.data import emoji, records
from chameleon.data.forms import CAPTION_KEYS, Place, as_data_url, content_of
from chameleon.data.records import decode, strict_json
from chameleon.data.webdataset import Skip, read_samples, stop
from chameleon.document import Conversation, Document, Image, Message, Part, Text, from_json, unicode
from chameleon.errors import BadInput

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TEXT_ENDINGS = (".txt", ".md", ".py", ".c", ".h", ".js", ".rs", ".java", ".go", ".html", ".css")
ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    **{kind: records.endings(kind) for kind in records.FILES},
    "picture": PICTURE_ENDINGS,
    "text": TEXT_ENDINGS,
}


@dataclass(frozen=True)
class Sample:
    """A document or conversation and the key by which messages name it."""

    key: str
    content: Document | Conversation
    fields: Mapping[str, str | float] = field(default_factory=dict)
    """What else the record says: its texts and numbers (a language, a score), by name."""

    @property
    def text(self) -> str:
        """All text, the messages of a conversation parted by newlines."""
        if isinstance(self.content, Document):
            return self.content.text
        return "\n".join(message.content.text for message in self.content.messages)

    @property
    def images(self) -> list[Any]:
        """All pictures, in order."""
        if isinstance(self.content, Document):
            return self.content.images
        return [image for message in self.content.messages for image in message.content.images]


MAX_FIELD = 200  # characters of a text that counts as a record's field; longer ones are its content


def fields_of(record: Any) -> dict[str, str | float]:
    """The numbers and short texts of a record."""
    return {
        str(name): value
        for name, value in (record.items() if isinstance(record, dict) else ())
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= MAX_FIELD)
    }


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
            beside = [path.with_suffix(ending) for ending in (".txt", ".json")] if self.kind == "picture" else []
            for file in (path, *beside):
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
    pattern, said = with_options(rest, given) if given else (source, {})
    paths = sorted({path for plain in braced(pattern) for path in glob.glob(plain, recursive=True)})
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
        shards.append(RawShard(found, path, said))
    return shards


def absolute(shard: RawShard) -> RawShard:
    """The same shard with paths that hold in any working folder."""
    if shard.kind == "emoji":
        return shard
    folders: dict[str, str] = {
        key: os.path.abspath(shard.options[key]) for key in shard.options if key in ("images", "questions")
    }
    return replace(shard, path=shard.place, options={**shard.options, **folders})


OPTIONS = {**dict.fromkeys((*records.FILES, "coco"), ("images",)), "vqa": ("images", "questions", "prefix")}
"""Kind → what may be said of it behind its pattern."""


def with_options(rest: str, kind: str) -> tuple[str, dict[str, str]]:
    """A pattern and what stands behind it as `?key=value&…`. A lone `?` is the pattern's own."""
    match = re.fullmatch(r"(.*?)\?(\w+=[^?]*)", rest, re.DOTALL)
    if match is None:
        return rest, {}
    options = dict(parse_qsl(match[2], keep_blank_values=True))
    for key in options:
        if key not in OPTIONS.get(kind, ()):
            known = ", ".join(OPTIONS.get(kind, ())) or "none"
            raise BadInput(f"unknown option {key}", where=f"{kind}:{rest}", remedy=f"there are: {known}")
    for key in ("images", "questions"):
        if key in options and not Path(options[key]).exists():
            raise BadInput(f"no such {'folder' if key == 'images' else 'file'}: {options[key]}", where=f"{kind}:{rest}")
    return match[1], options


def braced(pattern: str) -> Iterator[str]:
    """The patterns that braces stand for: `{a,b}` and `{000..017}`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span is None and "," not in match[1]:  # braces of a name
        head = pattern[: match.end()]
        yield from (head + tail for tail in braced(pattern[match.end() :]))
        return
    if span is None:
        choices = match[1].split(",")
    else:
        choices = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    for choice in choices:
        yield from braced(pattern[: match.start()] + choice + pattern[match.end() :])


def files_of(folder: Path, given: str | None) -> Iterator[str]:
    """The files of a folder that have a reader, or that of the `given` kind.

    What belongs to other files is no source of its own: captions beside pictures, the tables that downloaders write
    beside their tars, and pictures in a folder whose table (CSV, JSON lines …) names them.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kinds = {path: guess(path.name) for path in files}
    pictures = {path.with_suffix("") for path in files if kinds[path] == "picture"}
    owners = pictures | {path.with_suffix("") for path in files if kinds[path] == "webdataset"}
    tables = {path for path in files if kinds[path] in records.FILES and not is_beside(path, owners)}
    named = {path.parent for path in tables if kinds[path] != "json"}
    for path, kind in kinds.items():
        # Naming the kind also takes files of unknown endings, but for pictures, which lie among captions and notes.
        if (kind is None and given in (None, "picture")) or (kind and given not in (None, kind)):
            continue
        if kind == "text" and is_beside(path, pictures):
            continue
        # A .json may be anything: it is taken where its kind is said, or the file itself is named.
        if kind in records.FILES and (path not in tables or (kind == "json" and given is None)):
            continue
        if kind == "picture" and given is None and not named.isdisjoint(path.parents):
            continue
        yield str(path)


def is_beside(path: Path, stems: set[Path]) -> bool:
    """Whether a file goes with one of those of these stems: `00000.json` or `00000_stats.json` with `00000.tar`."""
    stem = path.with_suffix("")
    return stem in stems or stem.with_name(stem.name.removesuffix("_stats")) in stems


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
            fields = sidecar(sample, key)
            yield Sample(key, webdataset_content(sample, fields, key), fields_of(fields))
        except BadInput as error:
            on_skip(key, error.reason)


def sidecar(sample: dict[str, Any], key: str) -> dict[str, Any]:
    """What the sample's `.json` says."""
    fields = strict_json(decode(sample["json"], key), key) if "json" in sample else {}
    if not isinstance(fields, dict):
        raise BadInput("sidecar is not an object", where=key)
    return fields


def webdataset_content(sample: dict[str, Any], fields: dict[str, Any], key: str) -> Document | Conversation:
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


def read_records(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """Records of any known form, from a file of any known kind."""
    path = Path(shard.path)
    folder = Path(shard.options.get("images", path.parent))
    for key, record in records.read_records(shard.kind, path, on_skip):
        try:
            yield Sample(key, content_of(record, Place(key, folder)), fields_of(record))
        except BadInput as error:
            on_skip(key, error.reason)


def read_coco(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """COCO captions: a document of picture and caption for each annotation."""
    path = Path(shard.path)
    value = object_of(path)
    names = {entry["id"]: entry["file_name"] for entry in entries(value, "images", ("id", "file_name"), path)}
    folder = Path(shard.options.get("images", path.parent))
    for number, entry in enumerate(entries(value, "annotations", ("image_id", "caption"), path)):
        key = f"{path}, annotation {number}"
        if entry["image_id"] not in names:
            on_skip(key, f"no image {entry['image_id']}")
            continue
        try:
            yield Sample(
                key, content_of({"image": names[entry["image_id"]], "caption": entry["caption"]}, Place(key, folder))
            )
        except BadInput as error:
            on_skip(key, error.reason)


def read_vqa(shard: RawShard, on_skip: Skip) -> Iterator[Sample]:
    """VQAv2 annotations: a conversation for each question, answered by `multiple_choice_answer`.

    Options: `questions`, the file of questions; `images`, the folder; `prefix` of the pictures' names
    (default `COCO_train2014_`).
    """
    path = Path(shard.path)
    if "questions" not in shard.options:
        raise BadInput("no file of questions", where=path, remedy=f"write vqa:{path}?questions=FILE&images=DIR")
    asked_in = Path(shard.options["questions"])
    fields = ("question_id", "question", "image_id")
    questions = {entry["question_id"]: entry for entry in entries(object_of(asked_in), "questions", fields, asked_in)}
    folder, prefix = Path(shard.options.get("images", path.parent)), shard.options.get("prefix", "COCO_train2014_")
    answered = entries(object_of(path), "annotations", ("question_id", "multiple_choice_answer"), path)
    for number, entry in enumerate(answered):
        key = f"{path}, annotation {number}"
        question = questions.get(entry["question_id"])
        if question is None:
            on_skip(key, f"no question {entry['question_id']} in {asked_in}")
            continue
        place = Place(key, folder)
        try:
            picture = place.picture(f"{prefix}{int(question['image_id']):012d}.jpg", "image")
            asked = Document((picture, Text(place.text(question["question"], "question"))))
            told = Document((Text(place.text(entry["multiple_choice_answer"], "multiple_choice_answer")),))
            yield Sample(key, Conversation((Message("user", asked), Message("assistant", told))))
        except BadInput as error:
            on_skip(key, error.reason)
        except ValueError as error:
            on_skip(key, f"image_id is no number ({error})")


def object_of(path: Path) -> dict[str, Any]:
    value = records.json_file(path)
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path)
    return value


def entries(value: dict[str, Any], name: str, keys: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """The objects of a list in an annotation file. Raises `BadInput` naming the first that lacks a key."""
    found = value.get(name)
    if not isinstance(found, list):
        raise BadInput(f"no list {name}", where=path)
    for number, entry in enumerate(found):
        for key in keys:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), (str, int)):
                raise BadInput(f"entry {number} of {name} has no {key}", where=path)
    return found


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
    """A picture; a `.txt` of the same name beside it is its caption, or a `.json` holds one."""
    path = Path(shard.path)
    caption, beside = path.with_suffix(".txt"), path.with_suffix(".json")
    record: dict[str, Any] = {"image": str(path.absolute())}
    fields: Any = {}
    file = caption
    try:
        if caption.is_file():
            record["caption"] = decode(caption.read_bytes(), caption).strip()
        elif beside.is_file():
            file = beside
            fields = strict_json(decode(beside.read_bytes(), beside), beside)
            if not isinstance(fields, dict):
                raise BadInput("expected an object", where=beside)
            record |= {key: fields[key] for key in CAPTION_KEYS if key in fields}
        content = content_of(record, Place(str(file), path.parent))
    except BadInput as error:
        on_skip(str(file), error.reason)
        return
    except OSError as error:
        on_skip(str(file), f"could not be read ({error.strerror})")
        return
    yield Sample(shard.path, content, fields_of(fields))


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
    **dict.fromkeys(records.FILES, read_records),
    "coco": read_coco,
    "vqa": read_vqa,
    "text": read_text,
    "picture": read_picture,
    "emoji": read_emoji,
}


BLOCK = 1 << 20  # characters of a text file that are read at a time where its parts will do


def texts_of(sources: Iterable[str], on_skip: Skip = stop) -> Iterator[str]:
    """All text of all sources: a string for each sample, several for a long file; pictures are never opened."""
    for source in sources:
        for shard in expand(source):
            if shard.kind == "text":
                yield from text_blocks(Path(shard.path), on_skip)
            else:
                for sample in read(shard, on_skip):
                    yield sample.text


def text_blocks(path: Path, on_skip: Skip) -> Iterator[str]:
    """A text file some at a time, cut behind newlines where there are any; never held whole."""
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(BLOCK):
                whole, newline, tail = block.rpartition("\n")
                if newline:
                    yield rest + whole + newline
                    rest = tail
                else:
                    yield from [rest] if rest else []
                    rest = block
    except UnicodeDecodeError as error:
        on_skip(str(path), f"not UTF-8 ({error.reason})")
    except OSError as error:
        on_skip(str(path), f"could not be read ({error.strerror})")
    if rest:
        yield rest


# --- pictures alone, for training an image tokenizer -----------------------------------------------------------------


@dataclass(frozen=True)
class PictureEntry:
    """A picture that is opened when it is drawn. Groups are drawn equally often, and members within a group."""

    name: str
    source: bytes | Path | str
    group: str
    may_mirror: bool = True
    fields: Mapping[str, str | float] = field(default_factory=dict)
    """What the picture's record says besides."""


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
                            result.append(PictureEntry(name, image, name, fields=sample.fields))
    if not result:
        raise BadInput("no picture in any source", where=", ".join(sources))
    return result
