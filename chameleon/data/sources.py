"""Sources: where documents and pictures come from, with one small reader for each kind.

A source is a path or a glob pattern with braces, `KIND:PATTERN` to state its kind, `KIND:PATTERN?images=DIR` to say where
its images are, or `emoji:TASK?split=train&per_concept=8&seed=0` for an embedded set. It expands to raw shards; each raw
shard becomes one token shard. The kinds are listed in `SOURCE_KINDS`; the kind of a file is guessed from its extension.
Files of records are read by `records.py`, and their records interpreted by `forms.py`.

A sample that cannot be read is passed to `on_skip(where, reason)`; `raise_on_skip` makes reading strict.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

import braceexpand

from chameleon.data import records
from chameleon.data.embedded_source import EMBEDDED_KINDS
from chameleon.data.forms import CAPTION_KEYS, RecordContext, content_of
from chameleon.data.records import decode_utf8, parse_json, read_json_file
from chameleon.data.source_types import (
    PICTURE_EXTENSIONS,
    PictureEntry,
    RawShard,
    Sample,
    SourceKind,
    record_fields,
)
from chameleon.data.webdataset import SkipHandler, raise_on_skip, read_samples
from chameleon.document import Conversation, Document, Image, Message, Part, Text, check_unicode, from_json
from chameleon.errors import BadInput

TEXT_EXTENSIONS = (".txt", ".md", ".py", ".c", ".h", ".js", ".rs", ".java", ".go", ".html", ".css")
DOCUMENT_CHARACTERS = 1 << 20
"""Characters of a text file after which a further document begins."""
TEXT_BLOCK_CHARACTERS = 1 << 20
"""Characters of a text file that are read at a time for training a text tokenizer."""


# --- from sources to raw shards --------------------------------------------------------------------------------------


def expand(source: str, *, allow_paths: bool = False) -> list[RawShard]:
    """Return the raw shards of a source, sorted. Raise `BadInput` where nothing matches or the kind is unknown.

    allow_paths: whether records may name images outside their folder.
    """
    prefix, colon, rest = source.partition(":")
    stated_kind = prefix if colon and prefix in SOURCE_KINDS else None
    if stated_kind is not None and (expand_kind := SOURCE_KINDS[stated_kind].expand) is not None:
        return expand_kind(rest)
    pattern, options = split_options(rest, stated_kind) if stated_kind else (source, {})
    paths = sorted({path for plain in expand_braces(pattern) for path in glob.glob(plain, recursive=True)})
    if paths == [pattern] and Path(pattern).is_dir():
        paths = sorted(files_in_folder(Path(pattern), stated_kind))
    if not paths:
        raise BadInput("no file matches", where=source, remedy="check the path or pattern")
    shards = []
    for path in paths:
        kind = stated_kind or guess_kind(path)
        if kind is None:
            kinds = ", ".join(SOURCE_KINDS)
            raise BadInput("unknown extension", where=path, remedy=f"write KIND:PATH, KIND of {kinds}")
        shards.append(RawShard(kind, path, options, allow_paths=allow_paths))
    return shards


def shard_name(shard: RawShard) -> str:
    """Return the name of the token shard of a raw shard."""
    return shard.name(tuple(extension for kind in SOURCE_KINDS.values() for extension in kind.extensions))


def split_options(rest: str, kind: str) -> tuple[str, dict[str, str]]:
    """Split `PATTERN?key=value&…` into pattern and options. A `?` without `=` belongs to the pattern."""
    match = re.fullmatch(r"(.*?)\?(\w+=[^?]*)", rest, re.DOTALL)
    if match is None:
        return rest, {}
    known = SOURCE_KINDS[kind].options
    options = dict(parse_qsl(match[2], keep_blank_values=True))
    for key in options:
        if key not in known:
            names = ", ".join(known) or "none"
            raise BadInput(f"unknown option {key}", where=f"{kind}:{rest}", remedy=f"there are: {names}")
    for key in ("images", "questions"):
        if key in options and not Path(options[key]).exists():
            raise BadInput(f"no such {'folder' if key == 'images' else 'file'}: {options[key]}", where=f"{kind}:{rest}")
    return match[1], options


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns that braces stand for, `{a,b}` and `{000..017}`; unbalanced braces are literal."""
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced braces
        return [pattern]


def files_in_folder(folder: Path, stated_kind: str | None) -> Iterator[str]:
    """Yield the files of a folder that have a reader, or that of the stated kind.

    Files that belong to others are not sources: captions beside pictures, tables that downloaders write beside their
    tar files, and pictures in a folder whose table (CSV, JSON lines …) names them.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kinds = {path: guess_kind(path.name) for path in files}
    picture_stems = {path.with_suffix("") for path in files if kinds[path] == "picture"}
    owner_stems = picture_stems | {path.with_suffix("") for path in files if kinds[path] == "webdataset"}
    tables = {path for path in files if kinds[path] in records.RECORD_FILES and not is_sidecar(path, owner_stems)}
    folders_with_table = {path.parent for path in tables if kinds[path] != "json"}
    for path, kind in kinds.items():
        # A stated kind also takes files of unknown extensions, except pictures, which lie among captions and notes.
        if (kind is None and stated_kind in (None, "picture")) or (kind and stated_kind not in (None, kind)):
            continue
        if kind == "text" and is_sidecar(path, picture_stems):
            continue
        # A .json may be anything: it is only read where its kind is stated, or the file itself is named.
        if kind in records.RECORD_FILES and (path not in tables or (kind == "json" and stated_kind is None)):
            continue
        if kind == "picture" and stated_kind is None and not folders_with_table.isdisjoint(path.parents):
            continue
        yield str(path)


def is_sidecar(path: Path, owner_stems: set[Path]) -> bool:
    """Return whether a file belongs to one of these stems: `00000.json` or `00000_stats.json` to `00000.tar`."""
    stem = path.with_suffix("")
    return stem in owner_stems or stem.with_name(stem.name.removesuffix("_stats")) in owner_stems


def guess_kind(path: str) -> str | None:
    """Return the kind of a file by its extension, or None."""
    name = path.lower()
    matching = (kind for kind, source in SOURCE_KINDS.items() if source.extensions and name.endswith(source.extensions))
    return next(matching, None)


# --- readers ---------------------------------------------------------------------------------------------------------


def read(shard: RawShard, on_skip: SkipHandler = raise_on_skip) -> Iterator[Sample]:
    """Yield the samples of a raw shard, in order."""
    return SOURCE_KINDS[shard.kind].read(shard, on_skip)


def read_webdataset(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read image–text shards: an image beside `.txt` (caption) or `.json` (`caption`, or a document or conversation)."""
    for sample in read_samples(Path(shard.path), on_skip):
        key = f"{shard.path}, sample {sample['__key__']}"
        try:
            fields = parse_sidecar(sample, key)
            yield Sample(key, webdataset_content(sample, fields, key), record_fields(fields))
        except BadInput as error:
            on_skip(key, error.reason)


def parse_sidecar(sample: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object in the sample's `.json`, if it has one."""
    fields = parse_json(decode_utf8(sample["json"], key), key) if "json" in sample else {}
    if not isinstance(fields, dict):
        raise BadInput("sidecar is not an object", where=key)
    return fields


def webdataset_content(sample: dict[str, Any], fields: dict[str, Any], key: str) -> Document | Conversation:
    if "parts" in fields or "messages" in fields:
        return insert_members(from_json(fields, where=key), sample, key)
    images = [sample[extension[1:]] for extension in PICTURE_EXTENSIONS if extension[1:] in sample]
    parts: list[Part] = [Image(data) for data in images[:1]]
    caption = fields.get("caption") or fields.get("name")
    if "txt" in sample:
        caption = decode_utf8(sample["txt"], key).strip()
    if caption:
        parts.append(Text(check_unicode(str(caption), key)))
    if not parts:
        raise BadInput("neither image nor text", where=key)
    return Document(tuple(parts))


def insert_members(content: Document | Conversation, sample: dict[str, Any], key: str) -> Document | Conversation:
    """Replace images named as members of the sample by their bytes. Raise `BadInput` for other files."""
    stem = Path(sample["__key__"]).name

    def insert(part: Part) -> Part:
        if not isinstance(part, Image) or not isinstance(part.image, (str, Path)) or str(part.image).startswith("data:"):
            return part
        member = Path(part.image).name
        data = sample.get(member.removeprefix(f"{stem}.").lower()) if member.startswith(f"{stem}.") else None
        if not isinstance(data, bytes):
            raise BadInput(f"no member {part.image} in this sample", where=key)
        return Image(data)

    if isinstance(content, Document):
        return Document(tuple(map(insert, content.parts)))
    messages = (Message(m.role, Document(tuple(map(insert, m.content.parts)))) for m in content.messages)
    return Conversation(tuple(messages))


def record_context(shard: RawShard, key: str) -> RecordContext:
    folder = Path(shard.options.get("images", Path(shard.path).parent))
    return RecordContext(key, folder, shard.allow_paths)


def read_records(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read records of any known form, from a file of any known kind."""
    for key, record in records.read_record_file(shard.kind, Path(shard.path), on_skip):
        try:
            yield Sample(key, content_of(record, record_context(shard, key)), record_fields(record))
        except BadInput as error:
            on_skip(key, error.reason)


def read_coco(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read COCO captions: a document of image and caption for each annotation."""
    path = Path(shard.path)
    value = read_object(path)
    images = entries_of(value, "images", ("id", "file_name"), path, on_skip)
    file_names = {entry["id"]: entry["file_name"] for _, entry in images}
    for key, entry in entries_of(value, "annotations", ("image_id", "caption"), path, on_skip):
        if entry["image_id"] not in file_names:
            on_skip(key, f"no image {entry['image_id']}")
            continue
        record = {"image": file_names[entry["image_id"]], "caption": entry["caption"]}
        try:
            yield Sample(key, content_of(record, record_context(shard, key)))
        except BadInput as error:
            on_skip(key, error.reason)


def read_vqa(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read VQAv2 annotations: a conversation for each question, answered by `multiple_choice_answer`.

    Options: `questions`, the file of questions; `images`, the folder; `prefix` of the images' names (by default
    `COCO_train2014_`).
    """
    path = Path(shard.path)
    if "questions" not in shard.options:
        raise BadInput("no file of questions", where=path, remedy=f"write vqa:{path}?questions=FILE&images=DIR")
    questions_path = Path(shard.options["questions"])
    question_keys, answer_keys = ("question_id", "question", "image_id"), ("question_id", "multiple_choice_answer")
    question_entries = entries_of(read_object(questions_path), "questions", question_keys, questions_path, on_skip)
    questions = {entry["question_id"]: entry for _, entry in question_entries}
    prefix = shard.options.get("prefix", "COCO_train2014_")
    for key, entry in entries_of(read_object(path), "annotations", answer_keys, path, on_skip):
        question = questions.get(entry["question_id"])
        if question is None:
            on_skip(key, f"no question {entry['question_id']} in {questions_path}")
            continue
        context = record_context(shard, key)
        try:
            image = context.image(f"{prefix}{int(question['image_id']):012d}.jpg", "image")
            prompt = Document((image, Text(context.text(question["question"], "question"))))
            answer = Document((Text(context.text(entry["multiple_choice_answer"], "multiple_choice_answer")),))
            yield Sample(key, Conversation((Message("user", prompt), Message("assistant", answer))))
        except BadInput as error:
            on_skip(key, error.reason)
        except ValueError as error:
            on_skip(key, f"image_id is not a number ({error})")


def read_object(path: Path) -> dict[str, Any]:
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path)
    return value


def entries_of(
    value: dict[str, Any], name: str, keys: Sequence[str], path: Path, on_skip: SkipHandler
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield how messages name each entry of list `name` of a file, and the entry. Those that lack a key are skipped.

    Raise `BadInput` where there is no such list.
    """
    entries = value.get(name)
    if not isinstance(entries, list):
        raise BadInput(f"no list {name}", where=path)
    for index, entry in enumerate(entries):
        where = f"{path}, {name.removesuffix('s')} {index}"
        missing = [key for key in keys if not isinstance(entry, dict) or not isinstance(entry.get(key), (str, int))]
        if missing:
            on_skip(where, f"no {missing[0]}")
        else:
            yield where, entry


def read_text(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read a text file as one document, or a long one as several of at most `characters`, which end after a line.

    Option: `characters`, by default `DOCUMENT_CHARACTERS`. A long file is never held as a whole.
    """
    value = str(shard.options.get("characters", DOCUMENT_CHARACTERS))
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(f"characters is {value}, expected a number of 1 or more", where=shard.path)
    limit = int(value)
    try:
        if Path(shard.path).stat().st_size <= limit:
            text = decode_utf8(Path(shard.path).read_bytes(), shard.path)
            yield from [Sample(shard.path, Document((Text(text),)))] if text else []
            return
        with open(shard.path, encoding="utf-8", newline="") as file:
            for number, text in enumerate(parts_of_text(file, limit), 1):
                yield Sample(f"{shard.path}, part {number}", Document((Text(text),)))
    except BadInput as error:
        on_skip(shard.path, error.reason)
    except UnicodeDecodeError as error:
        on_skip(shard.path, f"not UTF-8 ({error.reason}); convert it to UTF-8")
    except OSError as error:
        on_skip(shard.path, f"could not be read ({error.strerror})")


def parts_of_text(file: IO[str], limit: int) -> Iterator[str]:
    """Yield a text in parts of at most `limit` characters, split after the last newline in each where there is one."""
    text = ""
    while True:
        text += file.read(limit + 1 - len(text))
        if len(text) <= limit:
            yield from [text] if text else []
            return
        end = text.rfind("\n", 0, limit) + 1 or limit
        yield text[:end]
        text = text[end:]


def read_picture(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read an image file; a `.txt` of the same name is its caption, or a `.json` contains one."""
    path = Path(shard.path)
    caption_path, json_path = path.with_suffix(".txt"), path.with_suffix(".json")
    record: dict[str, Any] = {"image": str(path.absolute())}
    fields: Any = {}
    sidecar = caption_path
    try:
        if caption_path.is_file():
            record["caption"] = decode_utf8(caption_path.read_bytes(), caption_path).strip()
        elif json_path.is_file():
            sidecar = json_path
            fields = parse_json(decode_utf8(json_path.read_bytes(), json_path), json_path)
            if not isinstance(fields, dict):
                raise BadInput("expected an object", where=json_path)
            record |= {key: fields[key] for key in CAPTION_KEYS if key in fields}
        content = content_of(record, RecordContext(str(sidecar), path.parent, allow_paths=True))
    except BadInput as error:
        on_skip(str(sidecar), error.reason)
        return
    except OSError as error:
        on_skip(str(sidecar), f"could not be read ({error.strerror})")
        return
    yield Sample(shard.path, content, record_fields(fields))


SOURCE_KINDS: dict[str, SourceKind] = {
    "webdataset": SourceKind(read_webdataset, extensions=(".tar", ".tar.gz", ".tgz")),
    **{
        kind: SourceKind(read_records, extensions=records.extensions(kind), options=("images",))
        for kind in records.RECORD_FILES
    },
    "coco": SourceKind(read_coco, options=("images",)),
    "vqa": SourceKind(read_vqa, options=("images", "questions", "prefix")),
    "picture": SourceKind(read_picture, extensions=PICTURE_EXTENSIONS),
    "text": SourceKind(read_text, extensions=TEXT_EXTENSIONS, options=("characters",)),
    **EMBEDDED_KINDS,
}


# --- texts, for training a text tokenizer ----------------------------------------------------------------------------


def texts_of(sources: Iterable[str], on_skip: SkipHandler = raise_on_skip) -> Iterator[str]:
    """Yield all text of all sources: one string for each sample, several for a long file; images are never opened."""
    for source in sources:
        for shard in expand(source, allow_paths=True):
            if shard.kind == "text":
                yield from text_blocks(Path(shard.path), on_skip)
            else:
                for sample in read(shard, on_skip):
                    yield sample.text


def text_blocks(path: Path, on_skip: SkipHandler) -> Iterator[str]:
    """Yield a text file in blocks, split after newlines where possible; it is never held as a whole."""
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(TEXT_BLOCK_CHARACTERS):
                lines, newline, tail = block.rpartition("\n")
                if newline:
                    yield rest + lines + newline
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


# --- pictures, for training an image tokenizer -----------------------------------------------------------------------


def pictures_in_documents(shard: RawShard, on_skip: SkipHandler) -> Iterator[PictureEntry]:
    """Yield the pictures of the documents of a shard, each a group of its own."""
    for sample in read(shard, on_skip):
        if isinstance(sample.content, Document):
            for index, image in enumerate(sample.images, 1):
                name = f"{sample.key}, picture {index}" if len(sample.images) > 1 else sample.key
                yield PictureEntry(name, image, name, fields=sample.fields)
