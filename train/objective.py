"""From a packed batch to the loss: the one forward pass that training, validation and all kinds of sharding share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from chameleon.data.mixture import PackedBatch
from chameleon.model.document_attention import document_groups
from chameleon.model.loss import TokenLoss, chunked_cross_entropy, cut_cross_entropy
from chameleon.model.transformer import (
    AttentionMask,
    Transformer,
    block_diagonal_causal_block_mask,
    block_diagonal_causal_mask,
)

AttentionKind = Literal["auto", "dense", "documents", "flex"]
MASKS: dict[str, Callable[[Tensor], AttentionMask]] = {
    "dense": block_diagonal_causal_mask,
    "documents": document_groups,
    "flex": block_diagonal_causal_block_mask,
}
"""Kind of attention → what is made of the document ids [B, T] of a batch."""
LossKind = Literal["chunked", "cut"]


class Objective(nn.Module):
    """The model with its loss: the root module of FSDP2, so that the head is gathered while the loss uses it."""

    def __init__(
        self, model: Transformer, *, z_loss: float, attention: AttentionKind = "auto", loss: LossKind = "chunked"
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.attention = model, z_loss, attention
        self.cross_entropy = chunked_cross_entropy if loss == "chunked" else cut_cross_entropy

    def forward(self, batch: PackedBatch, loss_weights: Tensor) -> TokenLoss:
        """Return the sum of the weighted losses of a batch [B, T]; loss_weights [B, T] carry the normalisation."""
        attention = self.attention
        if attention == "auto":
            attention = "flex" if batch.input_ids.device.type == "cuda" else "documents"
        mask = MASKS[attention](batch.document_ids)
        hidden = self.model(batch.input_ids, batch.positions, mask)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return self.cross_entropy(
            hidden.flatten(0, 1),
            self.model.head.weight,
            batch.targets.flatten(),
            loss_weights.flatten(),
            z_loss=self.z_loss,
        )
