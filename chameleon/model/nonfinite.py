"""Finds the layer in which NaN or infinite values first appear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chameleon.model.transformer import Transformer


@torch.no_grad()
def first_nonfinite_layer(model: Transformer, token_ids: Tensor) -> str | None:
    """Return the name of the first module whose output for token ids int64 [1, T] is not finite; None if all are finite.

    Modules are looked at in order of execution: embed, then of each block its attention, feed-forward layer and output,
    norm, head. A forward pass without KV cache is run for it.
    """
    nonfinite: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not bool(output.isfinite().all()):
                nonfinite.append(name)

        handles.append(module.register_forward_hook(hook))

    watch("embed", model.embed)
    for layer, block in enumerate(model.blocks):
        watch(f"blocks.{layer}.attention", block.attention)  # type: ignore[arg-type]
        watch(f"blocks.{layer}.ffn", block.ffn)  # type: ignore[arg-type]
        watch(f"blocks.{layer}", block)
    watch("norm", model.norm)
    try:
        hidden = model(token_ids)
    finally:
        for handle in handles:
            handle.remove()
    if nonfinite:
        return nonfinite[0]
    return None if bool(model.logits(hidden).isfinite().all()) else "head"
