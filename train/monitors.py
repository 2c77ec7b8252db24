"""Monitors of a training run, by forward hooks: the largest attention logits, and how far a step moves the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from chameleon.model.transformer import ScaledDotProductAttention, Transformer
from chameleon.train.sharded_tensors import local_part, num_shards

QUERIES_PER_CHUNK = 256
"""Queries whose attention logits exist at one time."""


@torch.no_grad()
def max_attention_logit(q: Tensor, k: Tensor, document_ids: Tensor) -> Tensor:
    """Return the largest attention logit within documents: scalar. q [B, H, T, C], k [B, K, T, C], document_ids [B, T]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)
    largest = torch.full((), -math.inf, device=q.device)
    positions = torch.arange(q.shape[2], device=q.device)
    for start in range(0, q.shape[2], QUERIES_PER_CHUNK):
        queries = slice(start, start + QUERIES_PER_CHUNK)
        logits = (q[:, :, queries] @ keys).float() / math.sqrt(q.shape[3])
        same_document = document_ids[:, None, queries, None] == document_ids[:, None, None, :]
        is_attended = same_document & (positions[queries, None] >= positions)
        largest = torch.maximum(largest, logits.masked_fill(~is_attended, -math.inf).max())
    return largest


def uncompiled() -> Any:
    """Return a context in which compiled modules run eagerly: for hooks inside them, and for other shapes."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def observed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Run a block of code uncompiled, so that these hooks are called, and remove them at its end."""
    try:
        with uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


class AttentionLogitMonitor:
    """Records the largest attention logit of each layer over several forward passes."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.largest: list[Tensor] = []
        """Scalar of each layer."""

    @contextmanager
    def recording(self, document_ids: Tensor) -> Iterator[None]:
        """Record the forward passes of a block of code, which run uncompiled. document_ids: [B, T] of their batch."""
        current: dict[int, Tensor] = {}
        handles = []

        def hook_of(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                current[layer] = max_attention_logit(inputs[0].detach(), inputs[1].detach(), document_ids)

            return hook

        for layer, block in enumerate(self.model.blocks):
            attentions = [m for m in block.modules() if isinstance(m, ScaledDotProductAttention)]
            handles += [attention.register_forward_hook(hook_of(layer)) for attention in attentions]
        with observed(handles):
            yield
        new = [current[layer] for layer in range(len(self.model.blocks))]
        self.largest = [torch.maximum(a, b) for a, b in zip(self.largest or new, new, strict=True)]


class LayerTimer:
    """Measures the time that attention and feed-forward layers take in forward passes, without what blocks wait for.

    FSDP gathers a block's parameters before it runs, so a slow process differs from those that wait for it.
    """

    def __init__(self, model: Transformer) -> None:
        self.layers = [layer for block in model.blocks for layer in (block.attention, block.ffn)]
        self.is_on_gpu = next(model.parameters()).device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        """Start and end of each layer's runs: seconds, or events on a GPU."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Measure the forward passes of a block of code, which run uncompiled."""
        started: list[Any] = []

        def start(*_: Any) -> None:
            started.append(self.mark())

        def stop(*_: Any) -> None:
            self.spans.append((started.pop(), self.mark()))

        handles = [layer.register_forward_pre_hook(start, prepend=True) for layer in self.layers]  # type: ignore[union-attr]
        handles += [layer.register_forward_hook(stop) for layer in self.layers]  # type: ignore[union-attr]
        with observed(handles):
            yield

    def mark(self) -> Any:
        if not self.is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the sum of the times. A GPU must have finished."""
        if self.is_on_gpu:
            return sum(start.elapsed_time(end) for start, end in self.spans) / 1e3
        return sum(end - start for start, end in self.spans)


class UpdateRatioMonitor:
    """Measures the norm of a step's change of the weights relative to the weights' norm; keeps a copy of them meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.before = [local_part(p.detach()).clone() for p in self.parameters]

    @torch.no_grad()
    def ratio(self) -> Tensor:
        """Return the ratio, a scalar. To be called once, after the step, on every process."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.before[0].device)
        for parameter, before in zip(self.parameters, self.before, strict=True):
            after = local_part(parameter.detach())
            # Each process adds its part, of which there are as many copies as processes beyond the number of parts.
            parts = torch.stack([tensor.float().square().sum().double() for tensor in (after - before, after)])
            squares += parts * num_shards(parameter)
        self.before.clear()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(squares)
        change, norm = squares.sqrt().float()  # both too large by the same factor, the root of the number of processes
        return change / norm.clamp(min=1e-30)
