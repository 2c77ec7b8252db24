"""Inference-only weight formats: layouts of a model's matrices that are faster or smaller than plain ones.

* packed: bfloat16 in the memory layout of oneDNN's kernels, on CPUs; lossless;
* int8: symmetric, one scale a row; int4: asymmetric, a scale and a zero point for each 32 columns of a row, chosen by
  HQQ; both quantised by torchao, activations stay as they are. Norms, embedding and, with int4, the head stay wider.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chameleon.device import supports_packed_bfloat16
from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer

WeightFormat = Literal["plain", "packed", "int8", "int4"]
INT4_GROUP_SIZE = 32
"""Columns of a row that share a scale in int4."""
MAX_INT8_KERNEL_TOKENS = 32
"""Up to this many tokens the int8 kernel, which converts each weight as it reads it, is faster than converting the whole
matrix first."""
BLOCK_MATRICES = ("qkv", "out", "gate_up", "down")


class PackedLinear(nn.Module):
    """A linear layer whose matrix is in oneDNN's own layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix in plain layout."""
        return self.packed.to_dense()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class QuantizedLinear(nn.Module):
    """Base class of the quantised layers, which cannot be saved."""

    quantized: Tensor
    scales: Tensor

    def _save_to_state_dict(self, *_: Any) -> None:
        raise BadInput(
            "quantised weights are for inference only", where="weights", remedy="load the bundle as plain to save it"
        )


class Int8Linear(QuantizedLinear):
    """A linear layer of int8 weights on a CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        tensor = quantize_with_torchao(weight, 8)
        self.register_buffer("quantized", tensor.qdata, persistent=False)
        self.register_buffer("scales", tensor.scale.flatten().to(weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= MAX_INT8_KERNEL_TOKENS:
            output = torch._weight_int8pack_mm(flat, self.quantized, self.scales)
        else:
            output = F.linear(flat, self.quantized.to(x.dtype)) * self.scales
        return output.unflatten(0, x.shape[:-1])


class Int4Linear(QuantizedLinear):
    """A linear layer of int4 weights on a CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        tensor = quantize_with_torchao(weight, 4)
        self.register_buffer("quantized", tensor.qdata, persistent=False)
        self.register_buffer("scales", tensor.scale_and_zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output = torch._weight_int4pack_mm_for_cpu(flat, self.quantized, INT4_GROUP_SIZE, self.scales)
        return output.unflatten(0, x.shape[:-1])


def quantize_with_torchao(weight: Tensor, bits: int) -> Any:
    """Return the matrix as a quantised tensor of torchao. Raise `BadInput` where torchao is not installed."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # importing torchao 0.18 logs a warning there
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise BadInput(
            "torchao is not installed", where="weights", remedy="pip install 'open-chameleon[quantize]'"
        ) from None
    layer = plain_linear(weight)
    if bits == 8:
        quantize_(layer, Int8WeightOnlyConfig())
    elif weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

        return Int4OpaqueTensor.from_hp(weight, [1, INT4_GROUP_SIZE], Int4ChooseQParamsAlgorithm.HQQ)
    else:
        quantize_(layer, Int4WeightOnlyConfig(group_size=INT4_GROUP_SIZE))
    return layer.weight


def plain_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer that shares this matrix."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def make_linear(weight: Tensor, weight_format: WeightFormat) -> nn.Module:
    """Return a linear layer of the matrix [out, in] in a weight format. Raise `BadInput` where that is not possible."""
    if weight_format == "plain":
        return plain_linear(weight)
    rows, columns = weight.shape
    if weight_format == "int4" and (rows % 16 or columns % INT4_GROUP_SIZE):
        weight_format = "int8"  # a slice of the head
    if weight.dtype != torch.bfloat16:
        raise BadInput(f"{weight_format} weights need dtype bfloat16, not {weight.dtype}", where="weights")
    if weight.device.type != "cpu":
        if weight_format == "packed":
            raise BadInput("packed weights are for CPUs", where="weights", remedy="use plain, int8 or int4")
        layer = plain_linear(weight)
        quantized = quantize_with_torchao(weight, 8 if weight_format == "int8" else 4)
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        return layer
    if weight_format == "packed" and not supports_packed_bfloat16():
        raise BadInput("this processor does not support packed bfloat16", where="weights", remedy="use plain or int8")
    return {"packed": PackedLinear, "int8": Int8Linear, "int4": Int4Linear}[weight_format](weight)


def convert_weights(model: Transformer, weight_format: WeightFormat) -> None:
    """Convert the matrices of the blocks to a weight format, in place, one after the other.

    The head stays as it is, since the decoder slices it. Raises `BadInput` for an unknown or unsupported format.
    """
    if weight_format not in get_args(WeightFormat):
        raise BadInput(
            f"no weight format {weight_format!r}", where="weights", remedy=f"use {', '.join(get_args(WeightFormat))}"
        )
    if weight_format == "plain":
        return
    if weight_format == "int4" and model.config.width % INT4_GROUP_SIZE:
        raise BadInput(f"int4 needs a width divisible by {INT4_GROUP_SIZE}", where="weights", remedy="use int8")
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name in BLOCK_MATRICES:
                if hasattr(part, name):
                    setattr(part, name, make_linear(getattr(part, name).weight.detach(), weight_format))
