"""AdamW as the paper uses it, Muon beside it, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chameleon.errors import BadInput, check_least
from chameleon.train.muon import Muon
from chameleon.train.sharded_tensors import local_part, num_shards

HIDDEN_PREFIXES = ("blocks.", "encoder.", "decoder.")
OUTER_LAYERS = (".conv_in.", ".conv_out.")


@dataclass
class OptimizerConfig:
    """The optimiser and its learning-rate schedule. Defaults: pretraining in arXiv 2405.09818, section 2.3."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices and kernels of hidden layers (arXiv 2502.16982, scaled to use AdamW's lr), AdamW for
    the rest."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    """On matrices only; norms, biases and codebooks have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 does not clip."""
    warmup_steps: int = 4000
    """Steps of linear warm-up."""
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    min_lr_ratio: float = 0.01
    """Learning rate at the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "max_grad_norm", "warmup_steps", "min_lr_ratio"):
            check_least(getattr(self, name), 0, f"optimizer.{name}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"optimizer.betas is {list(self.betas)}, expected numbers from 0 to below 1")
        if self.schedule == "exponential" and not self.min_lr_ratio:
            raise BadInput("optimizer.min_lr_ratio is 0, which an exponential schedule never reaches", remedy="use 0.01")

    def warn_of_warmup(self, max_steps: int) -> None:
        """Warn where a run ends before the learning rate has reached its peak."""
        if max_steps < self.warmup_steps:
            warnings.warn(
                f"the run ends during warm-up: optimizer.warmup_steps is {self.warmup_steps}, run.max_steps {max_steps}",
                stacklevel=2,
            )


def lr_at(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate at `step` (from 0): linear warm-up, then decay to `min_lr_ratio` at `max_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "exponential":
        return config.lr * config.min_lr_ratio**progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices and kernels, but not to codebooks or the norms of heads."""
    return parameter.ndim >= 2 and "_norm." not in name and not name.startswith("quantize.")


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix or kernel of a hidden layer, which Muon can train."""
    is_outer = any(layer in f".{name}" for layer in OUTER_LAYERS)
    return name.startswith(HIDDEN_PREFIXES) and not is_outer and has_weight_decay(name, parameter)


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers over all trainable parameters of `module`: AdamW, preceded by Muon where the config says so.

    Muon takes the matrices of a Transformer's blocks as they are stored (q, k, v are one, gate and up another), and the
    kernels of a VQGAN's encoder and decoder but for the first and last; embedding, head, codebook, norms and biases stay
    with AdamW. Raises `BadInput` for Muon where there are none.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    muon_names = [n for n, p in named.items() if config.kind == "muon" and is_hidden_matrix(n, p)]
    optimizers: list[torch.optim.Optimizer] = []
    if config.kind == "muon" and not muon_names:
        raise BadInput("there is no hidden layer for muon", where="recipe.optimizer.kind", remedy="use adamw")
    if muon_names:
        muon_parameters = [named.pop(name) for name in muon_names]
        optimizers.append(Muon(muon_parameters, lr=config.lr, weight_decay=config.weight_decay))
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0}
        for decay in (True, False)
        for parameters in group_by_mesh(p for n, p in named.items() if has_weight_decay(n, p) is decay)
    ]
    betas = (config.betas[0], config.betas[1])
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True))
    return optimizers


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def group_by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by their device mesh, since fused operations on several need the same one."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def local_grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this process's part of each gradient that there is."""
    return [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local_grad_square(parameters: Iterable[nn.Parameter], world_size: int) -> Tensor:
    """Return this process's share of the squared norm over all gradients: a float64 scalar.

    The sum of the shares of all processes is the squared norm. A part of a gradient that several of them hold counts in
    equal shares.
    """
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(num_shards(parameter), []).append(parameter)
    share: Tensor | None = None
    for shards, group in groups.items():
        grads = local_grads(group)
        if grads:
            square = nn.utils.get_total_norm(grads).double().square() * shards / world_size
            share = square if share is None else share + square
    return torch.zeros((), dtype=torch.float64) if share is None else share


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that scales gradients of the given norm down to `max_norm`; 0 does not clip."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)


def scale_grads(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar tensor."""
    grads = local_grads(parameters)
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))


def step_unless(skip: Tensor, optimizer: Any) -> None:
    """Make a step, or change nothing where the float32 scalar `skip` is 1: decided on the device, without waiting for it.

    optimizer: Lightning's wrapper. Fused AdamW has this for loss scaling (`found_inf`); Muon follows it.
    """
    optimizer.optimizer.found_inf = skip
    optimizer.step()
