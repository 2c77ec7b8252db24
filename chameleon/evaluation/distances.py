"""Distances between sets of images by their features [N, D]: Fréchet, kernel; precision, recall, density, coverage.

The extractor names the figure: with Inception-v3's published weights the Fréchet distance is FID and the kernel distance
KID; with other networks they are not, and their values cannot be compared with published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chameleon.evaluation.statistics import Figure, percentiles

NUM_RESAMPLES = 20
"""Of the interval of a Fréchet distance, each as dear as the distance."""
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
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


def frechet_figure(first: Tensor, second: Tensor, seed: int = 0) -> Figure:
    """Return the distance with the basic bootstrap interval: resampling adds about the bias that the estimate has."""
    value = frechet_distance(first, second)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(NUM_RESAMPLES):
        chosen = [x[torch.randint(len(x), (len(x),), generator=generator)] for x in (first, second)]
        values.append(frechet_distance(*chosen))
    low, high = percentiles(np.array(values))
    return Figure(value, max(0.0, 2 * value - high), max(0.0, 2 * value - low), len(second), higher_is_better=False)


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
    """Return the mean over random subsets, as KID is reported; the interval is 1.96 standard deviations of subsets."""
    size = min(KERNEL_SUBSET_SIZE, len(first), len(second))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(KERNEL_SUBSETS):
        chosen = [x[torch.randperm(len(x), generator=generator)[:size]] for x in (first, second)]
        values.append(kernel_distance(*chosen))
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values))
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
