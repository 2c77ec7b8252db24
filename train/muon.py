"""Muon: momentum whose matrices are orthogonalised (arXiv 2502.16982; Jordan et al., Muon, 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chameleon.device import fast_bfloat16

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MIN_NORM = 1e-7
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled, so that both use the same learning rate."""


@torch.no_grad()
def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return approximately U·Vᵀ of the singular value decomposition of `matrix` [m, n], in `dtype`.

    Five Newton–Schulz iterations of degree 5, after which singular values lie between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.t() if is_tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=MIN_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Kernels count as matrices [out, everything else].

    `torch.optim.Muon` orthogonalises in bfloat16 on every device; this one in float32 where bfloat16 is slow.
    """

    found_inf: Tensor | None = None
    """float32 scalar: 1 where a step is to change nothing, as in PyTorch's fused optimisers."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)
        return loss

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum, keep = state["momentum_buffer"], torch.ones((), device=gradient.device)
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            gradient = torch.where(keep.bool(), gradient, momentum)  # which then stays as it is
        momentum.lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(momentum, group["momentum"]).flatten(1)
        dtype = torch.bfloat16 if fast_bfloat16(matrix.device) else torch.float32
        direction = orthogonalize(matrix, dtype).view_as(parameter).to(parameter.dtype)
        lr = group["lr"] * keep
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcmul_(direction, lr, value=-ADAMW_RMS * math.sqrt(max(matrix.shape)))
