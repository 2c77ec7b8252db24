"""Data loading for the Transformer: batches by their index, and the time spent waiting for them."""

from __future__ import annotations

import hashlib
import math
import time
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from torch.utils.data import DataLoader, Dataset

from chameleon.data.mixture import Mixture, PackedBatch, stack_rows
from chameleon.errors import BadInput
from chameleon.train.processes import ignore_stop_signals
from chameleon.train.step_module import StepDataset


class PackedBatchDataset(StepDataset):
    """Item n is one device's part of batch `first_batch` + n.

    It has more batches than the run has steps, since a rollback continues with later batches.
    """

    def __init__(self, mixture: Mixture, num_batches: int, *, rank: int = 0, world: int = 1) -> None:
        """rank, world: which of how many data-parallel parts."""
        self.mixture, self.num_batches = mixture, num_batches
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> PackedBatch:
        return self.mixture.batch(self.first_batch + index, self.rank, self.world)


class ValidationDataset(Dataset[PackedBatch]):
    """One device's part of the rows of all sources, each of which one device sees once.

    All devices have as many batches; where rows are missing, one without loss stands in.
    """

    def __init__(self, mixture: Mixture, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        """batch_size: rows of one forward pass on a device."""
        self.mixture, self.batch_size, self.rank, self.world = mixture, batch_size, rank, world
        self.ends = list(accumulate(map(len, mixture.sources)))
        """Number of the first row after each source's."""
        self.num_rows = self.ends[-1]

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.batch_size * self.world))

    def __getitem__(self, index: int) -> PackedBatch:
        first = index * self.batch_size * self.world + self.rank
        rows = range(first, first + self.batch_size * self.world, self.world)
        batch = stack_rows(self.row(min(row, self.num_rows - 1)) for row in rows)
        for position, row in enumerate(rows):
            if row >= self.num_rows:
                batch.loss_weights[position] = 0
        return batch

    def row(self, number: int) -> PackedBatch:
        """Return a row of all sources' rows, which follow each other whatever the weights: each tensor [T]."""
        source = bisect_right(self.ends, number)
        first = self.ends[source - 1] if source else 0
        return self.mixture.sources[source].row(number - first, 0, self.mixture.seed)


class TimedLoader:
    """A data loader that measures how long it is waited for."""

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        """dataset: of batches. num_workers: processes that read them; 0 for this one."""
        self.loader = DataLoader(
            ErrorsAsItems(dataset),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals if num_workers else None,
        )
        self.seconds_waited = 0.0
        """In all."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Begin with the first batch that is asked for, when a run that is resumed knows which one it is."""
        batches = iter(self.loader)
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                self.seconds_waited += time.perf_counter() - start
                if isinstance(batch, BadInput):
                    raise batch
                yield batch
        finally:
            del batches  # ends its processes, which would outlive an error that is kept


class ErrorsAsItems(Dataset[Any]):
    """A dataset in which a batch that raises `BadInput` is that error: a loader would add its process's traceback to it."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except BadInput as error:
            return error


def data_fingerprint(mixture: Mixture) -> dict[str, str]:
    """Return for each source a SHA-256 over the checksums of its shards' token ids, all variants."""
    fingerprints = {}
    for source in mixture.sources:
        digest = hashlib.sha256()
        for shard in source.shards:
            for file_name, checksum in sorted(shard.description["sha256"].items()):
                if file_name.startswith("ids"):
                    digest.update(checksum.encode())
        fingerprints[source.config.display_name] = digest.hexdigest()
    return fingerprints
