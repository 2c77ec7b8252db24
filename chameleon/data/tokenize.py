"""Raw shards to token shards: what is done with each, and what is reported of all.

A shard is one task, and what it becomes depends on nothing but its files, the tokenizers and `TokenizeOptions`: pictures
go through the network in batches of the shard's own, in its order. So a run may be killed at any point; started again it
makes what is missing, and the result is the same to the byte, whichever engine ran it on however many processes. (Other
processors, or another number of threads, round otherwise, and where two codes are as near a code may differ.)
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import groupby, repeat
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from chameleon.data import sources
from chameleon.data.filters import ALL_SEEN, FILTERED, Filters, refusal
from chameleon.data.sources import RawShard, Sample
from chameleon.data.token_shards import DESCRIPTION, HASH_BYTES, PICTURES, TokenShard, write_shard
from chameleon.errors import BadInput
from chameleon.files import remove_left_over, write_json, written_into
from chameleon.tokenizers.image import BATCH, picture_bytes, picture_hash, picture_size
from chameleon.tokenizers.mixed import MixedTokenizer, Prepared, Preparer, View, turns_of

EXAMPLES = 20  # skipped samples that a report names
REASONS, OTHER_REASONS = 100, "other reasons"  # that a report counts apart: decoders put numbers into some of theirs
CHUNK_DOCUMENTS, CHUNK_PICTURES, CHUNK_CHARACTERS = 64, BATCH, 1 << 20  # of what is prepared and encoded together
AHEAD = 2  # chunks that wait beside those that workers have in hand


@dataclass
class TokenizeOptions:
    """What decides, beside files and tokenizers, what a token shard holds."""

    filters: Filters = field(default_factory=Filters)
    variants: int = 1
    """Views of each document's pictures: the first is as it is, the others are random crops; epoch e of a training run
    sees view e modulo `variants`."""
    crop: float = 0.8
    """The least share of a picture's sides that a crop shows."""
    mirror: bool = False
    """Whether a crop may be mirrored; text in pictures, left and right are then not what captions say."""
    seed: int = 0

    def check(self) -> None:
        """Raises `BadInput` for what makes no sense."""
        where = "options of tokenize"
        if self.variants < 1:
            raise BadInput(f"variants is {self.variants}, expected 1 or more", where=where)
        if not 0 < self.crop <= 1:
            raise BadInput(f"crop is {self.crop}, expected a share above 0 and at most 1", where=where)
        self.filters.check()


@dataclass
class Report:
    """What tokenising did."""

    documents_in: int = 0
    documents_out: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """How many samples were passed over, by reason."""
    examples: list[str] = field(default_factory=list)
    """The first skipped samples, by name."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Ids written, by modality."""
    pictures: int = 0
    """Pictures read."""
    duplicate_share: float = 0.0
    """What share of the pictures were there before, byte for byte; known once all shards are made."""
    shards_made: int = 0
    """Shards that this run made; the others were there."""
    others: list[str] = field(default_factory=list)
    """Shards that lay in the folder before and were made of none of these sources; training on it reads them too."""

    def skip(self, where: str, why: str) -> None:
        self.documents_in += 1
        self.count_skipped(why, 1)
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why}")

    def count_skipped(self, why: str, count: int) -> None:
        apart = why in self.skipped or len(self.skipped) < REASONS or why.startswith(FILTERED)
        self.skipped[why if apart else OTHER_REASONS] += count

    @property
    def skipped_share(self) -> float:
        """What share of the samples could not be used; those that filters were meant to leave out do not count."""
        unusable = sum(count for why, count in self.skipped.items() if not why.startswith(FILTERED))
        return unusable / max(1, self.documents_in)

    def add(self, other: Report) -> None:
        """Adds another report's counts."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        for why, count in other.skipped.items():
            self.count_skipped(why, count)
        self.tokens.update(other.tokens)
        self.pictures += other.pictures
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        return cls(**{**value, "skipped": Counter(value["skipped"]), "tokens": Counter(value["tokens"])})


class Skipped(NamedTuple):
    """A sample that is passed over."""

    where: str
    why: str


class Task(NamedTuple):
    """A raw shard, where its token shard goes, and which of its samples are left out as duplicates."""

    raw: RawShard
    folder: Path
    source: dict[str, Any]
    """What tells whether a token shard was made of this: the raw shard's identity and the options."""
    duplicates: Mapping[int, Sequence[bytes]]
    """Place of each sample to leave out in the raw shard → the hashes of its pictures."""


class Status(NamedTuple):
    """How far a run is."""

    shards: int
    shards_in_all: int
    documents: int
    """Documents written in this run."""
    pictures: int
    tokens: int
    skipped: int
    seconds: float
    """Since the run began."""
    left: float | None
    """Seconds to go, by the size of the raw shards; None while none is done."""


Watch = Callable[[Status], None]


# --- one shard -------------------------------------------------------------------------------------------------------


def items_of(raw: RawShard) -> Iterator[Sample | Skipped]:
    """What a raw shard holds, in order, what cannot be read in its place."""
    skipped: list[Skipped] = []
    for sample in sources.read(raw, lambda where, why: skipped.append(Skipped(where, why))):
        yield from skipped
        skipped.clear()
        yield sample
    yield from skipped


def chunks_of(task: Task, variants: int) -> Iterator[list[tuple[int, Sample | Skipped]]]:
    """A task's samples with their places, some at a time; one chunk at least, that may be empty."""
    chunk: list[tuple[int, Sample | Skipped]] = []
    pictures = characters = 0
    place = 0
    for item in items_of(task.raw):
        if isinstance(item, Sample):
            more = (len(item.images) * variants, len(item.text))
            if chunk and (pictures + more[0] > CHUNK_PICTURES or characters + more[1] > CHUNK_CHARACTERS):
                yield chunk
                chunk, pictures, characters = [], 0, 0
            pictures, characters = pictures + more[0], characters + more[1]
        chunk.append((place, item))
        place += isinstance(item, Sample)
        if len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, pictures, characters = [], 0, 0
    if chunk or place == 0:
        yield chunk


def view_of(options: TokenizeOptions, place: int) -> View:
    """The views of a document's pictures: variant 0 as it is, others cropped as (seed, place, picture, variant) say."""

    def view(picture: PILImage.Image, number: int, variant: int) -> PILImage.Image:
        if variant == 0:
            return picture
        stream = random.Random(f"{options.seed} {place} {number} {variant}")
        share = stream.uniform(options.crop, 1)
        width, height = (max(1, round(side * share)) for side in picture.size)
        left, top = stream.randint(0, picture.width - width), stream.randint(0, picture.height - height)
        shown = picture.crop((left, top, left + width, top + height))
        if options.mirror and stream.random() < 0.5:
            shown = shown.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        return shown

    return view


def prepare_chunk(
    preparer: Preparer,
    options: TokenizeOptions,
    duplicates: Mapping[int, Sequence[bytes]],
    chunk: Sequence[tuple[int, Sample | Skipped]],
) -> list[Prepared | Skipped]:
    """What can be done without the image tokenizer's network: filters, opening and fitting pictures, text to ids."""
    result: list[Prepared | Skipped] = []
    for place, item in chunk:
        if isinstance(item, Sample):
            try:
                reason = ALL_SEEN if place in duplicates else refusal(item, options.filters)
                if reason is None:
                    result.append(preparer.prepare(item.content, view_of(options, place), options.variants))
                    continue
            except BadInput as error:
                reason = error.reason
            item = Skipped(item.key, reason)
        result.append(item)
    return result


in_worker: dict[str, Any] = {}
"""What a worker process was given when it started."""


def start_worker(preparer: Preparer, options: TokenizeOptions) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the process that gives the work, and it this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    in_worker.update(preparer=preparer, options=options)


def end_with_parent() -> None:
    """Ends this process when the one that gives it work is gone, however it went."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare_in_worker(
    duplicates: Mapping[int, Sequence[bytes]], chunk: Sequence[tuple[int, Sample | Skipped]]
) -> list[Prepared | Skipped]:
    return prepare_chunk(in_worker["preparer"], in_worker["options"], duplicates, chunk)


def prepared_chunks(
    tasks: Sequence[Task], preparer: Preparer, options: TokenizeOptions, workers: int
) -> Iterator[tuple[int, list[Prepared | Skipped]]]:
    """The number of a task and a chunk of it, in order; worker processes run ahead, into further tasks too."""
    if workers == 0:
        for number, task in enumerate(tasks):
            for chunk in chunks_of(task, options.variants):
                yield number, prepare_chunk(preparer, options, task.duplicates, chunk)
        return
    waiting: deque[tuple[int, Any]] = deque()
    given = (preparer, options)
    # Processes of their own, not forks: the library that multiplies matrices holds threads, which a fork would lose.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker, initargs=given) as pool:
        try:
            for number, task in enumerate(tasks):
                for chunk in chunks_of(task, options.variants):
                    known = {place: task.duplicates[place] for place, _ in chunk if place in task.duplicates}
                    waiting.append((number, pool.submit(prepare_in_worker, known, chunk)))
                    if len(waiting) > workers + AHEAD:
                        done, future = waiting.popleft()
                        yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise BadInput(
                "a worker process died",
                where="tokenize",
                remedy="out of memory? take fewer --workers; started again, what is done is kept",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def make_shards(
    tasks: Sequence[Task],
    tokenizer: MixedTokenizer,
    options: TokenizeOptions,
    *,
    workers: int = 0,
    strict: bool = False,
    on_chunk: Callable[[Report], None] = lambda report: None,
) -> Iterator[Report]:
    """Makes the token shard of each task, in order; its report comes when it is whole.

    `workers` processes open pictures and split text while this one runs the network. `on_chunk` is called with the
    report of the shard that is being made. Raises `BadInput` for the first sample that cannot be used if `strict`.
    """
    fingerprint, vocabulary = tokenizer.fingerprint, tokenizer.vocabulary
    chunks = prepared_chunks(tasks, tokenizer.preparer, options, workers)
    for number, group in groupby(chunks, key=itemgetter(0)):
        task, report = tasks[number], Report()
        tokenizer.image.forget()
        with write_shard(task.folder, fingerprint, vocabulary, variants=options.variants, source=task.source) as writer:
            for hashes in task.duplicates.values():
                writer.add_pictures(hashes)
                report.pictures += len(hashes)
            for _, chunk in group:
                made = [entry for entry in chunk if isinstance(entry, Prepared)]
                for entry, ids in zip(made, tokenizer.finish(made), strict=True):
                    writer.add(ids, entry.hashes)
                    report.pictures += len(entry.hashes)
                report.documents_in += len(made)
                report.documents_out += len(made)
                for item in chunk:
                    if isinstance(item, Skipped):
                        if strict and not item.why.startswith(FILTERED):
                            raise BadInput(item.why, where=item.where, remedy="repair or remove it")
                        report.skip(*item)
                report.tokens = Counter(writer.counts)
                on_chunk(report)
            writer.description["report"] = report.to_json()
        yield report


# --- all shards ------------------------------------------------------------------------------------------------------

Engine = Callable[..., Iterator[tuple[int, Report]]]
"""Makes the shards of tasks: (tasks, tokenizer, options, workers=, strict=, on_chunk=) → the number of each task when it is
done, in any order, and its report. `on_chunk` is called now and then, with the report of what is under way where the engine
knows it."""


def local(
    tasks: Sequence[Task], tokenizer: MixedTokenizer, options: TokenizeOptions, **more: Any
) -> Iterator[tuple[int, Report]]:
    """The engine of one machine: this process runs the network."""
    return enumerate(make_shards(tasks, tokenizer, options, **more))


def tokenize(
    patterns: Sequence[str],
    tokenizer: MixedTokenizer,
    out: Path,
    *,
    options: TokenizeOptions | None = None,
    engine: Engine = local,
    workers: int = 0,
    strict: bool = False,
    watch: Watch = lambda status: None,
) -> Report:
    """Sources to token shards in `out`; shards there already, made of the same files in the same way, are left.

    The report is of all shards, however many runs made them, and is written to `report.json`. Raises `BadInput` where a
    source matches nothing or is given twice, and where nothing at all could be read.
    """
    options = options or TokenizeOptions()
    options.check()
    tasks = plan(patterns, out, options)
    fingerprint, began = tokenizer.fingerprint, time.monotonic()
    with ThreadPoolExecutor() as pool:  # checksums are taken without the interpreter's lock
        there = list(pool.map(report_of, tasks, repeat(fingerprint)))
    reports = {number: found for number, found in enumerate(there) if found is not None}
    open_tasks = [number for number in range(len(tasks)) if number not in reports]
    sizes = [size_of(tasks[number].raw) for number in open_tasks]
    made, done = Report(), 0.0

    def tell(under_way: Report | None = None) -> None:
        now = Report()
        for part in (made, under_way):
            if part is not None:
                now.add(part)
        seconds = time.monotonic() - began
        left = seconds * (sum(sizes) - done) / done if done else None
        skipped = sum(now.skipped.values())
        status = (len(reports), len(tasks), now.documents_out, now.pictures, sum(now.tokens.values()), skipped, seconds)
        watch(Status(*status, left))

    run = engine(
        [tasks[number] for number in open_tasks], tokenizer, options, workers=workers, strict=strict, on_chunk=tell
    )
    for place, report in run:
        reports[open_tasks[place]] = report
        made.add(report)
        done += sizes[place]
        tell()
    whole = Report(shards_made=len(open_tasks))
    for number in range(len(tasks)):
        whole.add(reports[number])
        remove_left_over(tasks[number].folder)
    if not whole.documents_in:
        raise BadInput("nothing in it", where=", ".join(patterns), remedy="the files hold no sample")
    whole.duplicate_share = duplicate_share(task.folder / PICTURES for task in tasks)
    names = {task.folder.name for task in tasks}
    whole.others = sorted(path.parent.name for path in out.glob(f"*/{DESCRIPTION}") if path.parent.name not in names)
    with written_into(out) as place_of_report:
        write_json(place_of_report / "report.json", whole.to_json())
    return whole


def plan(patterns: Sequence[str], out: Path, options: TokenizeOptions) -> list[Task]:
    """The tasks of all sources, in order. Raises `BadInput` where one is given twice."""
    raws: dict[str, RawShard] = {}
    out = out.absolute()  # other processes, on other machines perhaps, work in other folders
    for pattern in patterns:
        for raw in map(sources.absolute, sources.expand(pattern)):
            if raw.name in raws:
                raise BadInput("given twice", where=raw.path, remedy="name each file in one source only")
            raws[raw.name] = raw
    duplicates = find_duplicates(raws.values(), options.filters) if options.filters.unique_pictures else [{} for _ in raws]
    tasks = []
    for (name, raw), found in zip(raws.items(), duplicates, strict=True):
        left_out = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
        source = {**raw.identity, "made": asdict(options), **({"duplicates": left_out} if found else {})}
        tasks.append(Task(raw, out / name, json.loads(json.dumps(source)), found))
    return tasks


def find_duplicates(raws: Iterable[RawShard], filters: Filters) -> list[dict[int, list[bytes]]]:
    """For each raw shard the samples all of whose pictures came before, in it or in an earlier one.

    What the other filters leave out does not count as having been there, nor what cannot be used as far as heads of
    pictures tell.
    """
    seen: set[bytes] = set()
    result: list[dict[int, list[bytes]]] = []
    for raw in raws:
        found: dict[int, list[bytes]] = {}
        samples = (item for item in items_of(raw) if isinstance(item, Sample))
        for place, sample in enumerate(samples):
            try:
                turns_of(sample.content)
                if refusal(sample, filters) is not None:
                    continue
                data = [picture_bytes(image) for image in sample.images]
                for one in data:
                    picture_size(one)
                hashes = list(map(picture_hash, data))
            except BadInput:  # it will be named when it is prepared
                continue
            if hashes and seen.issuperset(hashes):
                found[place] = hashes
            seen.update(hashes)
        result.append(found)
    return result


def duplicate_share(files: Iterable[Path]) -> float:
    """What share of the hashes in all files are there more than once, the first of each not counted."""
    data = np.concatenate([np.fromfile(path, dtype=f"V{HASH_BYTES}") for path in files] or [np.empty(0, f"V{HASH_BYTES}")])
    pairs = data.view("<u8").reshape(-1, 2)
    order = np.lexsort(pairs.T)
    again = (pairs[order[1:]] == pairs[order[:-1]]).all(axis=1).sum()
    return float(again) / max(1, len(pairs))


def size_of(raw: RawShard) -> float:
    """A measure of the work in a raw shard: bytes."""
    path = Path(raw.path)
    return max(1.0, float(path.stat().st_size)) if raw.kind != "emoji" and path.is_file() else 1.0


def report_of(task: Task, fingerprint: str) -> Report | None:
    """The report of a token shard that is there and whole, and was made of this task with these tokenizers; else None."""
    if not (task.folder / DESCRIPTION).is_file():
        return None
    try:
        made = TokenShard(task.folder)
        if (made.description.get("fingerprint"), made.description.get("source")) != (fingerprint, task.source):
            return None
        report = Report.from_json(made.description["report"])
        made.verify()
    except (BadInput, OSError, KeyError, TypeError):
        return None
    return report
