"""The output head cut to the ids that may come next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chameleon.generation.modality import Next
from chameleon.vocabulary import Vocabulary, runs_of

Linear = Callable[[Tensor], Tensor]
GAP = 256
"""Runs of ids with fewer ids between them are one product; what lies between is masked."""


class HeadSlice:
    """Rows of the head for the ids of some kinds, in the order of the ids."""

    def __init__(self, weight: Tensor, wanted: Tensor, prepared: Callable[[Tensor], Linear]) -> None:
        """weight [V, D]; wanted bool [V]; prepared: makes a linear layer of some rows of the weight."""
        runs: list[tuple[int, int]] = []
        for first, count in runs_of(wanted.nonzero().flatten().tolist()):
            if runs and first - sum(runs[-1]) < GAP:
                runs[-1] = (runs[-1][0], first + count - runs[-1][0])
            else:
                runs.append((first, count))
        self.ids = torch.cat([torch.arange(first, first + count) for first, count in runs]).to(weight.device)
        self.parts = [prepared(weight[first : first + count]) for first, count in runs]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] to logits [N, n], float32 (or float64 where the hidden states are)."""
        parts = [part(hidden) for part in self.parts]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Heads:
    """The slices for text and for codes, and which of a slice's ids each kind allows: bool [n], or None for all."""

    def __init__(self, head: nn.Linear, vocabulary: Vocabulary, prepared: Callable[[Tensor], Linear]) -> None:
        v, weight = vocabulary, head.weight.detach()
        text = v.mask(text=True, specials=("eos", "boi"))
        codes = v.mask(image=True)
        self.text = HeadSlice(weight, text, prepared)
        self.codes = HeadSlice(weight, codes, prepared)
        self.allowed: dict[Next, Tensor | None] = {Next.CODE: codes.to(weight.device)[self.codes.ids]}
        if bool(self.allowed[Next.CODE].all()):  # type: ignore[union-attr]
            self.allowed[Next.CODE] = None
        for start in (Next(0), Next.IMAGE_START):
            for end in (Next(0), Next.END):
                names = [name for kind, name in ((start, "boi"), (end, "eos")) if kind]
                mask = v.mask(text=True, specials=names).to(weight.device)
                self.allowed[Next.TEXT | start | end] = mask[self.text.ids]
        either = v.mask(specials=("boi", "eos")).to(weight.device)  # behind a text that may not go on
        self.allowed[Next.IMAGE_START | Next.END] = either[self.text.ids]

    def slice_for(self, kind: Next) -> HeadSlice:
        return self.codes if kind == Next.CODE else self.text
