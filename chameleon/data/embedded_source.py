"""The embedded sets as sources: `emoji:TASK?option=value&…`, `clipart:TASK?…`, and `embedded:TASK?…` for both together.

Tasks about one picture take `per_concept`, mixed ones `count`; all take `seed`, `split`, `view` and `concepts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from chameleon.data import clipart, emoji, mixed_tasks, picture_tasks, shape_tasks
from chameleon.data.labelled import LabelledPicture
from chameleon.data.source_types import PictureEntry, RawShard, Sample, SourceKind
from chameleon.data.webdataset import SkipHandler
from chameleon.document import Conversation, Document
from chameleon.errors import BadInput

Contents = Iterable[Document | Conversation]
DEFAULTS = {"split": "train", "seed": "0", "per_concept": "1", "count": "1000"}
ONE_PICTURE_TASKS = {
    task.__name__: task
    for task in (
        picture_tasks.pairs,
        picture_tasks.captioning,
        picture_tasks.answering,
        picture_tasks.choosing,
        picture_tasks.translating,
        picture_tasks.toning,
        picture_tasks.drawing,
        picture_tasks.wording,
        picture_tasks.styling,
        picture_tasks.colouring,
        shape_tasks.shapes,
    )
}
MIXED_TASKS = {name: partial(mixed_tasks.conversations, name) for name in mixed_tasks.MAKERS}
TEXT_TASKS = {task.__name__: task for task in (emoji.words, emoji.code)}
TASKS: dict[str, Callable[..., Contents]] = {**ONE_PICTURE_TASKS, **MIXED_TASKS, **TEXT_TASKS}


def both(split: str, concepts: int | None = None) -> Sequence[LabelledPicture]:
    """Return the pictures of both sets."""
    return (*emoji.subset(split, concepts), *clipart.subset(split, concepts))


SETS: dict[str, Callable[[str, int | None], Sequence[LabelledPicture]]] = {
    "emoji": emoji.subset,
    "clipart": clipart.subset,
    "embedded": both,
}


def expand(kind: str, rest: str) -> list[RawShard]:
    """Return the one shard of `TASK?options`. Raise `BadInput` for an unknown task or option."""
    task, _, options = rest.partition("?")
    shard = RawShard(kind, task or "pairs", dict(parse_qsl(options)), is_file=False)
    bind_task(shard)
    return [shard]


def bind_task(shard: RawShard) -> Callable[[], Contents]:
    """Return the task with its options bound. Raise `BadInput` for an unknown task or option."""
    where, name = f"{shard.kind}:{shard.path}", shard.path
    if name not in TASKS:
        raise BadInput("no such task", where=where, remedy=f"use one of {', '.join(TASKS)}")
    parameters = set(inspect.signature(TASKS[name]).parameters) - {"name"}
    shows_pictures = "pictures" in parameters
    known = (parameters - {"pictures"}) | ({"split", "concepts"} if shows_pictures else {"split"})
    options: dict[str, Any] = {key: value for key, value in DEFAULTS.items() if key in known}
    for key, value in shard.options.items():
        if key not in known:
            raise BadInput(f"unknown option {key}", where=where, remedy=f"use {', '.join(sorted(known))}")
        options[key] = value
    split = options["split"]
    if split not in ("train", "validation"):
        raise BadInput(f"no split {split!r}", where=where, remedy="use train or validation")
    if "view" in options:
        if options["view"] not in picture_tasks.VIEWS:
            views = ", ".join(picture_tasks.VIEWS)
            raise BadInput(f"no view {options['view']!r}", where=where, remedy=f"use one of {views}")
        options["view"] = picture_tasks.VIEWS[options["view"]]
    try:
        options |= {key: int(value) for key, value in options.items() if key not in ("split", "view")}
    except ValueError as error:
        raise BadInput(f"option is not a number ({error})", where=where) from None
    if not shows_pictures:
        return partial(TASKS[name], **options)
    num_concepts = options.pop("concepts", None)
    if "split" not in parameters:
        del options["split"]

    def run() -> Contents:
        # Mixed prompts for evaluation are about pictures of the training set.
        pictures_split = "train" if name in MIXED_TASKS else split
        return TASKS[name](SETS[shard.kind](pictures_split, num_concepts), **options)

    return run


def read(shard: RawShard, on_skip: SkipHandler) -> Iterator[Sample]:
    """Read a task."""
    for index, content in enumerate(bind_task(shard)()):
        yield Sample(f"{shard.kind}:{shard.path}, sample {index}", content)


def pictures_of(shard: RawShard) -> list[PictureEntry]:
    """Return the pictures of a split, grouped by concept."""
    num_concepts = shard.options.get("concepts")
    members = SETS[shard.kind](shard.options.get("split", "train"), int(num_concepts) if num_concepts else None)
    return [PictureEntry(entry.key, entry.webp, entry.concept, entry.may_mirror) for entry in members]


EMBEDDED_KINDS = {kind: SourceKind(read, expand=partial(expand, kind), pictures=pictures_of) for kind in SETS}
