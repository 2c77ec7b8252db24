"""Sampling the next token: pure functions on logits, with separate parameters for each row of a batch.

A token is sampled by the Gumbel-max trick in its exponential form: token i gets exponential noise divided by its
probability, and the smallest wins. The noise is a pure function of (seed, index of the token in its request, token id), so
a seed generates the same output whatever else is in the batch, whether or not the head is sliced, and on every device.
Two similar distributions also sample the same token in most cases, which is what speculative decoding of several tokens at
once relies on (arXiv 2408.07978, 2510.24211).
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
"""Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""


MIN_TEMPERATURE = 1e-4
"""Logits divided by less overflow in float32."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults are those of Meta's released inference code."""

    temperature: float = 0.7
    """0 is greedy decoding."""
    top_p: float = 0.9
    """Keep the most likely tokens whose probabilities sum to at least this; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of earlier tokens by this (CTRL, arXiv 1909.05858)."""

    def __post_init__(self) -> None:
        is_greedy = self.temperature == 0
        for name, valid, expected in (
            ("temperature", is_greedy or MIN_TEMPERATURE <= self.temperature < float("inf"), "must be 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "must lie in [0.01, 100]"),
        ):
            if not valid:
                raise BadInput(f"{getattr(self, name)} {expected}", where=name)


GREEDY = Sampling(temperature=0.0, top_p=1.0)
TEXT_SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
IMAGE_SAMPLING = Sampling(temperature=0.5, top_p=0.8)


class BatchSampling:
    """The sampling parameters of all rows of a batch as tensors [B, 1], and which operations any row needs."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        self.any_random = any(row.temperature > 0 for row in rows)
        self.any_penalty = any(row.repetition_penalty != 1 for row in rows)
        self.any_top_k = any(row.top_k for row in rows)
        self.any_top_p = any(row.top_p < 1 for row in rows)
        self.greedy = torch.tensor([row.temperature == 0 for row in rows], device=device)
        self.temperature = column([row.temperature or 1.0 for row in rows])
        self.top_p = column([row.top_p for row in rows])
        self.top_k = torch.tensor([[row.top_k] for row in rows], device=device)
        self.penalty = column([row.repetition_penalty for row in rows])

    @staticmethod
    @lru_cache(maxsize=256)
    def cached(rows: tuple[Sampling, ...], device: torch.device) -> BatchSampling:
        """Return the tensors of these rows; batches of the same rows share them."""
        return BatchSampling(rows, device)


# --- counter-based random numbers ------------------------------------------------------------------------------------


def to_int64(value: int) -> int:
    """Return the signed integer with the same 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def logical_shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift int64 to the right as if unsigned."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def mix_bits(bits: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to int64, in place: every bit of the input changes half of the output's bits."""
    bits.bitwise_xor_(logical_shift_right(bits, 30)).mul_(to_int64(MIX_1))
    bits.bitwise_xor_(logical_shift_right(bits, 27)).mul_(to_int64(MIX_2))
    return bits.bitwise_xor_(logical_shift_right(bits, 31))


def exponential_noise(seeds: Tensor, token_indices: Tensor, token_ids: Tensor) -> Tensor:
    """Return exponentially distributed noise, float32 [B, V], a function of seed, token index and token id alone.

    seeds, token_indices: int64 [B]; token_ids: int64 [V]. The smallest values, which decide what is sampled, are as precise
    as the others, since 63 random bits are rounded to float32 before the logarithm of 1 minus them is taken.
    """
    rows = mix_bits(mix_bits(seeds + to_int64(GAMMA)) + (token_indices + 1) * to_int64(GAMMA))
    bits = mix_bits(rows.unsqueeze(1) + (token_ids + 1) * to_int64(GAMMA))
    minus_uniform = logical_shift_right(bits, 1).float().add_(0.5).mul_(-(2.0**-63))
    return minus_uniform.clamp_(min=2.0**-24 - 1).log1p_().neg_()  # rounded to -1, it would give infinite noise


# --- operations on logits --------------------------------------------------------------------------------------------


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply the repetition penalty [B, 1] to logits [B, V] where seen, bool [B, V], is True."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def sort_descending(logits: Tensor) -> Tensor:
    """Sort each row, largest first. On CPUs NumPy sorts with vector instructions, much faster than torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def top_k_top_p_filter(logits: Tensor, params: BatchSampling) -> Tensor:
    """Set logits [B, V] outside top-k, and then outside top-p, to −inf; ties with the last token kept stay.

    top-p keeps the most likely tokens whose probabilities sum to at least top_p (nucleus sampling, arXiv 1904.09751).
    """
    vocab_size = logits.shape[-1]
    ordered = sort_descending(logits)
    num_kept = torch.full((len(logits), 1), vocab_size, device=logits.device)
    if params.any_top_k:
        num_kept = torch.where(params.top_k > 0, params.top_k, num_kept).clamp(max=vocab_size)
        ordered = ordered.masked_fill(torch.arange(vocab_size, device=logits.device) >= num_kept, -torch.inf)
    if params.any_top_p:
        mass_before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        mass_before[:, 0] = 0
        in_nucleus = ((mass_before < params.top_p) | (params.top_p >= 1)).sum(-1, keepdim=True)
        num_kept = torch.minimum(num_kept, in_nucleus.clamp(min=1))
    threshold = ordered.gather(1, num_kept - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def gumbel_max_sample(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample from softmax(logits) [B, V] with `exponential_noise` float32 [B, V]: column indices int64 [B]."""
    return (logits.softmax(-1) / noise).argmax(-1)


def sample(
    logits: Tensor,
    params: BatchSampling,
    seeds: Tensor,
    token_indices: Tensor,
    token_ids: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """Return the columns int64 [B] of the next tokens, from logits [B, V] in which forbidden tokens are −inf.

    seeds, token_indices int64 [B] and token_ids int64 [V], the id of each column: what the noise depends on.
    seen: bool [B, V] for the repetition penalty, or None.
    """
    if seen is not None and params.any_penalty:
        logits = penalize_repetition(logits, seen, params.penalty)
    if not params.any_random:
        return logits.argmax(-1)
    scaled = logits / params.temperature
    if params.any_top_k or params.any_top_p:
        scaled = top_k_top_p_filter(scaled, params)
    sampled = gumbel_max_sample(scaled, exponential_noise(seeds, token_indices, token_ids))
    return torch.where(params.greedy, logits.argmax(-1), sampled)
