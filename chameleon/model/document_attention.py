"""Attention within packed documents on processors: each document attends by itself, with others of about its length.

A dense mask computes a row's whole square of scores, of which the documents on the diagonal are a small part. Here the
documents of all rows are copied together in groups of equal length, padded at the end to a multiple of 16 tokens. Attention
is causal, so no real token attends to padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_STEP = 16
"""Lengths of groups are multiples of this."""
MAX_PRODUCT_LENGTH = 1024
"""Longest document whose scores are held in memory in 16-bit training."""


@dataclass(frozen=True)
class DocumentGroups:
    """The documents of a packed batch [B, T], in groups of equal padded length."""

    tokens: Tensor
    """int64 [P], for each token of the groups, the position among the B · T of the batch; padding repeats the last one."""
    positions: Tensor
    """int64 [B · T], where in the groups each token of the batch is."""
    padding: Tensor
    """int64 [P − B · T], which tokens of the groups are padding."""
    shapes: list[tuple[int, int]]
    """Number of documents and their length, of each group; the products add up to P."""


def document_groups(document_ids: Tensor) -> DocumentGroups:
    """Return the groups of a batch. document_ids: int64 [B, T], which document of its row each token belongs to."""
    batch_size, length = document_ids.shape
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_first.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([batch_size * length]))
    padded, order = (-(-lengths // LENGTH_STEP) * LENGTH_STEP).sort(stable=True)
    starts, lengths = starts[order], lengths[order]
    group_starts = padded.cumsum(0) - padded
    offsets = torch.arange(int(padded.sum()), device=document_ids.device) - group_starts.repeat_interleave(padded)
    last = (lengths - 1).repeat_interleave(padded)
    tokens = starts.repeat_interleave(padded) + offsets.minimum(last)
    is_padding = offsets > last
    positions = torch.empty(batch_size * length, dtype=torch.int64, device=document_ids.device)
    positions[tokens[~is_padding]] = (~is_padding).nonzero()[:, 0]
    group_lengths, counts = padded.unique_consecutive(return_counts=True)
    shapes = list(zip(counts.tolist(), group_lengths.tolist(), strict=True))
    return DocumentGroups(tokens, positions, is_padding.nonzero()[:, 0], shapes)


class Regroup(torch.autograd.Function):
    """x [N, …] → x[index]. The gradient is gathered too, which costs a copy; that of indexing adds row by row."""

    @staticmethod
    def forward(context: Any, x: Tensor, index: Tensor, gradient_index: Tensor, without_gradient: Tensor | None) -> Tensor:
        """`without_gradient` are the rows of x that `index` does not name."""
        context.indices = gradient_index, without_gradient
        return x.index_select(0, index)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        gradient_index, without_gradient = context.indices
        gradient = gradient.index_select(0, gradient_index)
        if without_gradient is not None:
            gradient.index_fill_(0, without_gradient, 0)
        return gradient, None, None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention; q [N, H, L, C], k and v [N, K, L, C] to [N, H, L, C].

    In 16 bits, products and a softmax take less than half of the time of PyTorch's fused kernel for CPUs, and more memory.
    """
    heads, length, width = q.shape[1:]
    if q.dtype.itemsize > 2 or length > MAX_PRODUCT_LENGTH:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != k.shape[1])
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) if part.shape[1] != heads else part for part in (k, v))
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = ((q / math.sqrt(width)) @ k.transpose(2, 3)).masked_fill_(later, -math.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def document_attention(q: Tensor, k: Tensor, v: Tensor, groups: DocumentGroups) -> Tensor:
    """Causal softmax attention within documents; q [B, H, T, C], k and v [B, K, T, C] to [B, H, T, C]."""
    batch_size, _, length, _ = q.shape
    sizes = [documents * length for documents, length in groups.shapes]
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (part.to(torch.get_autocast_dtype(q.device.type)) for part in (q, k, v))
    parts = [
        Regroup.apply(part.transpose(1, 2).flatten(0, 1), groups.tokens, groups.positions, None).split(sizes)
        for part in (q, k, v)
    ]
    outputs = []
    for shape, *group in zip(groups.shapes, *parts, strict=True):
        output = causal_attention(*(part.unflatten(0, shape).transpose(1, 2) for part in group))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = Regroup.apply(torch.cat(outputs), groups.positions, groups.tokens, groups.padding)
    return output.unflatten(0, (batch_size, length)).transpose(1, 2)
