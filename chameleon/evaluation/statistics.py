"""Figures with 95% intervals by the bootstrap, and paired tests of two models on the same samples.

Every metric of samples is a function of sums over samples: a mean is Σ values / Σ 1, bits per byte are Σ bits / Σ bytes,
corpus BLEU is computed from Σ matches and Σ lengths. So each sample contributes a few numbers, its terms, and resampling is
a product of matrices. Samples that belong together, such as questions about one picture, form a group and are resampled
together (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Term = float | Sequence[float]
"""What a sample contributes to a metric: the value of a mean, or the terms of a statistic."""
NUM_RESAMPLES = 2000
NUM_PERMUTATIONS = 9999
CHUNK = 4_000_000
"""Weights that are in memory at a time."""
NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
BLEU_ORDERS = 4
TINY, SMALL = 1e-15, 1e-9
"""Smoothing of BLEU in coco-caption's scorer, which keeps empty counts from being divided."""


def ratio(sums: Array) -> Array:
    """sums [..., 2] → the first by the second; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def bleu(order: int) -> Callable[[Array], Array]:
    """Return corpus BLEU of n-grams up to `order` as a function of sums [..., 10]: matches, candidates, two lengths."""

    def score(sums: Array) -> Array:
        matches, candidates = sums[..., :order], sums[..., BLEU_ORDERS : BLEU_ORDERS + order]
        length, reference_length = sums[..., 2 * BLEU_ORDERS], sums[..., 2 * BLEU_ORDERS + 1]
        precision = np.prod((matches + TINY) / (candidates + SMALL), axis=-1) ** (1 / order)
        shortness = (length + TINY) / (reference_length + SMALL)
        return precision * np.exp(np.minimum(0, 1 - 1 / shortness))

    return score


STATISTICS: dict[str, Callable[[Array], Array]] = {
    "mean": ratio,
    "perplexity": lambda sums: np.exp(ratio(sums)),
    **{f"bleu-{order}": bleu(order) for order in range(1, BLEU_ORDERS + 1)},
}


@dataclass(frozen=True)
class Metric:
    """How a figure is computed from its samples' terms, and how it is read."""

    statistic: str = "mean"
    base_rate: float | None = None
    """What guessing without looking reaches."""
    higher_is_better: bool = True
    is_share: bool = True
    """Whether samples are right or wrong, in whole or in part: then a mean of 0 or 1 has Wilson's interval."""


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    """Samples that it is of."""
    base_rate: float | None = None
    higher_is_better: bool = True

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Figure:
        return cls(**value)

    def text(self) -> str:
        """Return "0.446 (0.387 to 0.506)"."""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` independent trials (Wilson, 1927)."""
    z2 = NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_QUANTILE * sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def as_terms(values: Sequence[Term]) -> Array:
    """Return the terms [N, K] of samples; of a plain value v they are (v, 1)."""
    return np.array([(value, 1.0) if isinstance(value, (int, float)) else value for value in values], dtype=np.float64)


def sums_by_group(terms: Array, groups: Sequence[str] | None) -> Array:
    """Return the sums of terms [N, K] over each group [G, K], groups in order of appearance."""
    if groups is None:
        return terms
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(index), terms.shape[1]))
    np.add.at(sums, [index[group] for group in groups], terms)
    return sums


def value_of(metric: Metric, values: Sequence[Term]) -> float:
    """Return the figure of samples with these terms."""
    return float(STATISTICS[metric.statistic](as_terms(values).sum(0)))


def figure_of(metric: Metric, values: Sequence[Term], groups: Sequence[str] | None = None, seed: int = 0) -> Figure:
    """Return the figure of samples with these terms, and its percentile interval over resampled groups.

    Where all samples are 0 or all are 1, resampling shows no spread; the interval is then Wilson's. A single group gives
    none.
    """
    terms, statistic = as_terms(values), STATISTICS[metric.statistic]
    sums = sums_by_group(terms, groups)
    value = float(statistic(sums.sum(0)))
    low: float | None
    high: float | None
    if (
        metric.is_share
        and metric.statistic == "mean"
        and value in (0.0, 1.0)
        and (terms[:, 0] == value * terms[:, 1]).all()
    ):
        low, high = interval(value, len(sums))
    elif len(sums) < 2:
        low = high = None
    else:
        low, high = percentiles(statistic(resample(sums, seed)))
    return Figure(value, low, high, len(terms), metric.base_rate, metric.higher_is_better)


def percentiles(values: Array) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentiles, NaN left out."""
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def resample(sums: Array, seed: int) -> Array:
    """Return the sums [resamples, K] of groups [G, K] drawn with replacement."""
    rng, count = np.random.default_rng(seed), len(sums)
    size = max(1, CHUNK // count)
    chunks = [min(size, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, size)]
    return np.concatenate([rng.multinomial(count, np.full(count, 1 / count), size=chunk) @ sums for chunk in chunks])


# --- two models on the same samples ---


@dataclass(frozen=True)
class Difference:
    """By how much a figure of one model differs from that of another."""

    value: float
    low: float | None
    """None where all samples are of one group."""
    high: float | None
    p_value: float
    """Of no difference: of a two-sided paired permutation test."""
    count: int


def paired_difference(
    metric: Metric, first: Sequence[Term], second: Sequence[Term], groups: Sequence[str] | None = None, seed: int = 0
) -> Difference:
    """Compare two models by their terms of the same samples, in the same order.

    The interval is that of differences over resampled groups. The p-value is the share of random exchanges of the two
    models' outputs, group by group, with a difference at least as large (Good, Permutation Tests, 2000).
    """
    statistic = STATISTICS[metric.statistic]
    a, b = (sums_by_group(as_terms(values), groups) for values in (first, second))
    difference = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    resampled = resample(np.concatenate((a, b), axis=1), seed)
    width = a.shape[1]
    low: float | None
    high: float | None
    low, high = percentiles(statistic(resampled[:, :width]) - statistic(resampled[:, width:]))
    if len(a) < 2:
        low = high = None
    rng, size, extreme = np.random.default_rng(seed + 1), max(1, CHUNK // len(a)), 0
    total = (a + b).sum(0)
    for start in range(0, NUM_PERMUTATIONS, size):
        is_swapped = rng.integers(0, 2, (min(size, NUM_PERMUTATIONS - start), len(a)))
        exchanged = a.sum(0) + is_swapped @ (b - a)
        differences = statistic(exchanged) - statistic(total - exchanged)
        extreme += int((np.abs(differences) >= abs(difference) - 1e-12).sum())
    p_value = (1 + extreme) / (1 + NUM_PERMUTATIONS)
    return Difference(difference, low, high, p_value, len(first))
