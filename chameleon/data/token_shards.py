"""Token shards: what training reads. One raw shard becomes one folder, written under another name and renamed when whole.

NAME/ids.bin      uint32, little-endian: the ids of all documents, one after the other
NAME/offsets.bin  uint64, little-endian: where each document starts, and the end; n + 1 numbers
NAME/shard.json   counts, SHA-256 of both files, and the fingerprint of the tokenizers
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from chameleon.data import sources
from chameleon.data.sources import RawShard, Sample
from chameleon.data.webdataset import stop
from chameleon.errors import BadInput
from chameleon.files import checksum, write_json, written_into, written_whole
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.vocabulary import Modality, Vocabulary

IDS, OFFSETS, DESCRIPTION = "ids.bin", "offsets.bin", "shard.json"
EXAMPLES = 20  # skipped samples that a report names


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
    shards_made: int = 0
    """Shards that this run made; the others were there."""
    others: list[str] = field(default_factory=list)
    """Shards that lay in the folder before and were made of none of these sources; training on it reads them too."""

    def skip(self, where: str, why: str) -> None:
        self.documents_in += 1
        self.skipped[why] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why}")

    @property
    def skipped_share(self) -> float:
        """What share of the samples was passed over."""
        return sum(self.skipped.values()) / max(1, self.documents_in)

    def add(self, other: Report) -> None:
        """Adds another report's counts."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        self.skipped.update(other.skipped)
        self.tokens.update(other.tokens)
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        return cls(**{**value, "skipped": Counter(value["skipped"]), "tokens": Counter(value["tokens"])})


class ShardWriter:
    """Collects documents in a folder that becomes a shard; made by `write_shard`."""

    def __init__(self, file: BinaryIO, vocabulary: Vocabulary, description: dict[str, Any]) -> None:
        self.file, self.vocabulary = file, vocabulary
        self.description = description
        """What shard.json says beside the counts; may be added to until the end."""
        self.offsets = [0]
        self.counts: Counter[str] = Counter()

    def add(self, ids: torch.Tensor) -> None:
        """Appends a document of int64 ids [T]."""
        self.file.write(ids.numpy().astype("<u4").tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))
        kinds = torch.bincount(self.vocabulary.modality(ids), minlength=len(Modality)).tolist()
        self.counts.update({kind.name.lower(): kinds[kind] for kind in Modality})


@contextmanager
def write_shard(folder: Path, fingerprint: str, vocabulary: Vocabulary, **description: Any) -> Iterator[ShardWriter]:
    """A writer whose documents are the shard `folder` once the block ends well; else what was there stays."""
    with written_whole(folder) as place:
        with open(place / IDS, "wb") as file:
            writer = ShardWriter(file, vocabulary, description)
            yield writer
        np.asarray(writer.offsets, dtype="<u8").tofile(place / OFFSETS)
        counts = {
            "documents": len(writer.offsets) - 1,
            "tokens": writer.offsets[-1],
            "by_modality": dict(writer.counts),
            "sha256": {name: checksum(place / name) for name in (IDS, OFFSETS)},
            "vocabulary": vocabulary.to_json(),
        }
        write_json(place / DESCRIPTION, {**counts, "fingerprint": fingerprint, **writer.description})


class TokenShard:
    """A shard on disk: document i is `shard[i]`, int64 [T]. No file is held open, so there may be any number of shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            self.offsets = np.fromfile(folder / OFFSETS, dtype="<u8").astype(np.int64)
            counts = (self.description["documents"] + 1, 4 * self.description["tokens"])
            size = (folder / IDS).stat().st_size
        except FileNotFoundError as error:
            raise BadInput("file is missing", where=error.filename, remedy="tokenize this shard again") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise BadInput(f"not a shard's description ({error})", where=folder / DESCRIPTION) from None
        if counts != (len(self.offsets), size):
            raise BadInput("files do not have the counts of shard.json", where=folder, remedy="tokenize this shard again")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = self.offsets[number : number + 2].tolist()
        return np.fromfile(self.folder / IDS, dtype="<u4", count=end - start, offset=4 * start).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Ids in each document: int64 [n]."""
        return np.diff(self.offsets)

    def verify(self) -> None:
        """Raises `BadInput` where a file is not what it was when it was written."""
        for name, wanted in self.description.get("sha256", {}).items():
            if checksum(self.folder / name) != wanted:
                raise BadInput("checksum does not fit", where=self.folder / name, remedy="tokenize this shard again")


def open_shards(folder: Path, fingerprint: str | None = None) -> list[TokenShard]:
    """The shards in a folder, sorted by name.

    Raises `BadInput` where there is none, or where one was made with tokenizers of another `fingerprint`.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{DESCRIPTION}") if not path.parent.name.startswith("."))
    if not found:
        raise BadInput("no token shard here", where=folder, remedy="make some with `chameleon tokenize`")
    shards = [TokenShard(path) for path in found]
    for shard in shards:
        if fingerprint is not None and shard.description["fingerprint"] != fingerprint:
            raise BadInput(
                f"made with tokenizers {shard.description['fingerprint'][:12]}, the model has {fingerprint[:12]}",
                where=shard.folder,
                remedy="tokenize the sources again with this model's tokenizers",
            )
    return shards


def batches(samples: Iterable[Sample], size: int) -> Iterator[Sequence[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenize_shard(raw: RawShard, folder: Path, tokenizer: MixedTokenizer, *, strict: bool) -> Report:
    """One raw shard to one token shard. Samples that cannot be used are counted in its report, or stop it if `strict`."""
    report = Report()
    on_skip = stop if strict else report.skip
    with write_shard(folder, tokenizer.fingerprint, tokenizer.vocabulary, source=raw.identity) as writer:
        for batch in batches(sources.read(raw, on_skip), 64):
            for ids in encode_each(batch, tokenizer, on_skip):
                writer.add(ids)
                report.documents_in += 1
                report.documents_out += 1
        report.tokens.update(writer.counts)
        writer.description["report"] = report.to_json()
    return report


def encode_each(
    batch: Sequence[Sample], tokenizer: MixedTokenizer, on_skip: Callable[[str, str], None]
) -> Iterator[torch.Tensor]:
    """Ids of the samples, encoded together; where that fails, one by one, so that the bad one can be named."""
    try:
        yield from tokenizer.encode_batch([sample.content for sample in batch])
        return
    except BadInput:
        pass
    for sample in batch:
        try:
            ids = tokenizer.encode(sample.content)
        except BadInput as error:
            on_skip(sample.key, error.reason)
            continue
        yield ids


def tokenize(
    patterns: Sequence[str],
    tokenizer: MixedTokenizer,
    out: Path,
    *,
    strict: bool = False,
    progress: Callable[[int, int, Report], None] | None = None,
) -> Report:
    """Sources to token shards in `out`; shards there already, made of the same files with these tokenizers, are left.

    The report is of all shards, however many runs made them, and is written to `report.json`. `progress` is called with
    shards done, shards in all, and the report.
    """
    raw = [shard for pattern in patterns for shard in sources.expand(pattern)]
    report, fingerprint = Report(), tokenizer.fingerprint
    names = {shard.name for shard in raw}
    report.others = sorted(path.parent.name for path in out.glob(f"*/{DESCRIPTION}") if path.parent.name not in names)
    for number, shard in enumerate(raw):
        if is_done(out / shard.name, fingerprint, shard):
            report.add(Report.from_json(TokenShard(out / shard.name).description["report"]))
        else:
            report.add(tokenize_shard(shard, out / shard.name, tokenizer, strict=strict))
            report.shards_made += 1
        if progress is not None:
            progress(number + 1, len(raw), report)
    with written_into(out) as place:
        write_json(place / "report.json", report.to_json())
    return report


def is_done(folder: Path, fingerprint: str, raw: RawShard) -> bool:
    """Whether the token shard is there and whole, and was made of this raw shard as it is now, with these tokenizers."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        made = TokenShard(folder)
        if (made.description.get("fingerprint"), made.description.get("source")) != (fingerprint, raw.identity):
            return False
        Report.from_json(made.description["report"])
        made.verify()
    except (BadInput, KeyError, TypeError):
        return False
    return True
