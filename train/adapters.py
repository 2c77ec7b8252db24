"""What training may put on a model and take off again: a part of it that learns alone, and rows that learn together.

Each is put on with `add_…` and folded into plain weights by `fold`, so a bundle never knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary


class CodebookRows(nn.Module):
    """Rows of image ids as free rows plus a projection of the codebook: a parametrisation of embedding and head.

    A row learned alone sees its code rarely; the projection is shared by all, so codes near each other in the codebook
    move together from the first step. It starts at zero.
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
        return weight.index_add(0, self.ids, (self.codebook.to(self.projection.dtype) @ self.projection).to(weight.dtype))


class ImageRows(nn.Module):
    """The head's rows of image ids as a parameter of their own, in place of those of the weight."""

    def __init__(self, rows: Tensor, ids: Tensor) -> None:
        """rows [K, D]: where they start; ids [K]: their places in the weight."""
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows.float().clone())

    ids: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """weight [V, D]."""
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on the matrices of the blocks."""

    rank: int = 16
    alpha: float = 32.0
    """The adapters' product counts alpha / rank."""
    dropout: float = 0.0
    """On what goes into the adapters."""
    targets: list[str] = field(default_factory=lambda: ["qkv", "out", "gate_up", "down"])
    """Names of the matrices, within a block, that get one."""


def add_codebook_rows(model: Transformer, codebook: Tensor, vocabulary: Vocabulary) -> None:
    """Puts `CodebookRows` on embedding and head. Raises `BadInput` where they are one."""
    if model.config.tied_head:
        raise BadInput("codebook_rows needs an untied head", where="recipe", remedy="set tied_head to false")
    for table in (model.embed, model.head):
        rows = CodebookRows(codebook, vocabulary.image_ids.ids, model.config.width)
        parametrize.register_parametrization(table, "weight", rows, unsafe=True)  # the weight may have no values yet


def open_image_head(model: Transformer, head: Tensor, vocabulary: Vocabulary) -> None:
    """Freezes all but the head's rows of image ids (what Anole did, arXiv 2407.06135). head [V, D]: where they start.

    Raises `BadInput` where embedding and head are one.
    """
    if model.config.tied_head:
        raise BadInput("the image rows of a tied head are the embedding's too", where="recipe.learn", remedy="use all")
    model.requires_grad_(False)
    ids = vocabulary.image_ids.ids
    parametrize.register_parametrization(model.head, "weight", ImageRows(head[ids], ids), unsafe=True)


def add_lora(model: Transformer, config: LoraConfig) -> None:
    """Freezes the model and puts adapters on it, by peft. Raises `BadInput` where it is missing or the config is wrong."""
    try:
        import peft
    except ImportError:
        raise BadInput("peft is not installed", where="recipe.learn", remedy="pip install 'open-chameleon[lora]'") from None
    known = {name.rpartition(".")[2] for name, part in model.blocks.named_modules() if isinstance(part, nn.Linear)}
    for name in config.targets:
        if name not in known:
            raise BadInput(f"no matrix {name!r}", where="recipe.lora.targets", remedy=f"use {', '.join(sorted(known))}")
    if config.rank < 1 or not config.targets or not 0 <= config.dropout < 1:
        raise BadInput("rank is 1 or more, dropout below 1, and targets are named", where="recipe.lora")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.targets,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)


def plain_name(name: str) -> str:
    """The name that a parameter has in a plain model."""
    return name.replace(".parametrizations.weight.original", ".weight").replace(".base_layer.", ".")


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What a LoRA matrix starts from: A as linear layers do (Kaiming's uniform, a = √5), B at zero."""
    if "lora_B" in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5


def fold(model: Transformer) -> None:
    """Makes the model plain again, with all that was put on it in its weights."""
    for table in (model.embed, model.head):
        if parametrize.is_parametrized(table):
            parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
    for block in model.blocks:
        for part in list(block.modules()):
            for name, layer in list(part.named_children()):
                if hasattr(layer, "base_layer"):
                    adapted: Any = layer
                    adapted.merge()
                    setattr(part, name, adapted.get_base_layer())
