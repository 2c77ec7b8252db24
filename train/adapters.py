"""Parametrisations of a model during training: LoRA, training the head's image rows alone, rows tied to the codebook.

`fold_adapters` folds each of them into plain weights, so a bundle never contains one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import parametrize

from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer
from chameleon.train.sharded_tensors import local_box, local_part
from chameleon.vocabulary import Vocabulary


def local_replica(value: Tensor) -> Tensor:
    """Return a tensor that all devices have, of whose gradient each computes a term."""
    return value.to_local(grad_placements=[Partial()] * value.device_mesh.ndim) if isinstance(value, DTensor) else value


class LocalRows:
    """The rows of some tokens in a weight [V, D], or in the part of its rows that a device has."""

    def __init__(self, weight: Tensor, token_ids: Tensor) -> None:
        """token_ids: int64 [K]."""
        self.original = weight
        self.weight = local_part(weight)
        first_row = local_box(weight)[0].start
        positions = local_replica(token_ids) - first_row
        self.is_here = (positions >= 0) & (positions < len(self.weight)) if isinstance(weight, DTensor) else None
        """bool [K]; None where all are."""
        self.positions = self.select(positions)

    def select(self, values: Tensor) -> Tensor:
        """Return those of values [K, …] whose tokens' rows are here."""
        values = local_replica(values)
        return values if self.is_here is None else values[self.is_here]

    def whole(self, weight: Tensor) -> Tensor:
        """Return a changed weight as what the original was: all rows, or a part of them."""
        if not isinstance(self.original, DTensor):
            return weight
        original = self.original
        return DTensor.from_local(
            weight, original.device_mesh, original.placements, shape=original.shape, stride=original.stride()
        )


class CodebookRows(nn.Module):
    """The rows of image tokens as free rows plus a linear projection of the codebook, for embedding and head.

    A free row is only trained when its code occurs; the projection is shared by all codes, so codes that are similar in the
    codebook are trained together from the first step. It starts at zero.
    """

    def __init__(self, codebook: Tensor, token_ids: Tensor, width: int) -> None:
        """codebook [K, E], which is centred and scaled to rows of norm about 1; token_ids [K]: the id of each code."""
        super().__init__()
        centred = codebook.float() - codebook.float().mean(dim=0)
        self.register_buffer("codebook", centred / (centred.std() * codebook.shape[1] ** 0.5), persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.projection = nn.Parameter(torch.zeros(codebook.shape[1], width))

    codebook: Tensor
    token_ids: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """weight [V, D]."""
        rows = LocalRows(weight, self.token_ids)
        projection = local_replica(self.projection)
        projected = (rows.select(self.codebook).to(projection.dtype) @ projection).to(weight.dtype)
        return rows.whole(rows.weight.index_add(0, rows.positions, projected))


class ImageRows(nn.Module):
    """The head's rows of image tokens as a separate parameter that replaces those of the weight."""

    def __init__(self, rows: Tensor, token_ids: Tensor) -> None:
        """rows [K, D]: their initial values; token_ids [K]: their indices in the weight."""
        super().__init__()
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.rows = nn.Parameter(rows.float().clone())

    token_ids: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """weight [V, D]."""
        rows = LocalRows(weight, self.token_ids)
        replaced = rows.select(local_replica(self.rows)).to(weight.dtype)
        return rows.whole(rows.weight.index_copy(0, rows.positions, replaced))


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on the matrices of the blocks."""

    rank: int = 16
    alpha: float = 32.0
    """The product of the two adapter matrices is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the input of the adapters."""
    targets: list[str] = field(default_factory=lambda: ["qkv", "out", "gate_up", "down"])
    """Names of the matrices of a block that get an adapter."""


def add_codebook_rows(model: Transformer, codebook: Tensor, vocabulary: Vocabulary) -> None:
    """Parametrise embedding and head with `CodebookRows`. Raise `BadInput` for a tied head."""
    if model.config.tied_head:
        raise BadInput("codebook_rows needs an untied head", where="recipe", remedy="set tied_head to false")
    for layer in (model.embed, model.head):
        rows = CodebookRows(codebook, vocabulary.image_ids.ids, model.config.width)
        parametrize.register_parametrization(layer, "weight", rows, unsafe=True)  # the weight may be on `meta`


def train_image_head_only(model: Transformer, head: Tensor, vocabulary: Vocabulary) -> None:
    """Freeze everything but the head's rows of image tokens (as Anole, arXiv 2407.06135). head [V, D]: initial values.

    Raises `BadInput` for a tied head.
    """
    if model.config.tied_head:
        raise BadInput("the image rows of a tied head are the embedding's too", where="recipe.trainable", remedy="use all")
    model.requires_grad_(False)
    token_ids = vocabulary.image_ids.ids
    parametrize.register_parametrization(model.head, "weight", ImageRows(head[token_ids], token_ids), unsafe=True)


def add_lora(model: Transformer, config: LoraConfig) -> None:
    """Freeze the model and add adapters with peft. Raise `BadInput` where peft is missing or the config is invalid."""
    try:
        import peft
    except ImportError:
        raise BadInput(
            "peft is not installed", where="recipe.trainable", remedy="pip install 'open-chameleon[lora]'"
        ) from None
    known = {name.rpartition(".")[2] for name, part in model.blocks.named_modules() if isinstance(part, nn.Linear)}
    for name in config.targets:
        if name not in known:
            raise BadInput(f"no matrix {name!r}", where="recipe.lora.targets", remedy=f"use {', '.join(sorted(known))}")
    if config.rank < 1 or not config.targets or not 0 <= config.dropout < 1:
        raise BadInput("expected rank of 1 or more, dropout below 1, and at least one target", where="recipe.lora")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.targets,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)


def plain_name(name: str) -> str:
    """Return the name that a parameter has in a model without adapters."""
    return name.replace(".parametrizations.weight.original", ".weight").replace(".base_layer.", ".")


def initial_lora_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the initial value of a LoRA matrix: A as in linear layers (Kaiming uniform, a = √5), B zero."""
    if "lora_B" in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5


def fold_adapters(model: Transformer) -> None:
    """Fold all adapters and parametrisations into the weights of the model, which is plain afterwards."""
    for layer in (model.embed, model.head):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    for block in model.blocks:
        for part in list(block.modules()):
            for name, child in list(part.named_children()):
                if hasattr(child, "base_layer"):
                    adapted: Any = child
                    adapted.merge()
                    setattr(part, name, adapted.get_base_layer())
