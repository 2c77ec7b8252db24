"""Metrics of a logged training step of the Transformer, summed on the device and over all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chameleon.data.mixture import Mixture, PackedBatch
from chameleon.model.loss import TokenLoss
from chameleon.vocabulary import Modality

MODALITIES = (Modality.TEXT, Modality.IMAGE)


class ModalityTotals(NamedTuple):
    """Sums over the tokens of a modality on which the loss is taken."""

    tokens: float
    nll: float
    log_z: float


class SourceTotals(NamedTuple):
    """Sums over the tokens of a source on which the loss is taken."""

    tokens: float
    nll: float


class StepTotals(NamedTuple):
    """Totals of a logged training step over all processes."""

    modalities: list[ModalityTotals]
    sources: list[SourceTotals]

    @classmethod
    def from_list(cls, values: Sequence[float]) -> StepTotals:
        """Unpack what `local_totals` packed."""
        per_modality = [ModalityTotals(*values[3 * i : 3 + 3 * i]) for i in range(len(MODALITIES))]
        rest = values[3 * len(MODALITIES) :]
        return cls(per_modality, [SourceTotals(*rest[i : i + 2]) for i in range(0, len(rest), 2)])

    def metrics(self, source_names: Sequence[str]) -> dict[str, float]:
        """Return the values for the log."""
        num_tokens = max(1.0, sum(modality.tokens for modality in self.modalities))
        metrics = {"train/log_z": sum(modality.log_z for modality in self.modalities) / num_tokens}
        for kind, totals in zip(MODALITIES, self.modalities, strict=True):
            metrics[f"train/{kind.name.lower()}_loss"] = mean(totals.nll, totals.tokens)
            metrics[f"train/{kind.name.lower()}_log_z"] = mean(totals.log_z, totals.tokens)
        if len(source_names) > 1:
            for name, source in zip(source_names, self.sources, strict=True):
                metrics[f"source/{name}_loss"] = mean(source.nll, source.tokens)
        return metrics


def mean(total: float, count: float) -> float:
    """Return total / count; NaN, which loggers show as a gap, where a batch has none."""
    return total / count if count else math.nan


def local_totals(
    batch: PackedBatch, modality: Tensor, token_losses: Sequence[TokenLoss], source_of_row: Tensor, num_sources: int
) -> list[Tensor]:
    """Return this process's terms of `StepTotals`, to be summed over all data-parallel processes: float64 tensors [N].

    token_losses: of the micro-batches. source_of_row: int64 [B].
    """
    nll = torch.cat([token_loss.nll for token_loss in token_losses]).detach()
    log_z = torch.cat([token_loss.log_z for token_loss in token_losses]).detach()
    has_loss = batch.loss_weights.flatten() > 0
    totals = []
    for kind in MODALITIES:
        is_kind = has_loss & (modality.flatten() == kind)
        totals += [is_kind.sum(), nll[is_kind].sum(), log_z[is_kind].sum()]
    per_row = torch.stack((batch.loss_weights.gt(0).sum(1), nll.view(batch.input_ids.shape).sum(1)), dim=1).double()
    per_source = torch.zeros(num_sources, 2, dtype=torch.float64, device=nll.device).index_add(0, source_of_row, per_row)
    return [torch.stack([total.double() for total in totals]), per_source.flatten()]


def sources_of_rows(mixture: Mixture, batch_index: int, rank: int, world: int) -> list[int]:
    """Return the index of the source of each row of one process's part of a batch."""
    first, end = batch_index * mixture.global_batch_size, (batch_index + 1) * mixture.global_batch_size
    return [mixture.locate(row)[0] for row in range(first + rank, end, world)]
