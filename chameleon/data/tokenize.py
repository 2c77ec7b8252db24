"""Tokenisation of raw shards to token shards.

A raw shard is one task, whose result depends on nothing but its files, the tokenizers and `TokenizeOptions`: pictures are
encoded in batches of that shard alone, in its order. So a run may be killed at any point; started again it writes what is
missing, and the result is the same to the byte, whichever engine ran it with however many processes. (On another processor
or with another number of threads, products round differently, so a code may differ where two are equally near.)
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage

from chameleon.allocator import keep_freed_memory
from chameleon.data import sources
from chameleon.data.duplicates import Duplicates, duplicate_share, find_duplicates
from chameleon.data.filters import ALL_DUPLICATES, FILTERED, Filters, reason_to_filter
from chameleon.data.source_types import RawShard, Sample
from chameleon.data.token_shards import DESCRIPTION, PICTURES, TokenShard, write_shard
from chameleon.data.worker_pool import worker_pool
from chameleon.errors import BadInput, check_seed
from chameleon.files import atomic_update, remove_stale_partials, write_json
from chameleon.tokenizers.image import BATCH_SIZE
from chameleon.tokenizers.mixed import DocumentPreparer, MixedTokenizer, PreparedDocument, View, ViewFunction

MAX_EXAMPLES = 20
"""Skipped samples that a report names."""
MAX_REASONS, OTHER_REASONS = 100, "other reasons"
"""Reasons that a report counts separately; some decoders' messages contain numbers."""
CHUNK_DOCUMENTS, CHUNK_PICTURES, CHUNK_CHARACTERS = 64, BATCH_SIZE, 1 << 20
"""Size of a chunk, which is prepared and encoded together."""
DUPLICATES_FOLDER = ".duplicates"
SHAPE_OPTIONS = ("target_side", "max_ratio")
CHUNKS_AHEAD = 2
"""Chunks queued in addition to those being processed by workers."""


@dataclass
class TokenizeOptions:
    """What decides, besides files and tokenizers, the contents of a token shard."""

    filters: Filters = field(default_factory=Filters)
    variants: int = 1
    """Views of each document's pictures: the first is unchanged, the others are random crops; epoch e of a training run
    sees view e modulo `variants`."""
    crop: float = 0.8
    """The least fraction of a picture's sides that a crop shows."""
    mirror: bool = False
    """Whether a crop may be mirrored; captions are then wrong about text, left and right."""
    seed: int = 0
    target_side: int | None = None
    """Side in pixels of a square picture, whose area pictures of other shapes have too; None: the tokenizers' own. Only in
    the sized dialect, and so is `max_ratio`."""
    max_ratio: float | None = None
    """Long side of a picture over its short side at most; None: the tokenizers' own."""

    def check(self) -> None:
        """Raise `BadInput` for invalid values."""
        where = "options of tokenize"
        if self.variants < 1:
            raise BadInput(f"variants is {self.variants}, expected 1 or more", where=where)
        if not 0 < self.crop <= 1:
            raise BadInput(f"crop is {self.crop}, expected a fraction above 0 and at most 1", where=where)
        check_seed(self.seed, where)
        self.filters.check()

    def to_json(self) -> dict[str, Any]:
        """Return the options; shapes and near duplicates only where they are given, since earlier shards have none."""
        options = {name: value for name, value in asdict(self).items() if name not in SHAPE_OPTIONS or value is not None}
        if not self.filters.near_duplicates:
            del options["filters"]["near_duplicates"]
        return options

    def preparer(self, tokenizer: MixedTokenizer) -> DocumentPreparer:
        """Return the tokenizer's preparer, for these shapes of pictures. Raise `BadInput` where it has no such."""
        preparer = tokenizer.preparer
        return replace(preparer, fitter=preparer.fitter.with_shapes(self.target_side, self.max_ratio))


@dataclass
class Report:
    """Counts of a tokenisation."""

    documents_in: int = 0
    documents_out: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped samples by reason."""
    examples: list[str] = field(default_factory=list)
    """The first skipped samples, by name."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens written, by modality."""
    pictures: int = 0
    """Pictures read."""
    bytes_in: int = 0
    """Size of the files that were read."""
    bytes_read: int = 0
    """Size of the texts and pictures read so far, of a shard in progress; for an estimate of the time left."""
    unreadable_bytes: int = 0
    """Bytes of damaged archives that could not be read, in which further samples may have been lost."""
    duplicate_share: float = 0.0
    """Share of the pictures that are duplicates, byte for byte; known once all shards are written."""
    shards_made: int = 0
    """Shards written by this run; the others existed."""
    others: list[str] = field(default_factory=list)
    """Shards in the folder that belong to none of these sources; training on the folder reads them too."""

    def skip(self, where: str, reason: str, num_bytes: int = 0) -> None:
        """Count a skipped sample, or a damaged place in an archive: a `SkipHandler`."""
        self.documents_in += 1
        self.unreadable_bytes += num_bytes
        self.count_skipped(reason, 1)
        if len(self.examples) < MAX_EXAMPLES:
            lost = f" ({num_bytes} bytes could not be read)" if num_bytes else ""
            self.examples.append(f"{where}: {reason}{lost}")

    def count_skipped(self, reason: str, count: int) -> None:
        is_separate = reason in self.skipped or len(self.skipped) < MAX_REASONS or reason.startswith(FILTERED)
        self.skipped[reason if is_separate else OTHER_REASONS] += count

    @property
    def skipped_share(self) -> float:
        """The share of the samples, or of the bytes where that is more, that could not be read; filtered ones are fine."""
        unusable = sum(count for reason, count in self.skipped.items() if not reason.startswith(FILTERED))
        lost_bytes = self.unreadable_bytes / max(1, self.bytes_in, self.unreadable_bytes)
        return max(unusable / max(1, self.documents_in), lost_bytes)

    def add(self, other: Report) -> None:
        """Add another report's counts."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        for reason, count in other.skipped.items():
            self.count_skipped(reason, count)
        self.tokens.update(other.tokens)
        self.pictures += other.pictures
        self.bytes_in += other.bytes_in
        self.unreadable_bytes += other.unreadable_bytes
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "bytes_read"}
        return {**values, "skipped": dict(self.skipped), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        return cls(**{**value, "skipped": Counter(value["skipped"]), "tokens": Counter(value["tokens"])})


class Skipped(NamedTuple):
    """A sample that is skipped."""

    where: str
    reason: str
    num_bytes: int = 0
    """Bytes of a damaged archive that could not be read."""


class Task(NamedTuple):
    """A raw shard, the folder of its token shard, and its samples that are left out as duplicates."""

    raw: RawShard
    folder: Path
    source: dict[str, Any]
    """What decides whether a token shard is up to date: the raw shard's identity and the options."""
    duplicates: Mapping[int, Sequence[bytes]]
    """Index of a sample to leave out → the hashes of its pictures."""


class Status(NamedTuple):
    """The progress of a run."""

    shards: int
    total_shards: int
    documents: int
    """Documents written in this run."""
    pictures: int
    tokens: int
    skipped: int
    seconds: float
    """Since the start of the run."""
    seconds_left: float | None
    """Estimated by the size of the raw shards and of what was read of the one in progress; None before anything was."""


StatusCallback = Callable[[Status], None]


# --- one shard -------------------------------------------------------------------------------------------------------


def read_items(raw: RawShard) -> Iterator[Sample | Skipped]:
    """Yield the samples of a raw shard in order, and skipped ones in their place."""
    skipped: list[Skipped] = []

    def on_skip(where: str, reason: str, num_bytes: int = 0) -> None:
        skipped.append(Skipped(where, reason, num_bytes))

    for sample in sources.read(raw, on_skip):
        yield from skipped
        skipped.clear()
        yield sample
    yield from skipped


Chunk = list[tuple[int, Sample | Skipped]]
"""Samples with their index in the raw shard, skipped ones not counted."""


def read_chunks(task: Task, variants: int) -> Iterator[Chunk]:
    """Yield a task's samples in chunks; at least one chunk, which may be empty."""
    chunk: Chunk = []
    num_pictures = num_characters = 0
    sample_index = 0
    for item in read_items(task.raw):
        if isinstance(item, Sample):
            pictures, characters = len(item.images) * variants, len(item.text)
            is_full = num_pictures + pictures > CHUNK_PICTURES or num_characters + characters > CHUNK_CHARACTERS
            if chunk and is_full:
                yield chunk
                chunk, num_pictures, num_characters = [], 0, 0
            num_pictures, num_characters = num_pictures + pictures, num_characters + characters
        chunk.append((sample_index, item))
        sample_index += isinstance(item, Sample)
        if len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, num_pictures, num_characters = [], 0, 0
    if chunk or sample_index == 0:
        yield chunk


def view_function(options: TokenizeOptions, sample_index: int) -> ViewFunction:
    """Return the views of a document's pictures: variant 0 unchanged, others random crops by (seed, sample, variant).

    Where a picture is cropped to the shape of an image, the first shows its centre, the others a random part.
    """

    def view(picture: PILImage.Image, picture_index: int, variant: int) -> View:
        if variant == 0:
            return View(picture)
        rng = random.Random(f"{options.seed} {sample_index} {picture_index} {variant}")
        fraction = rng.uniform(options.crop, 1)
        width, height = (max(1, round(side * fraction)) for side in picture.size)
        left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        cropped = picture.crop((left, top, left + width, top + height))
        if options.mirror and rng.random() < 0.5:
            cropped = cropped.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        return View(cropped, (rng.random(), rng.random()))

    return view


def prepare_chunk(
    preparer: DocumentPreparer,
    options: TokenizeOptions,
    duplicates: Mapping[int, Sequence[bytes]],
    chunk: Chunk,
) -> list[PreparedDocument | Skipped]:
    """Do what does not need the image tokenizer's network: filters, reading and resizing pictures, text to token ids."""
    result: list[PreparedDocument | Skipped] = []
    for sample_index, item in chunk:
        if isinstance(item, Sample):
            try:
                is_duplicate = sample_index in duplicates
                reason = ALL_DUPLICATES if is_duplicate else reason_to_filter(item, options.filters)
                if reason is None:
                    view = view_function(options, sample_index)
                    result.append(preparer.prepare(item.content, view, options.variants, item.image_files))
                    continue
            except BadInput as error:
                reason = error.reason
            item = Skipped(item.key, reason)
        result.append(item)
    return result


worker_state: dict[str, Any] = {}
"""What a worker process got when it started."""


def keep_in_worker(preparer: DocumentPreparer, options: TokenizeOptions) -> None:
    worker_state.update(preparer=preparer, options=options)


def prepare_in_worker(duplicates: Mapping[int, Sequence[bytes]], chunk: Chunk) -> list[PreparedDocument | Skipped]:
    return prepare_chunk(worker_state["preparer"], worker_state["options"], duplicates, chunk)


def size_of_chunk(chunk: Chunk) -> int:
    """Return the bytes of a chunk's texts and pictures, as far as these were read with them."""
    samples = [item for _, item in chunk if isinstance(item, Sample)]
    pictures = [image for sample in samples for image in sample.images if isinstance(image, (bytes, str))]
    return sum(len(sample.text) for sample in samples) + sum(map(len, pictures))


def prepared_chunks(
    tasks: Sequence[Task], preparer: DocumentPreparer, options: TokenizeOptions, num_workers: int
) -> Iterator[tuple[int, list[PreparedDocument | Skipped], int]]:
    """Yield (index of a task, a prepared chunk of it, its bytes), in order; worker processes run ahead."""
    if num_workers == 0:
        for task_index, task in enumerate(tasks):
            for chunk in read_chunks(task, options.variants):
                yield task_index, prepare_chunk(preparer, options, task.duplicates, chunk), size_of_chunk(chunk)
        return
    queue: deque[tuple[int, Any, int]] = deque()
    with worker_pool(num_workers, "tokenize", keep_in_worker, (preparer, options)) as pool:
        for task_index, task in enumerate(tasks):
            for chunk in read_chunks(task, options.variants):
                duplicates = {index: task.duplicates[index] for index, _ in chunk if index in task.duplicates}
                future = pool.submit(prepare_in_worker, duplicates, chunk)
                queue.append((task_index, future, size_of_chunk(chunk)))
                if len(queue) > num_workers + CHUNKS_AHEAD:
                    first_index, future, size = queue.popleft()
                    yield first_index, future.result(), size
        while queue:
            first_index, future, size = queue.popleft()
            yield first_index, future.result(), size


def make_shards(
    tasks: Sequence[Task],
    tokenizer: MixedTokenizer,
    options: TokenizeOptions,
    *,
    num_workers: int = 0,
    strict: bool = False,
    on_chunk: Callable[[Report], None] = lambda report: None,
) -> Iterator[Report]:
    """Write the token shard of each task, in order, and yield its report when it is complete.

    `num_workers` processes read pictures and encode text while this one runs the network. `on_chunk` is called with the
    report of the shard in progress. Raises `BadInput` for the first sample that cannot be used if `strict`.
    """
    fingerprint, vocabulary = tokenizer.fingerprint, tokenizer.vocabulary
    chunks = prepared_chunks(tasks, options.preparer(tokenizer), options, num_workers)
    for task_index, group in groupby(chunks, key=itemgetter(0)):
        task = tasks[task_index]
        report = Report(bytes_in=task.raw.num_bytes)
        tokenizer.image.clear_cache()
        with write_shard(task.folder, fingerprint, vocabulary, variants=options.variants, source=task.source) as writer:
            for hashes in task.duplicates.values():
                writer.add_picture_hashes(hashes)
                report.pictures += len(hashes)
            for _, chunk, size in group:
                report.bytes_read += size
                documents = [item for item in chunk if isinstance(item, PreparedDocument)]
                for document, token_ids in zip(documents, tokenizer.insert_image_codes(documents), strict=True):
                    writer.add(token_ids, document.hashes)
                    report.pictures += len(document.hashes)
                report.documents_in += len(documents)
                report.documents_out += len(documents)
                for item in chunk:
                    if isinstance(item, Skipped):
                        if strict and not item.reason.startswith(FILTERED):
                            raise BadInput(item.reason, where=item.where, remedy="repair or remove it")
                        report.skip(*item)
                report.tokens = Counter(writer.token_counts)
                on_chunk(report)
            writer.description["report"] = report.to_json()
        yield report


# --- all shards ------------------------------------------------------------------------------------------------------

TokenizeEngine = Callable[..., Iterator[tuple[int, Report]]]
"""Writes the shards of tasks: (tasks, tokenizer, options, num_workers=, strict=, on_chunk=) → (index of a task, its report)
when it is done, in any order. `on_chunk` is called now and then, with the report of the shard in progress where the engine
knows it."""


def local_engine(
    tasks: Sequence[Task],
    tokenizer: MixedTokenizer,
    options: TokenizeOptions,
    *,
    num_workers: int = 0,
    strict: bool = False,
    on_chunk: Callable[[Report], None] = lambda report: None,
) -> Iterator[tuple[int, Report]]:
    """Run all tasks on this machine; this process runs the network."""
    keep_freed_memory()
    reports = make_shards(tasks, tokenizer, options, num_workers=num_workers, strict=strict, on_chunk=on_chunk)
    return enumerate(reports)


def tokenize(
    patterns: Sequence[str],
    tokenizer: MixedTokenizer,
    out: Path,
    *,
    options: TokenizeOptions | None = None,
    engine: TokenizeEngine = local_engine,
    num_workers: int = 0,
    strict: bool = False,
    allow_paths: bool = False,
    on_status: StatusCallback = lambda status: None,
) -> Report:
    """Tokenise sources to token shards in `out`; existing shards of the same files and options are kept.

    The report is of all shards, however many runs wrote them, and is written to `report.json`. allow_paths: whether
    records may name images outside their folder. Raises `BadInput` where a source matches nothing or is given twice, and
    where nothing at all could be read.
    """
    options = options or TokenizeOptions()
    options.check()
    options.preparer(tokenizer)  # raises for shapes that the tokenizers do not have
    tasks = plan_tasks(patterns, out, options, allow_paths=allow_paths, num_workers=num_workers)
    fingerprint, start_time = tokenizer.fingerprint, time.monotonic()
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        existing = list(pool.map(existing_report, tasks, repeat(fingerprint)))
    existing_reports = {index: report for index, report in enumerate(existing) if report is not None}
    reports = dict(existing_reports)
    remaining = [index for index in range(len(tasks)) if index not in reports]
    sizes = [max(1, tasks[index].raw.num_bytes) for index in remaining]
    completed, completed_size = Report(), 0

    def send_status(in_progress: Report | None = None) -> None:
        current = Report()
        for part in (completed, in_progress):
            if part is not None:
                current.add(part)
        seconds = time.monotonic() - start_time
        done = completed_size
        num_completed = len(reports) - len(existing_reports)
        if in_progress is not None and num_completed < len(sizes):  # engines that tell of it go in order
            done += min(in_progress.bytes_read, sizes[num_completed] - 1)  # a task that is no file has size 1
        on_status(
            Status(
                shards=len(reports),
                total_shards=len(tasks),
                documents=current.documents_out,
                pictures=current.pictures,
                tokens=sum(current.tokens.values()),
                skipped=sum(current.skipped.values()),
                seconds=seconds,
                seconds_left=seconds * max(0, sum(sizes) - done) / done if done else None,
            )
        )

    remaining_tasks = [tasks[index] for index in remaining]
    run = engine(remaining_tasks, tokenizer, options, num_workers=num_workers, strict=strict, on_chunk=send_status)
    for index_in_run, report in run:
        reports[remaining[index_in_run]] = report
        completed.add(report)
        completed_size += sizes[index_in_run]
        send_status()
    total = Report(shards_made=len(remaining))
    for index, task in enumerate(tasks):
        total.add(reports[index])
        remove_stale_partials(task.folder)
    if not total.documents_in:
        raise BadInput("no samples", where=", ".join(patterns), remedy="the files are empty")
    total.duplicate_share = duplicate_share([task.folder / PICTURES for task in tasks])
    names = {task.folder.name for task in tasks}
    total.others = sorted(path.parent.name for path in out.glob(f"*/{DESCRIPTION}") if path.parent.name not in names)
    with atomic_update(out) as partial:
        write_json(partial / "report.json", total.to_json())
    return total


def plan_tasks(
    patterns: Sequence[str], out: Path, options: TokenizeOptions, *, allow_paths: bool = False, num_workers: int = 0
) -> list[Task]:
    """Return the tasks of all sources, in order. Raise `BadInput` where a file is given twice.

    num_workers: processes that look for duplicates.
    """
    raw_shards: dict[str, RawShard] = {}
    out = out.absolute()  # other processes, maybe on other machines, have other working directories
    for pattern in patterns:
        for raw in sources.expand(pattern, allow_paths=allow_paths):
            raw = raw.absolute()
            name = sources.shard_name(raw)
            if name in raw_shards:
                raise BadInput("given twice", where=raw.path, remedy="name each file in one source only")
            raw_shards[name] = raw
    duplicates = [Duplicates() for _ in raw_shards]
    if options.filters.unique_images or options.filters.near_duplicates:
        duplicates = find_duplicates(list(raw_shards.values()), options.filters, out / DUPLICATES_FOLDER, num_workers)
    tasks = []
    for (name, raw), left_out in zip(raw_shards.items(), duplicates, strict=True):
        digest = hashlib.sha256(repr(sorted(left_out)).encode()).hexdigest()
        source = {**raw.identity, "made": options.to_json(), **({"duplicates": digest} if left_out else {})}
        tasks.append(Task(raw, out / name, json.loads(json.dumps(source)), left_out))
    return tasks


def existing_report(task: Task, fingerprint: str) -> Report | None:
    """Return the report of a token shard that is complete and belongs to this task and these tokenizers; else None."""
    if not (task.folder / DESCRIPTION).is_file():
        return None
    try:
        shard = TokenShard(task.folder)
        if (shard.description.get("fingerprint"), shard.description.get("source")) != (fingerprint, task.source):
            return None
        report = Report.from_json(shard.description["report"])
        shard.verify()
    except (BadInput, OSError, KeyError, TypeError):
        return None
    return report
