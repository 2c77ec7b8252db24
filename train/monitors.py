"""What is looked at while a model trains, by hooks: the largest attention logits, and how far a step moves the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chameleon.model.transformer import Attend, Transformer
from chameleon.train.optimizer import whole

QUERIES = 256  # queries whose logits exist at one time


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor, document_ids: Tensor) -> Tensor:
    """The largest attention logit within documents: scalar. q [B, H, T, C], k [B, K, T, C], document_ids [B, T]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)
    largest = torch.full((), -math.inf, device=q.device)
    places = torch.arange(q.shape[2], device=q.device)
    for start in range(0, q.shape[2], QUERIES):
        part = slice(start, start + QUERIES)
        logits = (q[:, :, part] @ keys).float() / math.sqrt(q.shape[3])
        seen = (document_ids[:, None, part, None] == document_ids[:, None, None, :]) & (places[part, None] >= places)
        largest = torch.maximum(largest, logits.masked_fill(~seen, -math.inf).max())
    return largest


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Compiled blocks run as they were written meanwhile: hooks cannot enter them, and they are for training's shapes."""
    compiled = [(block, block._compiled_call_impl) for block in model.blocks]
    try:
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for block, implementation in compiled:
            block._compiled_call_impl = implementation


class AttentionWatch:
    """The largest attention logit of each layer, over the passes that were watched."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.largest: list[Tensor] = []

    @contextmanager
    def watching(self, document_ids: Tensor) -> Iterator[None]:
        """Watches the passes of a block of code, which run uncompiled."""
        found: dict[int, Tensor] = {}
        handles = []

        def hook(layer: int) -> Any:
            def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
                found[layer] = largest_logit(inputs[0].detach(), inputs[1].detach(), document_ids)

            return see

        for layer, block in enumerate(self.model.blocks):
            handles += [m.register_forward_hook(hook(layer)) for m in block.modules() if isinstance(m, Attend)]
        try:
            with uncompiled(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
        new = [found[layer] for layer in range(len(self.model.blocks))]
        before = self.largest or new
        self.largest = [torch.maximum(old, now) for old, now in zip(before, new, strict=True)]


class UpdateWatch:
    """The norm of a step's change of the weights as a share of the weights' norm; holds a copy of them meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def share(self) -> Tensor:
        """Scalar. To be asked once, after the step, on every process."""
        sums: list[Tensor | float] = [0.0, 0.0]
        for parameter, old in zip(self.parameters, self.before, strict=True):
            now = parameter.detach()
            for place, tensor in enumerate((now - old, now)):
                sums[place] = sums[place] + whole(tensor.float().square().sum())
        self.before.clear()
        changed, size = (torch.as_tensor(value).sqrt() for value in sums)
        return changed / size.clamp(min=1e-30)
