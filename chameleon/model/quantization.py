"""Inference-only weight formats: layouts of a model's matrices that are faster or smaller than plain ones.

* packed: the memory layout of oneDNN's kernels, on CPUs, in bfloat16 or float32; lossless;
* float16: float16 weights in FBGEMM's layout, on CPUs; inputs, outputs and sums are float32;
* int8: symmetric, one scale a row. With float32 inputs on CPUs that have FBGEMM, these are quantised too, to 8 bits and one
  scale per token, and products are integer ones; else inputs stay as they are, and torchao quantises the weights;
* int4: asymmetric, a scale and a zero point for each 32 columns of a row, chosen by HQQ, by torchao; inputs stay.

Norms, embedding and, with int4, the head stay wider. `packed`, `float16` and the integer products of `int8` ship with
PyTorch. Which format is fastest depends on the processor: see `chameleon.model.fastest_format`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
import weakref
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from chameleon.device import has_fbgemm, supports_packed_bfloat16
from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer

WeightFormat = Literal["plain", "packed", "float16", "int8", "int4"]
INT4_GROUP_SIZE = 32
"""Columns of a row that share a scale in int4."""
MAX_INT8_KERNEL_TOKENS = 32
"""Up to this many tokens the int8 kernel of bfloat16 inputs, which converts each weight as it reads it, is faster than
converting the whole matrix first."""
MAX_FLOAT16 = torch.finfo(torch.float16).max
MAX_INT8 = 127
MIN_LARGEST_INPUT = 1e-30
"""Inputs of a token that are all smaller count as 0."""
FIXED_ROWS = 8
BLOCK_MATRICES = ("qkv", "out", "gate_up", "down")


class OpaqueLinear(nn.Module):
    """Base class of layers whose weights are no tensors that PyTorch's compiler can read: it sees one operation.

    Compiled code gets the layer's number as an input, like a weight, so that it is the same for all layers of a shape and
    in every process, and can be kept on disk.
    """

    layer_number: Tensor
    """int64 [1]."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        layer_number = next(LAYER_NUMBERS)
        LAYERS[layer_number] = self
        self.register_buffer("layer_number", torch.tensor([layer_number]), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """Multiply x [..., columns] with the matrix: [..., rows]."""
        raise NotImplementedError

    def opaque_product(self, x: Tensor) -> Tensor:
        """The same, as one operation where it is compiled."""
        if torch.compiler.is_compiling():
            return torch.ops.chameleon.opaque_product(x, self.layer_number, self.rows)
        return self.product(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.opaque_product(x)


LAYERS: weakref.WeakValueDictionary[int, OpaqueLinear] = weakref.WeakValueDictionary()
LAYER_NUMBERS = itertools.count()
OPERATIONS = library.Library("chameleon", "DEF")
OPERATIONS.define("opaque_product(Tensor x, Tensor layer, int rows) -> Tensor")
OPERATIONS.impl("opaque_product", lambda x, layer, rows: LAYERS[layer.item()].product(x), "CPU")
OPERATIONS.impl("opaque_product", lambda x, layer, rows: x.new_empty(*x.shape[:-1], rows), "Meta")


class PackedLinear(OpaqueLinear):
    """A linear layer whose matrix is in oneDNN's own layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(len(weight))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix in plain layout."""
        return self.packed.to_dense()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class QuantizedLinear(nn.Module):
    """Base class of the quantised layers, which cannot be saved."""

    def _save_to_state_dict(self, *_: Any) -> None:
        raise BadInput(
            "quantised weights are for inference only", where="weights", remedy="load the bundle as plain to save it"
        )


class Float16Linear(QuantizedLinear, OpaqueLinear):
    """A linear layer of float16 weights in FBGEMM's layout; float32 in and out.

    It sums in one order, so that a token's output is the same in any batch.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(len(weight))
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix, float32."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8ProductLinear(QuantizedLinear, OpaqueLinear):
    """A linear layer of int8 weights and integer products by FBGEMM; float32 in and out.

    Each token has a scale of its own, and integer sums are exact, so that its output is the same in any batch.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(len(weight))
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / MAX_INT8
        self.packed = pack_int8(weight, scales)
        self.max_input = max_int8_input()

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix as it is multiplied, float32."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    def product(self, x: Tensor) -> Tensor:
        """x within [-1, 1]."""
        return int8_product(x, self.packed, self.max_input)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=MIN_LARGEST_INPUT)
        return self.opaque_product(x / largest).mul_(largest)


def pack_int8(weight: Tensor, scales: Tensor) -> Any:
    """Return the matrix [out, in], quantised with a scale for each row, in FBGEMM's layout."""
    zero_points = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated.*")  # PyTorch 2.14: its tensors of quantised dtypes will go
        quantized = torch.quantize_per_channel(weight, scales.double(), zero_points, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def int8_product(x: Tensor, packed: Any, max_input: int) -> Tensor:
    """Return the product of x [..., in], within [-1, 1], quantised to −max_input … max_input, with packed int8 weights."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / max_input, max_input + 1, packed)


@functools.cache
def max_int8_input() -> int:
    """Return the largest quantised input for which this processor's integer sums are exact: 127, or 63 in 7 bits.

    Without VNNI instructions, the sum of two products of 8 bits each saturates at 16 bits.
    """
    extreme = torch.full((1, 256), float(MAX_INT8))
    packed = pack_int8(extreme, torch.ones(1))
    for max_input in (MAX_INT8, MAX_INT8 // 2):
        if torch.allclose(int8_product(torch.ones(1, 256), packed, max_input), extreme.sum()):
            break
    return max_input


class Int8Linear(QuantizedLinear):
    """A linear layer of int8 weights on a CPU, whose inputs stay in bfloat16."""

    quantized: Tensor
    scales: Tensor

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

    quantized: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        tensor = quantize_with_torchao(weight, 4)
        self.register_buffer("quantized", tensor.qdata, persistent=False)
        self.register_buffer("scales", tensor.scale_and_zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output = torch._weight_int4pack_mm_for_cpu(flat, self.quantized, INT4_GROUP_SIZE, self.scales)
        return output.unflatten(0, x.shape[:-1])


class FixedRowsLinear(nn.Module):
    """A linear layer that is always given `FIXED_ROWS` tokens at a time, so that a token's output is the same in any batch.

    Kernels may sum in an order that depends on the number of rows; the row that a token has among them does not matter.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        weight: Any = self.layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        padded = F.pad(flat, (0, 0, 0, -len(flat) % FIXED_ROWS))
        outputs = [self.layer(rows.clone()) for rows in padded.split(FIXED_ROWS)]  # memory is aligned alike
        return torch.cat(outputs)[: len(flat)].unflatten(0, x.shape[:-1])


def with_exact_products(layer: nn.Module) -> nn.Module:
    """Return a layer whose products of a token are the same in any batch: itself where its kernel is made so."""
    return layer if isinstance(layer, (Float16Linear, Int8ProductLinear)) else FixedRowsLinear(layer)


def make_exact(model: Transformer) -> None:
    """Make the outputs of a token the same in any batch, in place."""
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name in BLOCK_MATRICES:
                if hasattr(part, name):
                    setattr(part, name, with_exact_products(getattr(part, name)))


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
    rows, columns = weight.shape
    if weight_format == "int4" and (rows % 16 or columns % INT4_GROUP_SIZE):
        weight_format = "int8"  # a slice of the head
    if weight_format == "plain":
        return plain_linear(weight)
    check_weight_format(weight_format, weight.dtype, weight.device)
    if weight.device.type != "cpu":
        layer = plain_linear(weight)
        quantized = quantize_with_torchao(weight, 8 if weight_format == "int8" else 4)
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        return layer
    if weight_format == "packed":
        return PackedLinear(weight)
    if weight_format == "float16":
        check_float16_range(weight)
        return Float16Linear(weight)
    if weight_format == "int8":
        return Int8ProductLinear(weight) if weight.dtype == torch.float32 else Int8Linear(weight)
    return Int4Linear(weight)


def check_weight_format(weight_format: WeightFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `BadInput` where a weight format other than plain does not go with the dtype, device or processor."""
    on_cpu = device.type == "cpu"
    if not on_cpu and weight_format in ("packed", "float16"):
        raise BadInput(f"{weight_format} weights are for CPUs", where="weights", remedy="use plain, int8 or int4")
    dtypes = {
        "packed": (torch.bfloat16, torch.float32),
        "float16": (torch.float32,),
        "int8": (torch.bfloat16, torch.float32) if on_cpu and has_fbgemm() else (torch.bfloat16,),
        "int4": (torch.bfloat16,),
    }[weight_format]
    if dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadInput(f"{weight_format} weights need dtype {names}, not {dtype}", where="weights")
    if weight_format == "packed" and dtype == torch.bfloat16 and not supports_packed_bfloat16():
        raise BadInput("this processor does not support packed bfloat16", where="weights", remedy="use float16 or int8")
    if weight_format == "float16" and not has_fbgemm():
        raise BadInput("this build of PyTorch has no FBGEMM", where="weights", remedy="use plain or packed")


def fits_float16(model: Transformer) -> bool:
    """Return whether no matrix of the model has a weight that is too large for float16."""
    matrices = (p for name, p in model.named_parameters() if p.ndim == 2 and "_norm." not in name)
    return all(float(matrix.abs().max()) <= MAX_FLOAT16 for matrix in matrices)


def check_float16_range(weight: Tensor) -> None:
    """Raise `BadInput` where a weight is too large for float16."""
    largest = float(weight.abs().max())
    if not largest <= MAX_FLOAT16:
        raise BadInput(f"a weight of {largest:.3g} exceeds float16", where="weights", remedy="use packed or plain")


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
