"""From packed rows to the loss: the one forward pass that training, validation and every kind of sharding share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from chameleon.data.mixture import Rows
from chameleon.model.loss import TokenLoss, chunked_cross_entropy, cut_cross_entropy
from chameleon.model.transformer import Transformer, packed_blocks, packed_mask

AttentionKind = Literal["auto", "dense", "flex"]
LossKind = Literal["chunked", "cut"]


class Objective(nn.Module):
    """The model with its loss. FSDP2 takes it as the root, so that the head is whole while the loss uses it."""

    def __init__(
        self, model: Transformer, *, z_loss: float, attention: AttentionKind = "auto", loss: LossKind = "chunked"
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.attention = model, z_loss, attention
        self.cross_entropy = chunked_cross_entropy if loss == "chunked" else cut_cross_entropy

    def forward(self, rows: Rows, weights: Tensor) -> TokenLoss:
        """Sum of the weighted losses of rows, each tensor [B, T]; weights [B, T] carry the normalisation."""
        flex = self.attention == "flex" or (self.attention == "auto" and rows.ids.device.type == "cuda")
        mask = (packed_blocks if flex else packed_mask)(rows.document_ids)
        hidden = self.model(rows.ids, rows.positions, mask)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return self.cross_entropy(
            hidden.flatten(0, 1),
            self.model.head.weight,
            rows.targets.flatten(),
            weights.flatten(),
            z_loss=self.z_loss,
        )
