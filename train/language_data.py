"""Data loading for the Transformer: batches by their index, and the time spent waiting for them."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from chameleon.data.mixture import Mixture, PackedBatch
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
    """One device's part of the validation rows, each of which one device sees once.

    All devices have as many batches; where rows are missing, one without loss stands in.
    """

    def __init__(self, mixture: Mixture, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        """batch_size: rows of one forward pass on a device."""
        self.mixture, self.batch_size, self.rank, self.world = mixture, batch_size, rank, world
        self.num_rows = sum(map(len, mixture.sources))

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.batch_size * self.world))

    def __getitem__(self, index: int) -> PackedBatch:
        first = index * self.batch_size * self.world + self.rank
        rows = range(first, first + self.batch_size * self.world, self.world)
        batch = self.mixture.rows([min(row, self.num_rows - 1) for row in rows])
        for position, row in enumerate(rows):
            if row >= self.num_rows:
                batch.loss_weights[position] = 0
        return batch


class TimedLoader:
    """A data loader that measures how long it is waited for."""

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        """dataset: of batches. num_workers: processes that read them; 0 for this one."""
        self.loader = DataLoader(
            dataset, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_stop_signals if num_workers else None
        )
        self.seconds_waited = 0.0
        """In all."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Begin with the first batch that is asked for, when a run that is resumed knows which one it is."""
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds_waited += time.perf_counter() - start
            yield batch


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
