"""Requests that generate one image: from a prompt, as the completion of an image, or as a variation of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chameleon.dialect import Grid
from chameleon.document import Document
from chameleon.errors import BadInput, check_seed
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.prompting import GuidanceScale, PromptBuilder
from chameleon.generation.request import Request
from chameleon.generation.sampling import Sampling
from chameleon.vocabulary import Vocabulary


@dataclass(frozen=True)
class Drawing:
    """The shape of an image that is to be generated, and what of it is given."""

    grid: Grid | None
    """None leaves it to the model."""
    fixed_codes: tuple[int, ...] = ()
    """Token ids of its codes, row by row, −1 where the model is to choose, as it is for those that are left out."""


def check_fraction(value: float, name: str, *, exclusive: bool = False) -> None:
    """Raise `BadInput` unless the value lies in [0, 1], or in (0, 1) if `exclusive`."""
    if not (0 < value < 1 if exclusive else 0 <= value <= 1):
        raise BadInput(f"{value} does not lie between 0 and 1", where=name)


def upper_codes(codes: Sequence[int], grid: Grid, keep: float) -> tuple[int, ...]:
    """Return the codes of the upper part of an image, to be completed: at least one row, at most all but one."""
    check_fraction(keep, "keep", exclusive=True)
    height, width = grid
    num_rows = max(1, min(height - 1, round(keep * height)))
    return tuple(codes[: num_rows * width])


def randomly_kept_codes(codes: Sequence[int], keep: float, seed: int) -> tuple[int, ...]:
    """Return the codes of an image with each one replaced by −1, to be sampled again, with probability 1 − `keep`."""
    check_fraction(keep, "keep")
    generator = torch.Generator().manual_seed(check_seed(seed))
    is_kept = torch.rand(len(codes), generator=generator) < keep
    return tuple(torch.where(is_kept, torch.tensor(codes), -1).tolist())


def unpainted_codes(codes: Sequence[int], painted: np.ndarray, grid: Grid) -> tuple[int, ...]:
    """Return the codes of an image with −1 for each cell of the grid that has a painted pixel: bool [H, W]."""
    height, width = grid
    cells = painted.reshape(height, painted.shape[0] // height, width, painted.shape[1] // width).any(axis=(1, 3))
    if not cells.any():
        raise BadInput("nothing is painted", where="mask", remedy="mark the pixels that are to be drawn anew")
    return tuple(-1 if is_painted else code for code, is_painted in zip(codes, cells.flatten().tolist(), strict=True))


def image_request(
    prompts: PromptBuilder,
    prompt: str,
    drawing: Drawing,
    *,
    seed: int,
    guidance_scale: GuidanceScale,
    sampling: Sampling,
) -> Request:
    """Return a request for one image of what the prompt says.

    Fixed codes at its beginning become part of the prompt, so they are prefilled instead of decoded one by one.
    """
    document = prompts.draw_document(prompt, drawing.grid)
    return document_image_request(prompts, document, drawing, seed=seed, guidance_scale=guidance_scale, sampling=sampling)


def document_image_request(
    prompts: PromptBuilder,
    document: Document,
    drawing: Drawing,
    *,
    seed: int,
    guidance_scale: GuidanceScale,
    sampling: Sampling,
) -> Request:
    """Return a request for one image after a document."""
    v, grid, fixed_codes = prompts.tokenizer.vocabulary, drawing.grid, drawing.fixed_codes
    token_ids, guidance = prompts.token_ids(document), prompts.guidance(document, guidance_scale)
    leading = fixed_codes[: fixed_codes.index(-1)] if -1 in fixed_codes else fixed_codes
    if leading:
        assert grid is not None
        started_image = v.started_image(leading, grid)
        token_ids = (*token_ids, *started_image)
        guidance = guidance.with_started_image(started_image) if guidance is not None else None
    length = v.dialect.max_length if grid is None else v.dialect.length(grid)
    constraints = OutputConstraints(length, format=() if leading else ("image",), grid=grid)
    return Request(token_ids, constraints, image_sampling=sampling, guidance=guidance, seed=seed, fixed_codes=fixed_codes)


def generated_image_codes(request: Request, generated: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    """Return the codes int64 [h, w] of the image that an `image_request` generated."""
    token_ids = [*request.prompt, *generated]
    block = vocabulary.read_image(token_ids, len(token_ids) - 1 - token_ids[::-1].index(vocabulary.boi))
    assert block is not None
    return vocabulary.image_codes(block)
