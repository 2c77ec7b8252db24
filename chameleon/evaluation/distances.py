"""Distances between sets of images by their features [N, D]: Fréchet, kernel; precision, recall, density, coverage.

The extractor names the figure: with Inception-v3's published weights the Fréchet distance is FID and the kernel distance
KID; with other networks they are not, and their values cannot be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chameleon.evaluation.statistics import Figure

NUM_BLOCKS = 20
"""Of which one at a time is left out for an interval; each costs as much as the distance."""
KERNEL_SUBSET_SIZE, MIN_SUBSETS = 1000, 5
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""k of Kynkäänniemi et al. and of Naeem et al."""
ROWS = 2048
"""Rows of a matrix of distances that exist at a time."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of Gaussians with the features' means and covariances (Heusel et al., arXiv 1706.08500).

    ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½. With Σ = AᵀA of centred features A / √(N − 1), the last trace is the sum of
    the singular values of A₁A₂ᵀ; float64.
    """
    a, b = (features.double() for features in (first, second))
    difference = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    spread = a.square().sum() + b.square().sum()
    a, b = (reduce_rows(x) for x in (a, b))
    return float(difference + spread - 2 * torch.linalg.svdvals(a @ b.t()).sum())


def reduce_rows(x: Tensor) -> Tensor:
    """Return at most D rows with the same xᵀx [D, D]."""
    return torch.linalg.qr(x, mode="r")[1] if len(x) > x.shape[1] else x


def frechet_figure(first: Tensor, second: Tensor, *, paired: bool = False) -> Figure:
    """Return the distance with its interval. paired: row i of both is one image, as before and after a tokenizer."""
    return jackknife(frechet_distance, first, second, paired=paired)


def jackknife(distance: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor, *, paired: bool) -> Figure:
    """Return a distance ± 1.96 standard errors by leaving out one of up to 20 blocks of each set, or of pairs.

    A bootstrap is of no use here: images drawn twice raise the distance itself (Efron and Tibshirani, chapter 11).
    """
    value = distance(first, second)
    sides = [(0, 1)] if paired else [(0,), (1,)]
    variance = 0.0
    for side in sides:
        sets = (first, second)
        size = len(sets[side[0]])
        blocks = [torch.arange(start, size, NUM_BLOCKS) for start in range(min(NUM_BLOCKS, size))]
        values = []
        for block in blocks:
            keep = torch.ones(size, dtype=torch.bool)
            keep[block] = False
            left = [x[keep] if index in side else x for index, x in enumerate(sets)]
            values.append(distance(left[0], left[1]))
        variance += (len(blocks) - 1) / len(blocks) * float(np.square(np.array(values) - np.mean(values)).sum())
    half = 1.96 * variance**0.5
    return Figure(value, value - half, value + half, len(second), higher_is_better=False)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (arXiv 1801.01401)."""
    a, b = first.double(), second.double()
    m, n = len(a), len(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.t() / x.shape[1] + 1) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - aa.trace()) / (m * (m - 1)) + (bb.sum() - bb.trace()) / (n * (n - 1))
    return float(within - 2 * ab.mean())


def kernel_figure(first: Tensor, second: Tensor, seed: int = 0) -> Figure:
    """Return the mean of disjoint random subsets of 1,000, as KID is of subsets, ± 1.96 standard errors of that mean.

    Of smaller sets it is the distance of the whole, with the interval of `jackknife`.
    """
    count = min(len(first), len(second)) // KERNEL_SUBSET_SIZE
    if count < MIN_SUBSETS:
        return jackknife(kernel_distance, first, second, paired=False)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator)[: count * KERNEL_SUBSET_SIZE] for x in (first, second)]
    subsets = zip(*(order.split(KERNEL_SUBSET_SIZE) for order in orders), strict=True)
    values = np.array([kernel_distance(first[a], second[b]) for a, b in subsets])
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / count**0.5
    return Figure(mean, mean - half, mean + half, len(second), higher_is_better=False)


@dataclass(frozen=True)
class Manifolds:
    """Precision and recall (arXiv 1904.06991, k = 3), density and coverage (arXiv 2002.09797, k = 5)."""

    precision: Tensor
    """bool [generated]: within the k-th neighbour's radius of a real image."""
    recall: Tensor
    """bool [real]: within such a radius of a generated image."""
    density: Tensor
    """[generated]: real images within whose radius it lies, by k."""
    coverage: Tensor
    """bool [real]: a generated image lies within its radius."""


def manifolds(real: Tensor, generated: Tensor) -> Manifolds:
    """Return what the figures are means of, for each image."""
    real, generated = real.double(), generated.double()
    radii = neighbour_radii(real, PRECISION_NEIGHBOURS)
    generated_radii = neighbour_radii(generated, PRECISION_NEIGHBOURS)
    wide_radii = neighbour_radii(real, DENSITY_NEIGHBOURS)
    precision, density, recall, coverage = [], [], [], []
    for rows in generated.split(ROWS):
        distances = torch.cdist(rows, real)
        precision.append((distances <= radii).any(1))
        density.append((distances <= wide_radii).sum(1) / DENSITY_NEIGHBOURS)
    for rows, rows_radii in zip(real.split(ROWS), wide_radii.split(ROWS), strict=True):
        distances = torch.cdist(rows, generated)
        recall.append((distances <= generated_radii).any(1))
        coverage.append(distances.min(1).values <= rows_radii)
    return Manifolds(*(torch.cat(parts) for parts in (precision, recall, density, coverage)))


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Return the distance [N] of each row to its k-th nearest other row."""
    k = min(k, len(features) - 1)
    radii = [torch.cdist(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(ROWS)]
    return torch.cat(radii)
