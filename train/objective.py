"""From a packed batch to the loss: the one forward pass that training, validation and all kinds of sharding share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from chameleon.data.mixture import PackedBatch
from chameleon.model.document_attention import document_groups
from chameleon.model.loss import TokenLoss, VocabularyPart, chunked_cross_entropy, cut_cross_entropy
from chameleon.model.transformer import (
    AttentionMask,
    Transformer,
    block_diagonal_causal_block_mask,
    block_diagonal_causal_mask,
)
from chameleon.train.sharded_tensors import local_box

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
        self.loss = loss
        self.tensor_parallel_mesh: DeviceMesh | None = None
        """Devices that split the model: each then has the hidden states of some tokens, and some rows of the head."""

    def forward(self, batch: PackedBatch, loss_weights: Tensor) -> TokenLoss:
        """Return the sum of the weighted losses of a batch [B, T]; loss_weights [B, T] carry the normalisation."""
        attention = self.attention
        if attention == "auto":
            attention = "flex" if batch.input_ids.device.type == "cuda" else "documents"
        mask = MASKS[attention](batch.document_ids)
        hidden = self.model(batch.input_ids, batch.positions, mask)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        head, part = self.model.head.weight, None
        if self.tensor_parallel_mesh is not None:
            hidden = whole_sequences(hidden, self.tensor_parallel_mesh)
            assert isinstance(head, DTensor)
            mesh, first_row = self.tensor_parallel_mesh, local_box(head)[0].start
            max_rows = -(-head.shape[0] // mesh.size())
            head, part = head.to_local(), VocabularyPart(first_row, max_rows, mesh.get_group())
        tensors = (hidden.flatten(0, 1), head, batch.targets.flatten(), loss_weights.flatten())
        if self.loss == "cut":
            return cut_cross_entropy(*tensors, z_loss=self.z_loss)
        return chunked_cross_entropy(*tensors, z_loss=self.z_loss, part=part)


def whole_sequences(hidden: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the hidden states [B, T, D] of all tokens, of which each device has a part [B, T / devices, D].

    The gradient is a sum over the devices, of which each one computes a term.
    """
    gathered = DTensor.from_local(hidden, mesh, [Shard(1)]).redistribute(placements=[Replicate()])
    return gathered.to_local(grad_placements=[Partial()])
