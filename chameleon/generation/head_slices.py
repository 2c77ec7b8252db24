"""Slices of the output head: logits are only computed for the tokens that may come next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chameleon.dialect import runs_of
from chameleon.generation.constraints import AllowedNext
from chameleon.vocabulary import Vocabulary

LinearFunction = Callable[[Tensor], Tensor]
MAX_GAP = 256
"""Ranges of token ids with fewer ids between them are one matrix product; the ids between them are masked."""


class HeadSlice:
    """The rows of the head for some token ids, in ascending order."""

    def __init__(self, weight: Tensor, needed: Tensor, make_linear: Callable[[Tensor], LinearFunction]) -> None:
        """weight [V, D]; needed: bool [V]; make_linear: creates a linear layer from some rows of the weight."""
        ranges: list[tuple[int, int]] = []
        for first, count in runs_of(needed.nonzero().flatten().tolist()):
            if ranges and first - sum(ranges[-1]) < MAX_GAP:
                ranges[-1] = (ranges[-1][0], first + count - ranges[-1][0])
            else:
                ranges.append((first, count))
        self.token_ids = torch.cat([torch.arange(first, first + count) for first, count in ranges]).to(weight.device)
        """int64 [n]: the token id of each column of the logits."""
        self.layers = [make_linear(weight[first : first + count]) for first, count in ranges]

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states [N, D] to logits [N, n], float32 (float64 if the hidden states are)."""
        outputs = [layer(hidden) for layer in self.layers]
        logits = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class HeadSlices:
    """The slices for text, image codes and sizes of images, and which of a slice's tokens each `AllowedNext` allows."""

    def __init__(self, head: nn.Linear, vocabulary: Vocabulary, make_linear: Callable[[Tensor], LinearFunction]) -> None:
        v, weight = vocabulary, head.weight.detach()
        end = "eos" if v.answer_end == v.eos else "sep"
        text = v.mask(text=True, specials=(end, "boi"))
        codes = v.mask(image=True)
        self.text = HeadSlice(weight, text, make_linear)
        self.codes = HeadSlice(weight, codes, make_linear)
        sizes = torch.zeros(v.size, dtype=torch.bool)
        sizes[list({token_id for grid in v.dialect.grids for token_id in v.dialect.header(grid)})] = True
        self.sizes = HeadSlice(weight, sizes, make_linear) if bool(sizes.any()) else self.text
        self.allowed: dict[AllowedNext, Tensor | None] = {}
        """bool [n] over the slice's tokens, or None where all are allowed."""
        codes_mask = codes.to(weight.device)[self.codes.token_ids]
        self.allowed[AllowedNext.CODE] = None if bool(codes_mask.all()) else codes_mask
        for start in (AllowedNext(0), AllowedNext.IMAGE_START):
            for stop in (AllowedNext(0), AllowedNext.END):
                names = [name for kind, name in ((start, "boi"), (stop, end)) if kind]
                mask = v.mask(text=True, specials=names).to(weight.device)
                self.allowed[AllowedNext.TEXT | start | stop] = mask[self.text.token_ids]
        no_more_text = v.mask(specials=("boi", end)).to(weight.device)
        self.allowed[AllowedNext.IMAGE_START | AllowedNext.END] = no_more_text[self.text.token_ids]

    def slice_for(self, allowed: AllowedNext) -> HeadSlice:
        return {AllowedNext.CODE: self.codes, AllowedNext.SIZE: self.sizes}.get(allowed, self.text)
