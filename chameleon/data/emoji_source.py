"""The embedded emoji as a source: `emoji:TASK?split=train&per_concept=8&seed=0`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

from chameleon.data import emoji
from chameleon.data.source_types import PictureEntry, RawShard, Sample, SourceKind
from chameleon.data.webdataset import SkipHandler
from chameleon.document import Conversation, Document
from chameleon.errors import BadInput

KIND = "emoji"
PICTURE_TASKS = {task.__name__: task for task in (emoji.pairs, emoji.captioning, emoji.answering, emoji.drawing)}
TEXT_TASKS = {task.__name__: task for task in (emoji.words, emoji.code)}


def expand_emoji(rest: str) -> list[RawShard]:
    """Return the one shard of `TASK?options`. Raise `BadInput` for an unknown task or option."""
    task, _, options = rest.partition("?")
    shard = RawShard(KIND, task or "pairs", dict(parse_qsl(options)), is_file=False)
    bind_task(shard)
    return [shard]


def bind_task(shard: RawShard) -> Callable[[], Iterable[Document | Conversation]]:
    """Return the task with its options bound. Raise `BadInput` for an unknown task or option."""
    where = f"{KIND}:{shard.path}"
    tasks: dict[str, Callable[..., Iterable[Document | Conversation]]] = {**PICTURE_TASKS, **TEXT_TASKS}
    if shard.path not in tasks:
        raise BadInput("no such task", where=where, remedy=f"use one of {', '.join(tasks)}")
    task = tasks[shard.path]
    shows_pictures = shard.path in PICTURE_TASKS
    options: dict[str, Any] = {"split": "train", **({"per_concept": "1", "seed": "0"} if shows_pictures else {})}
    known = {"split", "concepts", *inspect.signature(task).parameters} - {"emoji"}
    for key, value in shard.options.items():
        if key not in known:
            raise BadInput(f"unknown option {key}", where=where, remedy=f"use {', '.join(sorted(known))}")
        options[key] = value
    split = options.pop("split")
    if split not in ("train", "validation"):
        raise BadInput(f"no split {split!r}", where=where, remedy="use train or validation")
    try:
        integer_options = {key: int(value) for key, value in options.items()}
    except ValueError as error:
        raise BadInput(f"option is not a number ({error})", where=where) from None
    num_concepts = integer_options.pop("concepts", None)

    def run() -> Iterable[Document | Conversation]:
        return task(emoji.subset(split, num_concepts) if shows_pictures else split, **integer_options)

    return run


def read_emoji(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read a task: pairs, captioning, answering, drawing, words or code."""
    for index, content in enumerate(bind_task(shard)()):
        yield Sample(f"{KIND}:{shard.path}, sample {index}", content)


def emoji_pictures(shard: RawShard) -> list[PictureEntry]:
    """Return the pictures of a split, grouped by concept."""
    num_concepts = shard.options.get("concepts")
    members = emoji.subset(shard.options.get("split", "train"), int(num_concepts) if num_concepts else None)
    return [PictureEntry(entry.key, entry.webp, entry.concept, entry.may_mirror) for entry in members]


EMOJI = SourceKind(read_emoji, expand=expand_emoji, pictures=emoji_pictures)
