"""Several prompts at once: classifier-free guidance, and texts from the mean of several views of a picture.

Guidance (arXiv 2207.12598) amplifies what the prompt adds over an unconditional prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

GuidedTokens = Literal["codes", "texts"]
"""Tokens that are sampled from combined logits: image codes, or those of texts."""


@dataclass(frozen=True)
class Guidance:
    """Additional prompts ("branches") whose logits are combined with those of the full prompt.

    Combined = Σ weight · logits over the full prompt and the branches. `two_way`, `three_way` and `mean_with` give the
    usual forms.
    """

    branches: tuple[tuple[int, ...], ...]
    """Token ids of the prompt of each branch."""
    weights: tuple[float, ...]
    """Weight of the full prompt, then of each branch; they sum to 1."""
    applies_to: GuidedTokens = "codes"
    restarts: bool = False
    """Whether each branch begins anew with every image, at position 0: it then has seen nothing but that image."""

    def with_started_image(self, token_ids: Sequence[int]) -> Guidance:
        """Return the same guidance where the prompt ends in an image that has begun with these token ids."""
        started = tuple(tuple(token_ids) if self.restarts else (*branch, *token_ids) for branch in self.branches)
        return replace(self, branches=started)


def two_way(unconditional: Sequence[int], guidance_scale: float) -> Guidance:
    """uncond + guidance_scale · (full − uncond)."""
    return Guidance((tuple(unconditional),), (guidance_scale, 1 - guidance_scale))


def image_only(boi: int, guidance_scale: float) -> Guidance:
    """uncond + guidance_scale · (full − uncond), where uncond has seen the current image alone (Lumina-mGPT)."""
    return Guidance(((boi,),), (guidance_scale, 1 - guidance_scale), restarts=True)


def three_way(images_only: Sequence[int], unconditional: Sequence[int], image_scale: float, full_scale: float) -> Guidance:
    """uncond + image_scale · (image − uncond) + full_scale · (full − image), as in Meta's released inference code."""
    weights = (full_scale, image_scale - full_scale, 1 - image_scale)
    return Guidance((tuple(images_only), tuple(unconditional)), weights)


def mean_with(others: Sequence[Sequence[int]]) -> Guidance:
    """(full + Σ others) / n: texts after one picture in several views (test-time augmentation)."""
    share = 1 / (1 + len(others))
    return Guidance(tuple(map(tuple, others)), (share,) * (1 + len(others)), applies_to="texts")


def combine_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Combine logits [P, R, V] of R branches, the full prompt first, with weights [P, R] to guided logits [P, V]."""
    return (logits * weights.to(logits.dtype).unsqueeze(-1)).sum(dim=1)
