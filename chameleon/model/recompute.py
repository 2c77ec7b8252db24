"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Block

Checkpointing = Literal["none", "selective", "full"]

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""What `selective` keeps: results that are dear to compute (arXiv 2205.05198 keeps all but attention; here that too)."""


def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(block: Block, how: Checkpointing) -> None:
    """Has a block's activations computed again: all of them, or all but those of products and attention."""
    if how == "none":
        return
    more: dict[str, Any] = {}
    if how == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    plain = block.forward

    def forward(*inputs: Any, **named: Any) -> Any:  # a function, which torch.compile sees into, unlike a partial one
        return checkpoint(plain, *inputs, use_reentrant=False, **more, **named)

    block.forward = forward  # type: ignore[method-assign]


def products_per_token(config: ModelConfig) -> int:
    """Numbers a token that `selective` keeps of one block: q, k, v, attention, its product, gate, up and down."""
    qkv = (config.heads + 2 * config.kv_heads) * config.head_width
    return qkv + 3 * config.width + 2 * config.ffn_width
