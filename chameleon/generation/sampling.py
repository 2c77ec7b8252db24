"""Choosing the next id: pure functions on logits, one row of settings for each row of logits.

An id is drawn by a race (Gumbel's maximum in another form): id i finishes after an exponentially distributed time at the
rate of its probability, and the first wins. The times are a pure function of (seed, number of the id in its row, id),
so what a seed draws depends neither on what else is in the batch, nor on whether the head was cut to the ids that may
come, nor on the device. And two distributions that differ little draw the same id in most cases, which is what decoding
several ids at once lives on (arXiv 2408.07978, 2510.24211).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from chameleon.errors import BadInput

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants (Steele, Lea and Flood, OOPSLA 2014)."""


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
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be positive"),
        ):
            if not good:
                raise BadInput(f"{getattr(self, name)} {what}", where=name)


GREEDY = Sampling(temperature=0.0, top_p=1.0)


class Settings:
    """The settings of all rows as columns [B, 1], and which of the steps any row wants."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        self.draws = any(row.temperature > 0 for row in rows)
        self.penalizes = any(row.repetition_penalty != 1 for row in rows)
        self.cuts_k = any(row.top_k for row in rows)
        self.cuts_p = any(row.top_p < 1 for row in rows)
        self.greedy = torch.tensor([row.temperature == 0 for row in rows], device=device)
        self.temperature = column([row.temperature or 1.0 for row in rows])
        self.top_p = column([row.top_p for row in rows])
        self.top_k = torch.tensor([[row.top_k] for row in rows], device=device)
        self.penalty = column([row.repetition_penalty for row in rows])

    @staticmethod
    @lru_cache(maxsize=256)
    def of(rows: tuple[Sampling, ...], device: torch.device) -> Settings:
        return Settings(rows, device)


# --- random numbers --------------------------------------------------------------------------------------------------


def signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


def shifted(bits: Tensor, count: int) -> Tensor:
    """int64 shifted to the right as unsigned numbers are."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64, in place: every bit of the input moves half of the output's."""
    bits.bitwise_xor_(shifted(bits, 30)).mul_(signed(MIX_1))
    bits.bitwise_xor_(shifted(bits, 27)).mul_(signed(MIX_2))
    return bits.bitwise_xor_(shifted(bits, 31))


def times(seeds: Tensor, numbers: Tensor, ids: Tensor) -> Tensor:
    """Exponentially distributed times, float64 [B, V]: of each id's race in row b at its `numbers[b]`-th id.

    seeds, numbers: int64 [B]; ids: int64 [V].
    """
    starts = mixed(mixed(seeds + signed(GAMMA)) + (numbers + 1) * signed(GAMMA))
    bits = mixed(starts.unsqueeze(1) + (ids + 1) * signed(GAMMA))
    return shifted(bits, 11).double().add_(0.5).mul_(2.0**-53).log_().neg_()


# --- steps on logits -------------------------------------------------------------------------------------------------


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """logits [B, V]; seen bool [B, V]: ids met before; penalty [B, 1]."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def falling(logits: Tensor) -> Tensor:
    """Each row's values, largest first. NumPy sorts by vector instructions, far faster than torch on CPUs."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def cut(logits: Tensor, settings: Settings) -> Tensor:
    """logits [B, V] with ids at −inf that top-k, and then top-p, leave out; ties at the edge stay.

    top-p keeps the likeliest ids whose probabilities sum to at least top_p (nucleus sampling, arXiv 1904.09751).
    """
    size = logits.shape[-1]
    ordered = falling(logits)
    kept = torch.full((len(logits), 1), size, device=logits.device)
    if settings.cuts_k:
        kept = torch.where(settings.top_k > 0, settings.top_k, kept).clamp(max=size)
        ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= kept, -torch.inf)
    if settings.cuts_p:
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0
        inside = ((before < settings.top_p) | (settings.top_p >= 1)).sum(-1, keepdim=True)
        kept = torch.minimum(kept, inside.clamp(min=1))
    edge = ordered.gather(1, kept - 1)
    return logits.masked_fill(logits < edge, -torch.inf)


def draw(logits: Tensor, finish: Tensor) -> Tensor:
    """The winner of each row's race, int64 [B]: logits [B, V] (−inf: takes no part), `times` float64 [B, V]."""
    return (logits.double().softmax(-1) / finish).argmax(-1)


def sample(
    logits: Tensor,
    settings: Settings,
    seeds: Tensor,
    numbers: Tensor,
    ids: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """Columns int64 [B] of the ids that come next, from logits [B, V]; ids that may not come are −inf.

    seeds, numbers int64 [B] and ids int64 [V], the id of each column: what the row's randomness is made of.
    seen: bool [B, V] for the repetition penalty, or None.
    """
    if seen is not None and settings.penalizes:
        logits = penalize_repetition(logits, seen, settings.penalty)
    if not settings.draws:
        return logits.argmax(-1)
    scaled = logits / settings.temperature
    if settings.cuts_k or settings.cuts_p:
        scaled = cut(scaled, settings)
    return torch.where(settings.greedy, logits.argmax(-1), draw(scaled, times(seeds, numbers, ids)))
