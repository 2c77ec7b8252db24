"""Vector quantisation, and the ways to train a codebook.

A `Quantizer` maps latents to codes and back. There are two kinds. `VectorQuantizer` has a matrix of codes and takes the
nearest by squared distance; its only tensor is `embedding.weight` [codebook_size, width], as in Meta's release.
`LevelQuantizer` has no weights: its codes are all combinations of a few levels in each dimension (FSQ, arXiv 2309.15505;
with two levels everywhere the corners of a cube on the unit sphere: BSQ, arXiv 2406.07548).

For training, `VectorQuantizer` is replaced by one of

* `PlainCodebook`: codes are trained by gradient (van den Oord et al., arXiv 1711.00937), as in the release;
* `MovingAverageCodebook`: codes are moving averages of the latents assigned to them (the same paper, appendix A.1);
* `LinearCodebook`: frozen random codes times one learned matrix (SimVQ, arXiv 2411.02038), so that every step moves every
  code and none dies;
* `IndexBackpropCodebook`: gradients flow through the choice of the code to all codes (IBQ, arXiv 2412.02692);
* `AdditiveCodebook`: sums of a coarse and a fine code (residual quantisation, arXiv 2203.01941, both codes merged to one).

Each returns its codes as one matrix, so that a trained tokenizer is always saved in the released format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from chameleon.errors import BadInput

MAX_DISTANCES = 2**27
"""Distances between latents and codes that exist at one time."""
CodebookKind = Literal["plain", "moving_average", "linear", "index_backprop", "additive", "levels"]
ENTROPY_WEIGHT = 0.1
"""Weight of the entropy term of binary spherical codes and of index back-propagation, relative to the codebook loss."""
K_MEANS_ITERATIONS = 10
MIN_USES = 1e-6
"""A code with a smaller moving average of its uses stays where it is; far smaller ones have too few digits to divide by."""


class Quantized(NamedTuple):
    """The result of quantising a latent."""

    latent: Tensor
    """[B, width, h, w]: the nearest codes, with a straight-through gradient to the encoder."""
    codes: Tensor
    """[B, h, w] int64."""
    codebook_loss: Tensor
    """Scalar: mean squared distance that pulls codes towards latents (without gradient where codes are averages), and the
    entropy term of the kinds that have one."""
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


def k_means(latent: Tensor, size: int, iterations: int) -> Tensor:
    """Return `size` centres [size, width] of latents [N, width], N ≥ size, after Lloyd's iterations from random latents."""
    centres = latent[torch.randperm(len(latent), device=latent.device)[:size]].clone()
    for _ in range(iterations):
        codes = nearest(latent, centres)
        counts = torch.bincount(codes, minlength=size).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, codes, latent)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place. A collective operation."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average `values` over all processes. A collective operation."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return all_reduce_sum(values) / world


def global_mean(values: Tensor) -> Tensor:
    """Return the mean of `values` over all processes, with this process's gradient; gradients are averaged later.

    A collective operation.
    """
    return values + (all_reduce_mean(values.detach().clone()) - values).detach()


def broadcast_from_first(values: Tensor) -> Tensor:
    """Return the first process's `values` on every process. A collective operation."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(values, src=0)
    return values


class Quantizer(nn.Module):
    """Latents [B, width, h, w] ↔ codes [B, h, w] int64 in 0 … size − 1."""

    def codebook(self) -> Tensor:
        """Return all codes as a matrix [size, width]."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Return latents [B, width, h, w] of codes [B, h, w]."""
        return rearrange(F.embedding(codes, self.codebook()), "b h w c -> b c h w")

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise a latent [B, width, h, w], always in float32."""
        with torch.autocast(latent.device.type, enabled=False):
            batch, _, height, _ = latent.shape
            rows = self.quantize_rows(rearrange(latent.float(), "b c h w -> (b h w) c"))
            return rows._replace(
                latent=rearrange(rows.latent, "(b h w) c -> b c h w", b=batch, h=height),
                codes=rearrange(rows.codes, "(b h w) -> b h w", b=batch, h=height),
            )

    def quantize_rows(self, latent: Tensor) -> Quantized:
        """Quantise latents [N, width] to latents [N, width] and codes [N]."""
        raise NotImplementedError

    def init_from_latents(self, latent: Tensor) -> None:
        """Adapt the codes, before the first step, to latents [N, width] of the untrained encoder."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return what a trained tokenizer keeps of it, by the names of the released format."""
        return {}


class VectorQuantizer(Quantizer):
    """A fixed codebook of `size` codes of dimension `width`; a latent's code is the nearest."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def codebook(self) -> Tensor:
        return self.embedding.weight

    def saved_state(self) -> dict[str, Tensor]:
        return {"embedding.weight": self.codebook().detach()}

    def quantize_rows(self, latent: Tensor) -> Quantized:
        codebook = self.codebook()
        codes = nearest(latent.detach(), codebook.detach())
        if self.training and not all_reduce_sum((~latent.isfinite()).sum()):  # one bad batch would spoil the averages
            self.update(latent.detach(), codes)
        return self.straight_through(latent, codes, codebook)

    def straight_through(self, latent: Tensor, codes: Tensor, codebook: Tensor) -> Quantized:
        """Return the codes' rows of the codebook, with the gradient of the latent, and both losses."""
        nearest_codes = F.embedding(codes, codebook)
        codebook_loss = F.mse_loss(nearest_codes, latent.detach())
        commitment_loss = F.mse_loss(latent, nearest_codes.detach())
        return Quantized(latent + (nearest_codes - latent).detach(), codes, codebook_loss, commitment_loss)

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
    def init_from_latents(self, latent: Tensor, iterations: int = K_MEANS_ITERATIONS) -> None:
        """Set all codes to k-means centres of latents [N, width], N ≥ size; with 0 `iterations`, to random latents."""
        self.set_codes(torch.arange(len(self.uses), device=latent.device), k_means(latent, len(self.uses), iterations))


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
    def init_from_latents(self, latent: Tensor) -> None:
        """Scale the basis so that codes have the standard deviation of the latents [N, width]."""
        self.basis.mul_(latent.std() / self.codebook().std())


class IndexBackpropCodebook(VectorQuantizer):
    """All codes get a gradient in each step, through the softmax of their negative distances (IBQ, arXiv 2412.02692).

    The choice is the nearest code where the paper takes the largest dot product, so that the saved format is the same. An
    entropy term makes single choices certain and all codes equally frequent.
    """

    def quantize_rows(self, latent: Tensor) -> Quantized:
        codebook = self.codebook()
        distances = latent.square().sum(1, keepdim=True) - 2 * latent @ codebook.t() + codebook.square().sum(1)
        shares = distances.neg().softmax(dim=1)
        codes = distances.argmin(1)
        chosen = F.one_hot(codes, len(codebook)).to(shares.dtype)
        quantized = self.straight_through(latent, codes, codebook)
        entropy_term = (entropy(shares).mean() - entropy(global_mean(shares.mean(0)))) / math.log(len(codebook))
        return quantized._replace(
            latent=(chosen + shares - shares.detach()) @ codebook,
            codebook_loss=quantized.codebook_loss + ENTROPY_WEIGHT * entropy_term,
        )

    @torch.no_grad()
    def init_from_latents(self, latent: Tensor) -> None:
        """Set all codes to k-means centres of latents [N, width]."""
        self.embedding.weight.copy_(k_means(latent, len(self.embedding.weight), K_MEANS_ITERATIONS))


class AdditiveCodebook(VectorQuantizer):
    """Codes that are sums of a coarse and a fine one, trained by gradient: code = index of the coarse · fine codes + index.

    The code of a latent is the nearest sum, which is at least as near as the fine code nearest to the coarse one's residue.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        del self.embedding
        num_fine = 2 ** (size.bit_length() // 2)
        if size % num_fine:
            raise BadInput(
                f"{size} codes are not {num_fine} fine ones for each of some coarse ones",
                where="model.codebook_size",
                remedy=f"use a multiple of {num_fine}",
            )
        self.coarse = nn.Parameter(torch.randn(size // num_fine, width) * width**-0.5)
        self.fine = nn.Parameter(torch.randn(num_fine, width) * 0.3 * width**-0.5)

    def codebook(self) -> Tensor:
        return rearrange(self.coarse[:, None] + self.fine, "c f w -> (c f) w")

    @torch.no_grad()
    def init_from_latents(self, latent: Tensor) -> None:
        """Set both codebooks to k-means centres: of latents [N, width], and of what the coarse codes leave over."""
        self.coarse.copy_(k_means(latent, len(self.coarse), K_MEANS_ITERATIONS))
        residue = latent - self.coarse[nearest(latent, self.coarse)]
        self.fine.copy_(k_means(residue, len(self.fine), K_MEANS_ITERATIONS))


class LevelQuantizer(Quantizer):
    """All combinations of a few levels in each dimension, without weights; a code counts them like digits, first to last.

    A latent is squeezed into (−1, 1) by tanh and rounded to equally spaced levels from −1 to 1 (FSQ, arXiv 2309.15505,
    with the levels symmetrical about 0). Where all dimensions have two levels, the latent is scaled to norm 1 instead and
    the levels are ±1/√width (BSQ, arXiv 2406.07548), with the entropy term of that paper on each dimension by itself.
    """

    levels: Tensor
    """int64 [width]."""
    place_values: Tensor
    """int64 [width]: the product of the numbers of levels after each dimension."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.size, self.is_binary = math.prod(levels), set(levels) == {2}
        places = [math.prod(levels[index + 1 :]) for index in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("place_values", torch.tensor(places), persistent=False)

    def values(self, digits: Tensor) -> Tensor:
        """Return the latents [..., width] of digits [..., width], each from 0 to its number of levels − 1."""
        values = 2 * digits / (self.levels - 1) - 1
        return values * len(self.levels) ** -0.5 if self.is_binary else values

    def codebook(self) -> Tensor:
        return self.values(self.digits(torch.arange(self.size, device=self.levels.device)))

    def digits(self, codes: Tensor) -> Tensor:
        """Return the digits [..., width] of codes [...]."""
        return codes[..., None] // self.place_values % self.levels

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self.values(self.digits(codes)), "b h w c -> b c h w")

    def quantize_rows(self, latent: Tensor) -> Quantized:
        zero = latent.new_zeros(())
        if self.is_binary:
            bounded = F.normalize(latent, dim=1)
            digits = (bounded > 0).long()
        else:
            bounded = latent.tanh()
            digits = ((bounded + 1) / 2 * (self.levels - 1)).round().long()
        values = self.values(digits)
        codes = (digits * self.place_values).sum(1)
        straight_through = bounded + (values - bounded).detach()
        if not self.is_binary:
            return Quantized(straight_through, codes, zero, zero)
        is_one = (2 * bounded * len(self.levels) ** 0.5).sigmoid()
        certainty, evenness = binary_entropy(is_one).mean(), binary_entropy(global_mean(is_one.mean(0))).mean()
        entropy_term = (certainty - evenness) / math.log(2)
        return Quantized(straight_through, codes, ENTROPY_WEIGHT * entropy_term, F.mse_loss(bounded, values))


def entropy(shares: Tensor) -> Tensor:
    """Return the entropy in nats of distributions [..., K]: [...]."""
    return -(shares * shares.clamp(min=1e-12).log()).sum(-1)


def binary_entropy(shares: Tensor) -> Tensor:
    """Return the entropy in nats of coins that show heads with the given probabilities."""
    return entropy(torch.stack((shares, 1 - shares), dim=-1))


CODEBOOKS: dict[CodebookKind, type[VectorQuantizer]] = {
    "plain": PlainCodebook,
    "moving_average": MovingAverageCodebook,
    "linear": LinearCodebook,
    "index_backprop": IndexBackpropCodebook,
    "additive": AdditiveCodebook,
}
"""Trainable codebooks that are saved as a matrix."""


def fixed_quantizer(size: int, width: int, levels: Sequence[int] = ()) -> Quantizer:
    """Return the quantizer of a trained tokenizer, a matrix of codes unless there are levels."""
    return LevelQuantizer(levels) if levels else VectorQuantizer(size, width)


def build_quantizer(kind: CodebookKind, size: int, width: int, levels: Sequence[int] = ()) -> Quantizer:
    """Return a trainable quantizer. Raise `BadInput` for kind `levels` without levels, or another kind with them."""
    if (kind == "levels") != bool(levels):
        raise BadInput(
            f"codebook {kind} with model.levels {list(levels)}",
            where="recipe.codebook",
            remedy="levels are for codebook=levels, which needs them",
        )
    return CODEBOOKS[kind](size, width) if kind != "levels" else fixed_quantizer(size, width, levels)
