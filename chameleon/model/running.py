"""Forms of a model's matrices that are only for running it: faster, or smaller, than the plain ones.

* packed: bfloat16 in the order in which oneDNN's kernels read it, on CPUs; nothing is lost;
* int8: symmetric, one scale a row; int4: asymmetric, a scale and a zero point for each 32 columns of a row, chosen by
  HQQ; both quantised by torchao, activations stay as they are. Norms, embedding and, with int4, the head stay wider.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer

WeightForm = Literal["plain", "packed", "int8", "int4"]
FORMS = ("plain", "packed", "int8", "int4")
GROUP = 32
"""Columns of a row that share a scale in int4."""
FEW = 32
"""Up to so many ids at once, kernels that widen each weight as they read it are faster than widening a matrix first."""
MATRICES = ("qkv", "out", "gate_up", "down")


def packs() -> bool:
    """Whether this machine's oneDNN knows packed bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """A linear layer whose matrix oneDNN has put in an order of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    @property
    def weight(self) -> Tensor:
        """The matrix in its plain order, a copy."""
        return self.packed.to_dense()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class QuantizedLinear(nn.Module):
    """What the quantised forms share."""

    numbers: Tensor
    scales: Tensor

    def _save_to_state_dict(self, *_: Any) -> None:
        raise BadInput(
            "quantised weights are for running alone", where="weights", remedy="load the bundle as plain to save it"
        )


class Int8Linear(QuantizedLinear):
    """A linear layer of int8 weights on a CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantized = quantized_by_torchao(weight, 8)
        self.register_buffer("numbers", quantized.qdata, persistent=False)
        self.register_buffer("scales", quantized.scale.flatten().to(weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= FEW:
            found = torch._weight_int8pack_mm(flat, self.numbers, self.scales)
        else:
            found = F.linear(flat, self.numbers.to(x.dtype)) * self.scales
        return found.unflatten(0, x.shape[:-1])


class Int4Linear(QuantizedLinear):
    """A linear layer of int4 weights on a CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantized = quantized_by_torchao(weight, 4)
        self.register_buffer("numbers", quantized.qdata, persistent=False)
        self.register_buffer("scales", quantized.scale_and_zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch._weight_int4pack_mm_for_cpu(flat, self.numbers, GROUP, self.scales).unflatten(0, x.shape[:-1])


def quantized_by_torchao(weight: Tensor, bits: int) -> Any:
    """The matrix as a tensor of torchao's. Raises `BadInput` where torchao is missing."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it warns of what torchao 0.18 does when imported
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise BadInput(
            "torchao is not installed", where="weights", remedy="pip install 'open-chameleon[quantize]'"
        ) from None
    layer = plain(weight)
    if bits == 8:
        quantize_(layer, Int8WeightOnlyConfig())
    elif weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

        return Int4OpaqueTensor.from_hp(weight, [1, GROUP], Int4ChooseQParamsAlgorithm.HQQ)
    else:
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
    return layer.weight


def plain(weight: Tensor) -> nn.Linear:
    """A linear layer with this very matrix."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def prepared(weight: Tensor, form: WeightForm) -> nn.Module:
    """A linear layer of the matrix [out, in] in a form. Raises `BadInput` where the matrix cannot have it."""
    if form == "plain":
        return plain(weight)
    rows, columns = weight.shape
    if form == "int4" and (rows % 16 or columns % GROUP):
        form = "int8"  # a slice of the head
    if weight.dtype != torch.bfloat16:
        raise BadInput(f"{form} weights want bfloat16 beside them, not {weight.dtype}", where="weights", remedy="set dtype")
    if weight.device.type != "cpu":
        if form == "packed":
            raise BadInput("packed weights are for CPUs", where="weights", remedy="use plain, int8 or int4")
        layer = plain(weight)
        layer.weight = nn.Parameter(quantized_by_torchao(weight, 8 if form == "int8" else 4), requires_grad=False)
        return layer
    if form == "packed" and not packs():
        raise BadInput("this processor does not pack bfloat16", where="weights", remedy="use plain, int8 or int4")
    return {"packed": PackedLinear, "int8": Int8Linear, "int4": Int4Linear}[form](weight)


def prepare(model: Transformer, form: WeightForm) -> None:
    """Puts the matrices of the blocks into a form, in place, one after the other. The head stays; engines slice it."""
    if form not in FORMS:
        raise BadInput(f"no form {form!r}", where="weights", remedy=f"use {', '.join(FORMS)}")
    if form == "plain":
        return
    if form == "int4" and model.config.width % GROUP:
        raise BadInput(f"int4 wants a width that {GROUP} divides", where="weights", remedy="use int8")
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name in MATRICES:
                if hasattr(part, name):
                    setattr(part, name, prepared(getattr(part, name).weight.detach(), form))
