"""AdamW as the paper sets it, Muon beside it, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chameleon.errors import BadInput


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule. Defaults are the paper's for pretraining (arXiv 2405.09818, 2.3)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: the matrices of the blocks by Muon (arXiv 2502.16982, whose scale takes AdamW's rate), the rest by AdamW."""

    rate: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    """On matrices only: norms, biases and codebooks do not decay."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    warmup: int = 4000
    """Steps of linear warm-up."""
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    final: float = 0.01
    """Rate at the last step, as a share of the peak."""


def rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate at `step` (from 0) of `steps`: linear warm-up, then exponential or cosine decay to `final`."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    if config.schedule == "constant":
        return config.rate
    if config.schedule == "exponential":
        return config.rate * config.final**progress
    return config.rate * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, and not to codebooks or the norms of heads."""
    return parameter.ndim >= 2 and "_norm." not in name and not name.startswith("quantize.")


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimisers over all trainable parameters of `module`: AdamW, and before it Muon where the config wants it.

    Muon takes the matrices of `module.blocks`, each as it is stored (q, k, v are one, gate and up another); embedding,
    head, norms and biases stay with AdamW. Raises `BadInput` where Muon is wanted and there are no blocks.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = [n for n, p in named.items() if config.kind == "muon" and n.startswith("blocks.") and decays(n, p)]
    result: list[torch.optim.Optimizer] = []
    if config.kind == "muon" and not hidden:
        raise BadInput("muon is for Transformers", where="recipe.optimizer.kind", remedy="use adamw")
    if hidden:
        result.append(
            torch.optim.Muon(
                [named.pop(name) for name in hidden],
                lr=config.rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": same, "weight_decay": config.weight_decay if which else 0.0}
        for which in (True, False)
        for same in by_mesh(p for n, p in named.items() if decays(n, p) is which)
    ]
    betas = (config.betas[0], config.betas[1])
    result.append(torch.optim.AdamW(groups, lr=config.rate, betas=betas, eps=config.eps, fused=True))
    return result


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, of which a device may hold a part; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_mesh(tensors: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that lie on the same devices together, since operations on many at once need that."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm over all gradients, on all devices: float32 scalar."""
    grads = [[p.grad for p in same if p.grad is not None] for same in by_mesh(parameters)]
    norms = [whole(nn.utils.get_total_norm(same)).float() for same in grads if same]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Shrinks gradients of the given norm to the largest one allowed; 0 allows all."""
    for same in by_mesh(parameters) if largest else []:
        nn.utils.clip_grads_with_norm_(same, largest, norm)
