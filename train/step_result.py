"""What the host learns of a training step, without making the device wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepResult:
    """What all processes know of a step once the host has read it."""

    step: int
    batch: int
    """Index of its batch."""
    loss: float = 0.0
    grad_norm: float = 0.0
    values: list[float] = field(default_factory=list)
    """Whatever else the module wants to know of each step."""


class HostCopy:
    """A copy of a small tensor to the host that a GPU makes when it gets there."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.event = values, None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[float]:
        """Return the values, after waiting for the copy alone."""
        if self.event is not None:
            self.event.synchronize()
        values: list[float] = self.values.numpy().tolist()
        return values
