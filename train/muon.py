"""Muon: momentum whose matrices are orthogonalised (arXiv 2502.16982; Jordan et al., Muon, 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chameleon.device import fast_bfloat16

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MIN_NORM = 1e-7
MAX_TOGETHER = 2**24
"""Elements of the matrices that are orthogonalised together, at most (64 MiB in float32)."""
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled, so that both use the same learning rate."""


@torch.no_grad()
def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return approximately U·Vᵀ of the singular value decomposition of each matrix [..., m, n], in `dtype`.

    Five Newton–Schulz iterations of degree 5, after which singular values lie between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=MIN_NORM)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def groups_of_one_shape(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters that can be orthogonalised together: small products one by one would leave a GPU idle."""
    by_shape: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        is_alone = isinstance(parameter, DTensor)
        key = id(parameter) if is_alone else (parameter.shape, parameter.device, parameter.dtype)
        by_shape.setdefault(key, []).append(parameter)
    for group in by_shape.values():
        size = max(1, MAX_TOGETHER // group[0].numel())
        for start in range(0, len(group), size):
            yield group[start : start + size]


def joined(tensors: list[Tensor]) -> Tensor:
    """Return one tensor as it is, several stacked."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def parts(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """Return what `joined` was given."""
    return [tensor] if count == 1 else tensor.unbind()


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
            for parameters in groups_of_one_shape(p for p in group["params"] if p.grad is not None):
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        buffers = [self.momentum_buffer(parameter) for parameter in parameters]
        gradient, momentum = joined([p.grad for p in parameters if p.grad is not None]), joined(buffers)
        keep = torch.ones((), device=gradient.device)
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            gradient = torch.where(keep.bool(), gradient, momentum)  # which then stays as it is
        momentum = momentum.lerp(gradient, 1 - group["momentum"])
        matrices = gradient.lerp(momentum, group["momentum"]).flatten(gradient.ndim - parameters[0].ndim + 1)
        dtype = torch.bfloat16 if fast_bfloat16(gradient.device) else torch.float32
        direction = orthogonalize(matrices, dtype).view_as(gradient).to(gradient.dtype)
        lr, scale = group["lr"] * keep, ADAMW_RMS * math.sqrt(max(matrices.shape[-2:]))
        factor = 1 - lr * group["weight_decay"]
        each = zip(parameters, buffers, *(parts(of, len(parameters)) for of in (momentum, direction)), strict=True)
        for parameter, buffer, new_momentum, own_direction in each:
            buffer.copy_(new_momentum)
            parameter.mul_(factor).addcmul_(own_direction, lr, value=-scale)

    def momentum_buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
