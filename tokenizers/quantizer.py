"""Vector quantisation, and three ways to train the codebook.

`VectorQuantizer` is what a trained tokenizer needs: nearest code by squared distance, and lookup. Its only tensor is
`embedding.weight` [codebook_size, width], as in Meta's release. For training it is replaced by one of

* `PlainCodebook`: codes are trained by gradient (van den Oord et al., arXiv 1711.00937), as in the release;
* `MovingAverageCodebook`: codes are moving averages of the latents assigned to them (the same paper, appendix A.1);
* `LinearCodebook`: frozen random codes times one learned matrix (SimVQ, arXiv 2411.02038), so that every step moves every
  code and none dies.

Each returns its codes as one matrix, so that a trained tokenizer is always saved in the released format.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

MAX_DISTANCES = 2**27
"""Distances between latents and codes that exist at one time."""
CodebookKind = Literal["plain", "moving_average", "linear"]
MIN_USES = 1e-6
"""A code with a smaller moving average of its uses stays where it is; far smaller ones have too few digits to divide by."""


class Quantized(NamedTuple):
    """The result of quantising a latent."""

    latent: Tensor
    """[B, width, h, w]: the nearest codes, with a straight-through gradient to the encoder."""
    codes: Tensor
    """[B, h, w] int64."""
    codebook_loss: Tensor
    """Scalar: mean squared distance that pulls codes towards latents (without gradient where codes are averages)."""
    commitment_loss: Tensor
    """Scalar: mean squared distance that pulls latents towards codes."""


def nearest(latent: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest row of `codebook` [K, width] for each row of `latent` [N, width]: int64 [N].

    Computed in float32.
    """
    latent, codebook = latent.float(), codebook.float()
    squared_norms = codebook.square().sum(1)  # |latent|² is the same for all codes
    chunk_size = max(1, MAX_DISTANCES // len(codebook))
    return torch.cat([(squared_norms - 2 * chunk @ codebook.t()).argmin(1) for chunk in latent.split(chunk_size)])


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place. A collective operation."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average `values` over all processes. A collective operation."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return all_reduce_sum(values) / world


def broadcast_from_first(values: Tensor) -> Tensor:
    """Return the first process's `values` on every process. A collective operation."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(values, src=0)
    return values


class VectorQuantizer(nn.Module):
    """A fixed codebook of `size` codes of dimension `width`."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def codebook(self) -> Tensor:
        """Return the codes [size, width] as they are saved."""
        return self.embedding.weight

    def lookup(self, codes: Tensor) -> Tensor:
        """Return latents [B, width, h, w] of codes [B, h, w]."""
        return rearrange(F.embedding(codes, self.codebook()), "b h w c -> b c h w")

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise a latent [B, width, h, w] to its nearest codes, always in float32."""
        with torch.autocast(latent.device.type, enabled=False):
            return self.quantize(latent)

    def quantize(self, latent: Tensor) -> Quantized:
        latent = latent.float()
        batch, _, height, _ = latent.shape
        flat = rearrange(latent, "b c h w -> (b h w) c")
        codebook = self.codebook()
        codes = nearest(flat.detach(), codebook.detach())
        nearest_codes = F.embedding(codes, codebook)
        codebook_loss = F.mse_loss(nearest_codes, flat.detach())
        commitment_loss = F.mse_loss(flat, nearest_codes.detach())
        if self.training and not all_reduce_sum((~flat.isfinite()).sum()):  # one bad batch would spoil the averages
            self.update(flat.detach(), codes)
        straight_through = flat + (nearest_codes - flat).detach()
        return Quantized(
            rearrange(straight_through, "(b h w) c -> b c h w", b=batch, h=height),
            rearrange(codes, "(b h w) -> b h w", b=batch, h=height),
            codebook_loss,
            commitment_loss,
        )

    def update(self, latent: Tensor, codes: Tensor) -> None:
        """Update statistics with latents [N, width] and their codes [N]; called in training."""


class PlainCodebook(VectorQuantizer):
    """Codes trained by gradient; dead codes are reset to latents of the batch.

    `revive_below`: a code is dead when the moving average of its uses is below this share of all codes' mean; 0 never
    revives. `decay`: that of the moving averages after many steps. The first steps have (1 + n) / (10 + n), so that what
    the untrained encoder used is soon forgotten.
    """

    uses: Tensor
    """float32 [size]: moving average of the uses per step."""
    num_updates: Tensor
    """int64 scalar."""

    def __init__(self, size: int, width: int, *, decay: float = 0.99, revive_below: float = 0.1) -> None:
        super().__init__(size, width)
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("uses", torch.ones(size), persistent=True)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64), persistent=True)
        self.num_revived = 0
        """Dead codes that were reset in the last step."""

    @torch.no_grad()
    def update(self, latent: Tensor, codes: Tensor) -> None:
        self.num_updates += 1
        step = int(self.num_updates)
        decay = min(self.decay, (1 + step) / (10 + step))
        counts = all_reduce_sum(torch.bincount(codes, minlength=len(self.uses)).to(self.uses.dtype))
        mean_uses = counts.mean()
        self.uses.lerp_(counts, 1 - decay)
        is_dead = self.uses < self.revive_below * mean_uses
        self.update_codes(latent, codes, decay, ~is_dead)
        dead = is_dead.nonzero().flatten()
        self.num_revived = len(dead)
        if len(dead):
            chosen = torch.randint(len(latent), (len(dead),), device=latent.device)
            self.set_codes(dead, broadcast_from_first(latent[chosen]), mean_uses)

    def update_codes(self, latent: Tensor, codes: Tensor, decay: float, is_alive: Tensor) -> None:
        """Update the codes that are alive, bool [size], from latents [N, width] and their codes [N]."""

    @torch.no_grad()
    def set_codes(self, indices: Tensor, values: Tensor, uses: Tensor | float = 1.0) -> None:
        """Set the codes at `indices` [n] to `values` [n, width], as if each were used `uses` times a step."""
        self.embedding.weight[indices] = values
        self.uses[indices] = uses

    @torch.no_grad()
    def init_from_latents(self, latent: Tensor, iterations: int = 10) -> None:
        """Set all codes to k-means centres of latents [N, width], N ≥ size; with 0 `iterations`, to random latents."""
        size = len(self.uses)
        centres = latent[torch.randperm(len(latent), device=latent.device)[:size]].clone()
        for _ in range(iterations):
            codes = nearest(latent, centres)
            counts = torch.bincount(codes, minlength=size).unsqueeze(1)
            sums = torch.zeros_like(centres).index_add_(0, codes, latent)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        self.set_codes(torch.arange(size, device=latent.device), centres)


class MovingAverageCodebook(PlainCodebook):
    """Codes that are moving averages of the latents assigned to them."""

    sums: Tensor
    """float32 [size, width]: moving average of the sums, per step, of the latents assigned to each code."""

    def __init__(self, size: int, width: int, *, decay: float = 0.99, revive_below: float = 0.1) -> None:
        super().__init__(size, width, decay=decay, revive_below=revive_below)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("sums", self.embedding.weight.detach().clone(), persistent=True)

    def update_codes(self, latent: Tensor, codes: Tensor, decay: float, is_alive: Tensor) -> None:
        self.sums.lerp_(all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, codes, latent)), 1 - decay)
        moving = is_alive & (self.uses > MIN_USES)
        self.embedding.weight[moving] = self.sums[moving] / self.uses[moving].unsqueeze(1)

    @torch.no_grad()
    def set_codes(self, indices: Tensor, values: Tensor, uses: Tensor | float = 1.0) -> None:
        super().set_codes(indices, values, uses)
        self.sums[indices] = values * uses


class LinearCodebook(VectorQuantizer):
    """A frozen random basis times one learned matrix: codes = basis · matrix."""

    basis: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        del self.embedding
        self.register_buffer("basis", torch.randn(size, width) * width**-0.5, persistent=True)
        self.projection = nn.Linear(width, width, bias=False)

    def codebook(self) -> Tensor:
        return self.projection(self.basis)

    @torch.no_grad()
    def init_from_latents(self, latent: Tensor, iterations: int = 0) -> None:
        """Scale the basis so that codes have the standard deviation of the latents [N, width]."""
        self.basis.mul_(latent.std() / self.codebook().std())


CODEBOOKS: dict[CodebookKind, type[PlainCodebook] | type[LinearCodebook]] = {
    "plain": PlainCodebook,
    "moving_average": MovingAverageCodebook,
    "linear": LinearCodebook,
}


def build_quantizer(kind: CodebookKind, size: int, width: int) -> PlainCodebook | LinearCodebook:
    """Create a trainable codebook."""
    return CODEBOOKS[kind](size, width)
