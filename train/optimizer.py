"""AdamW as the paper sets it, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Defaults are the paper's for pretraining (RECIPE, optimisation, 2.3)."""

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


def build_adamw(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `modules`; only tensors of two or more dimensions decay."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
