"""Painting: a part of a picture is drawn anew, so that it fits what stands before and after it.

A model writes codes from left to right, so a code is chosen without a look at those that follow. Two things make up for it:
of several continuations the one is kept after which the codes that follow are likeliest, and in further rounds the codes
of each row are drawn again between what then surrounds them. A round is Gibbs sampling over rows by importance: candidates
from the model's own p(row | before), weighed by p(after | before, row), of which the heaviest is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.errors import MAX_SEED
from chameleon.generation.image_requests import Drawing, image_request
from chameleon.generation.prompting import PromptBuilder
from chameleon.generation.request import Request
from chameleon.generation.sampling import Sampling


@dataclass(frozen=True)
class Painting:
    """A picture of which a part is to be drawn anew."""

    picture: PILImage.Image
    """Fitted to the size of an image."""
    painted: np.ndarray
    """bool [H, W]: the pixels that change."""
    drawing: Drawing
    """Its fixed codes are those of the picture in cells that have no such pixel."""

    def merge(self, drawn: PILImage.Image) -> PILImage.Image:
        """Return the picture with the painted pixels of a drawing."""
        pixels = np.where(self.painted[:, :, None], np.asarray(drawn.convert("RGB")), np.asarray(self.picture))
        return PILImage.fromarray(pixels)


@dataclass
class Painter:
    """Draws the part of a picture that is to be drawn anew."""

    prompts: PromptBuilder
    generate: Callable[[Sequence[Request]], list[Tensor]]
    """Returns the codes [h, w] of the image that each request asks for."""
    score: Callable[[Sequence[int], Sequence[Tensor]], Tensor]
    """Returns the log-likelihood of each code of images after a prompt: [n, h · w]."""
    task: Painting
    prompt: str
    guidance_scale: float
    sampling: Sampling

    def __post_init__(self) -> None:
        assert self.task.drawing.grid is not None
        self.is_painted = torch.tensor(self.task.drawing.fixed_codes).view(self.task.drawing.grid) < 0
        document = self.prompts.draw_document(self.prompt, self.task.drawing.grid)
        self.prompt_ids = self.prompts.token_ids(document)

    def run(self, num_images: int, candidates: int, rounds: int, seed: int) -> list[Tensor]:
        """Return the codes int64 [h, w] of `num_images` results. Each draw has a seed of its own, from `seed` on."""
        self.next_seed = seed
        drawn = self.draw([self.task.drawing] * (num_images * candidates))
        results = [
            self.best(drawn[start : start + candidates], self.is_painted) for start in range(0, len(drawn), candidates)
        ]
        for _ in range(rounds - 1):
            for row in self.is_painted.any(dim=1).nonzero().flatten().tolist():
                results = self.redraw_row(results, row, candidates)
        return results

    def redraw_row(self, images: Sequence[Tensor], row: int, candidates: int) -> list[Tensor]:
        """Return the images with the painted codes of a row drawn anew, where that makes what follows likelier."""
        block = torch.zeros_like(self.is_painted)
        block[row] = self.is_painted[row]
        code_ids = [
            self.prompts.tokenizer.vocabulary.codes_to_ids(image).masked_fill(block, -1).flatten().tolist()
            for image in images
        ]
        drawings = [Drawing(self.task.drawing.grid, tuple(ids)) for ids in code_ids for _ in range(candidates)]
        drawn = self.draw(drawings)
        return [
            self.best([image, *drawn[index * candidates : (index + 1) * candidates]], block)
            for index, image in enumerate(images)
        ]

    def draw(self, drawings: Sequence[Drawing]) -> list[Tensor]:
        """Return the codes of drawings."""
        requests = [
            image_request(
                self.prompts,
                self.prompt,
                drawing,
                seed=(self.next_seed + index) % (MAX_SEED + 1),
                guidance_scale=self.guidance_scale,
                sampling=self.sampling,
            )
            for index, drawing in enumerate(drawings)
        ]
        self.next_seed += len(drawings)
        return self.generate(requests)

    def best(self, images: Sequence[Tensor], block: Tensor) -> Tensor:
        """Return the image whose codes after the beginning of a block, bool [h, w], and outside of it, are likeliest."""
        if len(images) == 1:
            return images[0]
        scores = self.score(self.prompt_ids, images)
        return images[int(self.following(scores, block).argmax())]

    @staticmethod
    def following(scores: Tensor, block: Tensor) -> Tensor:
        """Return the sum of scores [n, h · w] of the codes that follow the beginning of a block and are not in it."""
        flat = block.flatten()
        return scores[:, (flat.cumsum(0) > 0) & ~flat].sum(dim=1)
