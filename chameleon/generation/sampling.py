"""Choosing the next id: pure functions on logits, one row of settings for each row of logits.

A row's randomness is one uniform number a step from a stream of its own, turned into an id by the inverse of the
cumulative distribution in the order of ids. So what a seed draws does not depend on what else is in the batch, nor on
whether the head was cut to the ids that may come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chameleon.errors import BadInput

STREAM_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn. The defaults are the released ones (RECIPE 2.4)."""

    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    """Keep the likeliest ids whose probabilities sum to at least this; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest ids; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of ids seen before by this (CTRL, arXiv 1909.05858)."""

    def __post_init__(self) -> None:
        for name, good, what in (
            ("temperature", self.temperature >= 0, "must be 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be positive"),
        ):
            if not good:
                raise BadInput(f"{getattr(self, name)} {what}", where=name)


GREEDY = Sampling(temperature=0.0, top_p=1.0)


class RandomStream:
    """Uniform numbers in [0, 1): number n of a seed is always the same."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise BadInput(f"{seed} is out of range", where="seed", remedy="use 0 … 2⁶³ − 1")
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers: list[float] = []

    def __getitem__(self, number: int) -> float:
        while number >= len(self.numbers):
            self.numbers += torch.rand(STREAM_BLOCK, generator=self.generator, dtype=torch.float64).tolist()
        return self.numbers[number]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """logits [B, V]; seen bool [B, V]: ids met before; penalty [B, 1]."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """logits [B, V] with all but the top_k [B, 1] (0: all) likeliest ids at −inf; ties at the edge stay."""
    if not bool((top_k > 0).any()):
        return logits
    size = logits.shape[-1]
    ordered = logits.sort(dim=-1, descending=True).values
    edge = ordered.gather(1, (torch.where(top_k > 0, top_k, size).clamp(max=size) - 1))
    return logits.masked_fill(logits < edge, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """logits [B, V] with ids at −inf that the nucleus of mass top_p [B, 1] leaves out; the likeliest always stays."""
    if not bool((top_p < 1).any()):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = ordered.softmax(-1)
    outside = (shares.cumsum(-1) - shares >= top_p) & (top_p < 1)
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The id at which the cumulative distribution of logits [B, V] passes uniform [B]: int64 [B]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = uniform.double().to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def sample(logits: Tensor, settings: Sequence[Sampling], uniform: Sequence[float], seen: Tensor | None = None) -> Tensor:
    """Next ids int64 [B] from logits [B, V]; ids that may not come are −inf.

    settings, uniform: one for each row. seen: bool [B, V] for the repetition penalty, or None.
    """
    logits = logits.float()
    column = {"device": logits.device, "dtype": torch.float32}
    if seen is not None and any(setting.repetition_penalty != 1 for setting in settings):
        penalty = torch.tensor([[setting.repetition_penalty] for setting in settings], **column)  # type: ignore[arg-type]
        logits = penalize_repetition(logits, seen, penalty)
    best = logits.argmax(-1)
    if all(setting.temperature == 0 for setting in settings):
        return best
    temperature = torch.tensor([[setting.temperature or 1.0] for setting in settings], **column)  # type: ignore[arg-type]
    scaled = logits / temperature
    scaled = keep_top_k(scaled, torch.tensor([[setting.top_k] for setting in settings], device=logits.device))
    scaled = keep_top_p(scaled, torch.tensor([[setting.top_p] for setting in settings], **column))  # type: ignore[arg-type]
    drawn = draw(scaled, torch.tensor(uniform, dtype=torch.float64))
    greedy = torch.tensor([setting.temperature == 0 for setting in settings], device=logits.device)
    return torch.where(greedy, best, drawn)
