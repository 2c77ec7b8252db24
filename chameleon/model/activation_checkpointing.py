"""Activation checkpointing: activations are recomputed in the backward pass instead of stored (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Block

ActivationCheckpointing = Literal["none", "selective", "full"]

SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""Operations whose results `selective` stores: those that are expensive to compute. (arXiv 2205.05198 recomputes
attention; here its result is stored too.)"""


def selective_policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(block: Block, mode: ActivationCheckpointing) -> None:
    """Recompute a block's activations in the backward pass: all of them, or all but the results of `SAVED_OPS`."""
    if mode == "none":
        return
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, selective_policy)
    plain_forward = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:  # torch.compile traces into a function, but not into a partial
        return checkpoint(plain_forward, *args, use_reentrant=False, **options, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


def saved_activations_per_token(config: ModelConfig) -> int:
    """Return the number of values a token that `selective` stores of one block.

    They are q, k and v, attention, its projection, gate, up and down.
    """
    qkv = (config.heads + 2 * config.kv_heads) * config.head_width
    return qkv + 3 * config.width + 2 * config.ffn_width
