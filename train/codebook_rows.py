"""Rows of image codes that learn together while training: the codebook's geometry lent to embedding and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary


class CodebookRows(nn.Module):
    """Rows of image ids as free rows plus a projection of the codebook: a parametrisation of embedding and head.

    A row learned alone sees its code rarely; the projection is shared by all, so codes near each other in the codebook
    move together from the first step. It starts at zero and is folded away by `fold_codebook_rows`.
    """

    def __init__(self, codebook: Tensor, ids: Tensor, width: int) -> None:
        """codebook [K, E], put to mean 0 and rows of length about 1; ids [K]: the weight's row of each code."""
        super().__init__()
        centred = codebook.float() - codebook.float().mean(dim=0)
        self.register_buffer("codebook", centred / (centred.std() * codebook.shape[1] ** 0.5), persistent=False)
        self.register_buffer("ids", ids, persistent=False)
        self.projection = nn.Parameter(torch.zeros(codebook.shape[1], width))

    codebook: Tensor
    ids: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """weight [V, D]."""
        return weight.index_add(0, self.ids, (self.codebook @ self.projection).to(weight.dtype))


def add_codebook_rows(model: Transformer, codebook: Tensor, vocabulary: Vocabulary) -> None:
    """Puts `CodebookRows` on embedding and head. Raises `BadInput` where they are one."""
    if model.config.tied_head:
        raise BadInput("codebook_rows needs an untied head", where="recipe", remedy="set tied_head to false")
    for table in (model.embed, model.head):
        rows = CodebookRows(codebook, vocabulary.image_ids.ids, model.config.width)
        parametrize.register_parametrization(table, "weight", rows)


def fold_codebook_rows(model: Transformer) -> None:
    """Makes embedding and head plain again, with the projection added to their rows."""
    for table in (model.embed, model.head):
        if parametrize.is_parametrized(table):
            parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
