"""Classifier-free guidance (arXiv 2207.12598): sharpening what the prompt asks for by what would come without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Prompts beside the full one, and how the logits of all are combined.

    Combined = Σ weight · logits, over the full prompt and the branches. `two_way` and `three_way` give the usual forms.
    """

    branches: tuple[tuple[int, ...], ...]
    """Prompts of the branches, as ids."""
    weights: tuple[float, ...]
    """Weight of the full prompt, then of each branch; they sum to 1."""


def two_way(unconditional: Sequence[int], scale: float) -> Guidance:
    """uncond + scale · (full − uncond)."""
    return Guidance((tuple(unconditional),), (scale, 1 - scale))


def three_way(images_only: Sequence[int], nothing: Sequence[int], image_scale: float, full_scale: float) -> Guidance:
    """uncond + image_scale · (image − uncond) + full_scale · (full − image), the released form (RECIPE 2.4)."""
    weights = (full_scale, image_scale - full_scale, 1 - image_scale)
    return Guidance((tuple(images_only), tuple(nothing)), weights)


def combine(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """logits [branches, V] of one row, the full prompt first, to guided logits [V]."""
    return torch.tensor(weights, dtype=torch.float32, device=logits.device) @ logits.float()
