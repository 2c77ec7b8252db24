"""Vector quantisation, and three ways to learn the codebook.

`VectorQuantizer` is what a finished tokenizer needs: nearest code by squared distance, and look-up. Its only tensor is
`embedding.weight` [codebook_size, width], as in the released format. Training swaps in one of

* `PlainCodebook`: codes follow the encoder by gradient (van den Oord et al., arXiv 1711.00937), as released;
* `MovingAverageCodebook`: codes are moving averages of what was assigned to them (the same paper, appendix A.1);
* `LinearCodebook`: frozen random codes seen through one learned linear layer (SimVQ, arXiv 2411.02038), so that every
  step moves every code and none dies.

Each gives its codes as one matrix, so that a trained tokenizer is always saved in the released format.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

DISTANCES = 2**27  # between latents and codes, that exist at one time
CodebookKind = Literal["plain", "moving_average", "linear"]


class Quantized(NamedTuple):
    """What quantising a latent gives."""

    latent: Tensor
    """[B, width, h, w]: the nearest codes; gradients pass straight through to the encoder."""
    codes: Tensor
    """[B, h, w] int64."""
    codebook_loss: Tensor
    """Scalar: mean squared distance that pulls codes to latents (0 where codes do not learn by gradient)."""
    commitment_loss: Tensor
    """Scalar: mean squared distance that pulls latents to codes."""


def nearest(latent: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of `codebook` [K, width] for each row of `latent` [N, width], in fp32: int64 [N]."""
    latent, codebook = latent.float(), codebook.float()
    lengths = codebook.square().sum(1)  # |latent|² is the same for all codes
    rows = max(1, DISTANCES // len(codebook))
    return torch.cat([(lengths - 2 * part @ codebook.t()).argmin(1) for part in latent.split(rows)])


def over_all(values: Tensor) -> Tensor:
    """The sum of `values` over all processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def mean_over_all(values: Tensor) -> Tensor:
    """The mean of `values` over all processes that train together."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return over_all(values) / world


def of_first(values: Tensor) -> Tensor:
    """The first process's `values`, on every process that trains with it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(values, src=0)
    return values


class VectorQuantizer(nn.Module):
    """A fixed codebook of `size` codes of `width` numbers."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def codebook(self) -> Tensor:
        """[size, width]: the codes as they are saved."""
        return self.embedding.weight

    def look_up(self, codes: Tensor) -> Tensor:
        """codes [B, h, w] to latents [B, width, h, w]."""
        return rearrange(F.embedding(codes, self.codebook()), "b h w c -> b c h w")

    def forward(self, latent: Tensor) -> Quantized:
        """latent [B, width, h, w] to its nearest codes. Always in fp32: distances decide between neighbours."""
        with torch.autocast(latent.device.type, enabled=False):
            return self.quantize(latent)

    def quantize(self, latent: Tensor) -> Quantized:
        latent = latent.float()
        batch, _, height, _ = latent.shape
        flat = rearrange(latent, "b c h w -> (b h w) c")
        codebook = self.codebook()
        codes = nearest(flat.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)
        codebook_loss = F.mse_loss(chosen, flat.detach())
        commitment_loss = F.mse_loss(flat, chosen.detach())
        if self.training and not over_all((~flat.isfinite()).sum()):  # one bad batch would spoil the averages
            self.observe(flat.detach(), codes)
        chosen = flat + (chosen - flat).detach()
        return Quantized(
            rearrange(chosen, "(b h w) c -> b c h w", b=batch, h=height),
            rearrange(codes, "(b h w) -> b h w", b=batch, h=height),
            codebook_loss,
            commitment_loss,
        )

    def observe(self, latent: Tensor, codes: Tensor) -> None:
        """Called in training with latents [N, width] and their codes [N]."""


class PlainCodebook(VectorQuantizer):
    """Codes that learn by gradient; those unused for long are set to latents of the batch.

    `revive_below`: a code whose moving average of uses per step falls below this is dead; 0 never revives.
    """

    uses: Tensor

    def __init__(self, size: int, width: int, *, decay: float = 0.99, revive_below: float = 0.03) -> None:
        super().__init__(size, width)
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("uses", torch.ones(size), persistent=True)
        self.revived = 0
        """Codes that were dead, and set to latents, in the last step."""

    def observe(self, latent: Tensor, codes: Tensor) -> None:
        counts = over_all(torch.bincount(codes, minlength=len(self.uses)).to(self.uses.dtype))
        self.uses.lerp_(counts, 1 - self.decay)
        dead = (self.uses < self.revive_below).nonzero().flatten()
        self.revived = len(dead)
        if len(dead):
            pick = torch.randint(len(latent), (len(dead),), device=latent.device)
            self.place(dead, of_first(latent[pick]))
            self.uses[dead] = 1.0

    @torch.no_grad()
    def place(self, which: Tensor, values: Tensor) -> None:
        """Sets codes `which` [n] to `values` [n, width]."""
        self.embedding.weight[which] = values

    @torch.no_grad()
    def start_from(self, latent: Tensor, iterations: int = 10) -> None:
        """Sets all codes to k-means centres of latents [N, width], N ≥ size; `iterations` 0 takes latents themselves."""
        size = len(self.uses)
        centres = latent[torch.randperm(len(latent), device=latent.device)[:size]].clone()
        for _ in range(iterations):
            codes = nearest(latent, centres)
            counts = torch.bincount(codes, minlength=size).unsqueeze(1)
            sums = torch.zeros_like(centres).index_add_(0, codes, latent)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        self.place(torch.arange(size, device=latent.device), centres)


class MovingAverageCodebook(PlainCodebook):
    """Codes that are moving averages of the latents assigned to them."""

    sums: Tensor

    def __init__(self, size: int, width: int, *, decay: float = 0.99, revive_below: float = 0.03) -> None:
        super().__init__(size, width, decay=decay, revive_below=revive_below)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("sums", self.embedding.weight.detach().clone(), persistent=True)

    @torch.no_grad()
    def observe(self, latent: Tensor, codes: Tensor) -> None:
        self.sums.lerp_(over_all(torch.zeros_like(self.sums).index_add_(0, codes, latent)), 1 - self.decay)
        super().observe(latent, codes)
        used = self.uses >= self.revive_below
        self.embedding.weight[used] = self.sums[used] / self.uses[used].unsqueeze(1)

    @torch.no_grad()
    def place(self, which: Tensor, values: Tensor) -> None:
        super().place(which, values)
        self.sums[which] = values
        self.uses[which] = 1.0


class LinearCodebook(VectorQuantizer):
    """A frozen random basis seen through one learned matrix: codes = basis · matrix."""

    basis: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        del self.embedding
        self.register_buffer("basis", torch.randn(size, width) * width**-0.5, persistent=True)
        self.projection = nn.Linear(width, width, bias=False)

    def codebook(self) -> Tensor:
        return self.projection(self.basis)

    @torch.no_grad()
    def start_from(self, latent: Tensor, iterations: int = 0) -> None:
        """Scales the basis to the spread of latents [N, width]."""
        self.basis.mul_(latent.std() / self.codebook().std())


def build_quantizer(kind: CodebookKind, size: int, width: int) -> PlainCodebook | LinearCodebook:
    """The trainable codebook of that kind."""
    return {"plain": PlainCodebook, "moving_average": MovingAverageCodebook, "linear": LinearCodebook}[kind](size, width)
