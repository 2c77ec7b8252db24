"""Classifier-free guidance (arXiv 2207.12598): sharpening what the prompt asks for by what would come without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def combine(logits: Tensor, weights: Tensor) -> Tensor:
    """logits [P, R, V] of P places, those of the full prompt first among R, and weights [P, R] to guided logits [P, V]."""
    return (logits * weights.to(logits.dtype).unsqueeze(-1)).sum(dim=1)
