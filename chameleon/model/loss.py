"""Cross-entropy with z-loss over a large vocabulary, computed in chunks.

loss = Σ_t w_t · (−log p(target_t) + z · log²Z_t). Logits exist for one chunk of tokens at a time: their gradient is
computed immediately, and only its products with the head and the hidden states are kept (the scheme of cut
cross-entropy, arXiv 2411.09009, without its kernels). z-loss as in PaLM (arXiv 2204.02311), with the coefficient 1e-5 of
arXiv 2405.09818, section 2.3.

The vocabulary may be split over processes (Megatron-LM, arXiv 1909.08053): each has some rows of the head, and for each
token they exchange two numbers, the logsumexp of their logits and the target's logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from chameleon.errors import BadInput

Z_LOSS = 1e-5
MIN_CHUNK = 128
"""Tokens whose logits exist at one time, at least."""
HEAD_GRAD_ROWS = 8192
"""Rows of the head's gradient that are computed at one time."""


class TokenLoss(NamedTuple):
    """The loss and, for logging, its terms for each token."""

    loss: Tensor
    """Scalar with a gradient."""
    nll: Tensor
    """float32 [N]: −log p(target); 0 where the weight is 0."""
    log_z: Tensor
    """float32 [N]; 0 where the weight is 0."""


def loss_chunk_size(vocab_size: int, device_type: str) -> int:
    """Return the number of tokens whose logits exist at one time.

    On a CPU 512 tokens keep matrix products fast, and fewer logits stay in its cache; a GPU is idle between small chunks.
    """
    max_tokens, max_logits = (512, 2**23) if device_type == "cpu" else (8192, 2**26)
    return min(max_tokens, max(MIN_CHUNK, max_logits // vocab_size))


class VocabularyPart(NamedTuple):
    """Which rows of the head a process has."""

    first_row: int
    max_rows: int
    """Rows of the process that has most."""
    group: Any
    """The processes that have the head together, the process group of torch.distributed."""


def whole_log_z(lse: Tensor, target_logit: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return log Z and the target's logit, both [N, 1], from each process's part of them. A collective operation."""
    parts = torch.stack((lse, target_logit))
    gathered = parts.new_empty(distributed.get_world_size(group), *parts.shape)
    distributed.all_gather(list(gathered), parts, group=group)
    return gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients, chunk by chunk; the backward pass only scales them in place, so it
    can run once. Of a split vocabulary, the gradient of the hidden states is this process's term of a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        chunk: int,
        part: VocabularyPart | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        cast_head = head.to(hidden.dtype)
        nll, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            chunk_slice = slice(start, start + chunk)
            h, target = hidden[chunk_slice], targets[chunk_slice].unsqueeze(1)
            weight = weights[chunk_slice].unsqueeze(1)
            logits = (h @ cast_head.t()).float()
            lse = logits.logsumexp(1, keepdim=True)
            if part is None:
                target_logit = logits.gather(1, target)
            else:
                target = target - part.first_row
                is_here = (target >= 0) & (target < len(head))
                target, weight_here = target.clamp(0, len(head) - 1), weight * is_here
                lse, target_logit = whole_log_z(lse, logits.gather(1, target) * is_here, part.group)
            log_z[chunk_slice] = lse.squeeze(1)
            nll[chunk_slice] = (lse - target_logit).squeeze(1)
            if not (needs_hidden or needs_head):
                continue
            # d/dlogits of w · (lse − logit_target + z · lse²), computed in place
            grad = logits.sub_(lse).exp_().mul_(weight * (1 + 2 * z_loss * lse))
            grad.scatter_add_(1, target, -(weight if part is None else weight_here))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk_slice] = grad @ cast_head
            if grad_head is not None:
                for row in range(0, len(head), HEAD_GRAD_ROWS):  # no temporary of the head's size
                    rows = slice(row, row + HEAD_GRAD_ROWS)
                    grad_head[rows] += grad[:, rows].t() @ h
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        loss = (weights * (nll + z_loss * log_z.square())).sum()
        ctx.mark_non_differentiable(nll, log_z)
        return loss, nll, log_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden.mul_(scale) if grad_hidden is not None else None,
            grad_head.mul_(scale).to(ctx.head_dtype) if grad_head is not None else None,
            *[None] * 5,
        )


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    z_loss: float = Z_LOSS,
    chunk: int | None = None,
    part: VocabularyPart | None = None,
) -> TokenLoss:
    """Compute the weighted cross-entropy with z-loss of hidden states.

    hidden: float [N, D]. head: float [V, D], or the rows that `part` names. targets: int64 [N]. weights: float32 [N];
    tokens of weight 0 cost nothing, and the loss is a plain sum, so the weights carry the normalisation (1 / number of
    tokens in the global batch). chunk: tokens whose logits exist at one time, by default `loss_chunk_size`. With `part` a
    collective operation, whose gradient of `hidden` is to be summed over the processes.
    """
    chunk = chunk or loss_chunk_size(len(head) if part is None else part.max_rows, hidden.device.type)
    nonzero = weights.nonzero().squeeze(1)
    loss, nll, log_z = ChunkedCrossEntropy.apply(
        hidden[nonzero], head, targets[nonzero], weights[nonzero].float(), z_loss, chunk, part
    )
    zeros = torch.zeros(len(weights), dtype=torch.float32, device=hidden.device)
    return TokenLoss(loss, zeros.index_copy(0, nonzero, nll), zeros.index_copy(0, nonzero, log_z))


def cut_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, z_loss: float = Z_LOSS
) -> TokenLoss:
    """Compute the same with the kernels of cut cross-entropy (arXiv 2411.09009), which never store logits.

    For GPUs, with the package of its authors. Raises `BadInput` where it is not installed.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise BadInput(
            "cut_cross_entropy is not installed",
            where="recipe.loss",
            remedy="pip install 'open-chameleon[cut]', or use chunked",
        ) from None
    nonzero = weights.nonzero().squeeze(1)
    implementation = "cce" if hidden.device.type == "cuda" else "torch_compile"
    h, cast_head, target = hidden[nonzero], head.to(hidden.dtype), targets[nonzero]
    nll = linear_cross_entropy(h, cast_head, target, reduction="none", impl=implementation).float()
    log_z = nll + (h * cast_head[target]).float().sum(1)  # −log p = log Z − logit
    loss = (weights[nonzero].float() * (nll + z_loss * log_z.square())).sum()
    zeros = torch.zeros(len(weights), dtype=torch.float32, device=hidden.device)
    return TokenLoss(loss, zeros.index_copy(0, nonzero, nll.detach()), zeros.index_copy(0, nonzero, log_z.detach()))
