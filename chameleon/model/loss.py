"""Cross-entropy with z-loss over a large vocabulary, in chunks.

loss = Σ_t w_t · (−log p(target_t) + z · log²Z_t). Logits exist for one chunk of rows at a time: their gradient is taken
at once and only its products with the head and the hidden states are kept (the arrangement of cut cross-entropy,
arXiv 2411.09009, without its kernels). z-loss as in PaLM (arXiv 2204.02311), z = 1e-5 in arXiv 2405.09818, 2.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chameleon.errors import BadInput

Z_LOSS = 1e-5
LOGITS = 2**23  # that exist at one time, at most; 512 rows are enough to keep products fast
BLOCK = 8192  # ids whose part of the head's gradient is computed at one time


class TokenLoss(NamedTuple):
    """The loss and, for the log, what each row gave."""

    loss: Tensor
    """Scalar with gradient."""
    nll: Tensor
    """float32 [N]: −log p(target); 0 where the weight is 0."""
    log_z: Tensor
    """float32 [N]; 0 where the weight is 0."""


def rows_at_once(vocabulary: int) -> int:
    """Rows whose logits exist at one time."""
    return min(512, max(128, LOGITS // vocabulary))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, chunk by chunk; backward only scales them, in place: it goes back once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        low_head = head.to(hidden.dtype)
        nll, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h, target, weight = hidden[part], targets[part].unsqueeze(1), weights[part].unsqueeze(1)
            logits = (h @ low_head.t()).float()
            lse = logits.logsumexp(1, keepdim=True)
            log_z[part] = lse.squeeze(1)
            nll[part] = (lse - logits.gather(1, target)).squeeze(1)
            if not (needs_hidden or needs_head):
                continue
            # d/dlogits of w · (lse − logit_target + z · lse²), into the same memory
            grad = logits.sub_(lse).exp_().mul_(weight * (1 + 2 * z_loss * lse))
            grad.scatter_add_(1, target, -weight)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ low_head
            if grad_head is not None:
                for block in range(0, len(head), BLOCK):  # so that the product needs no memory of the head's size
                    grad_head[block : block + BLOCK] += grad[:, block : block + BLOCK].t() @ h
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
            None,
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, z_loss: float = Z_LOSS, chunk: int | None = None
) -> TokenLoss:
    """Weighted cross-entropy with z-loss of hidden states against the head.

    hidden: float [N, D]. head: float [V, D]. targets: int64 [N]. weights: float32 [N]; rows of weight 0 cost nothing,
    and the loss is a plain sum, so weights carry the normalisation (1 / number of tokens in the whole batch). chunk: rows
    at one time, by default `rows_at_once`.
    """
    chunk = chunk or rows_at_once(len(head))
    live = weights.nonzero().squeeze(1)
    loss, nll, log_z = ChunkedCrossEntropy.apply(hidden[live], head, targets[live], weights[live].float(), z_loss, chunk)
    return TokenLoss(
        loss,
        torch.zeros(len(weights), dtype=torch.float32, device=hidden.device).index_copy(0, live, nll),
        torch.zeros(len(weights), dtype=torch.float32, device=hidden.device).index_copy(0, live, log_z),
    )


def cut_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, z_loss: float = Z_LOSS
) -> TokenLoss:
    """The same by the kernels of cut cross-entropy (arXiv 2411.09009), which never hold logits in memory at all.

    On GPUs, by the package of its authors. Raises `BadInput` where that is missing.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise BadInput(
            "cut_cross_entropy is not installed",
            where="recipe.loss",
            remedy="pip install 'open-chameleon[cut]', or use chunked",
        ) from None
    live = weights.nonzero().squeeze(1)
    implementation = "cce" if hidden.device.type == "cuda" else "torch_compile"
    rows, low_head, chosen = hidden[live], head.to(hidden.dtype), targets[live]
    nll = linear_cross_entropy(rows, low_head, chosen, reduction="none", impl=implementation).float()
    log_z = nll + (rows * low_head[chosen]).float().sum(1)  # −log p = log Z − logit
    loss = (weights[live].float() * (nll + z_loss * log_z.square())).sum()
    empty = torch.zeros(len(weights), dtype=torch.float32, device=hidden.device)
    return TokenLoss(loss, empty.index_copy(0, live, nll.detach()), empty.index_copy(0, live, log_z.detach()))
