"""Distributing a model over devices: FSDP2, tensor parallelism, activation checkpointing, compiled blocks.

All of it is applied from outside, block by block; the model itself knows nothing of it. Parameters start on `meta` and get
their values once they are sharded, so that no process ever holds the full model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from chameleon.compiled_code import keep_compiled_code
from chameleon.errors import BadInput
from chameleon.model.activation_checkpointing import ActivationCheckpointing, apply_activation_checkpointing
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Block, Transformer
from chameleon.train.objective import Objective
from chameleon.train.sharded_tensors import Box, local_box, local_part


class QKNormParallel(ParallelStyle):
    """QK-norm of the heads on a device: their own rows of the weights, or the one row that serves all heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard_parameters(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for key, value in list(part.named_parameters(recurse=False)):
                placement = Shard(0) if len(value) > 1 else Replicate()
                part.register_parameter(key, nn.Parameter(distribute_tensor(value, mesh, [placement])))

        def wrap_input(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Shard(2)])  # [B, T, heads of this device, C]

        def unwrap_output(part: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, shard_parameters, wrap_input, unwrap_output)  # type: ignore[arg-type]


class VocabularyParallel(ParallelStyle):
    """Rows of embedding or head on a device: its part of the vocabulary.

    The embedding returns all features of a part of the tokens, [B, T / devices, D].
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard_parameters(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for key, value in list(part.named_parameters(recurse=False)):
                placement = Shard(0) if key in ("weight", "original") else Replicate()  # of parametrisations
                part.register_parameter(key, nn.Parameter(distribute_tensor(value, mesh, [placement]), value.requires_grad))

        def wrap_input(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Replicate()])

        def unwrap_output(part: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[Shard(1)]).to_local()

        if isinstance(module, nn.Embedding):
            return distribute_module(module, device_mesh, shard_parameters, wrap_input, unwrap_output)  # type: ignore[arg-type]
        return distribute_module(module, device_mesh, shard_parameters)


class ReplicatedOverTokens(ParallelStyle):
    """A linear layer that every device has, applied to its part of the tokens, [B, T / devices, D]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def wrap_input(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            part.batch_size = len(inputs[0])  # type: ignore[assignment]
            return DTensor.from_local(inputs[0].flatten(0, 1), mesh, [Shard(0)])

        def unwrap_output(part: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.to_local().unflatten(0, (part.batch_size, -1))

        return distribute_module(module, device_mesh, None, wrap_input, unwrap_output)  # type: ignore[arg-type]


class Replicated(ParallelStyle):
    """A layer that every device has, applied to all tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


def with_adapters(plan: dict[str, ParallelStyle], block: nn.Module) -> dict[str, ParallelStyle]:
    """Return a plan for a block in which matrices may have LoRA adapters.

    Where a matrix is split by its outputs, so is the second matrix of its adapter; where by its inputs, the first one.
    """
    adapted = dict(plan)
    for name, style in plan.items():
        if hasattr(block.get_submodule(name), "base_layer"):
            adapted[f"{name}.base_layer"] = adapted.pop(name)
            by_outputs = isinstance(style, ColwiseParallel)
            adapted[f"{name}.lora_A.default"] = Replicated() if by_outputs else RowwiseParallel(output_layouts=Shard(1))
            adapted[f"{name}.lora_B.default"] = ColwiseParallel() if by_outputs else ReplicatedOverTokens()
    return adapted


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Split heads, the hidden width of the feed-forward layers and the vocabulary over devices (Megatron-LM, arXiv
    1909.08053), and between these the tokens (sequence parallelism, arXiv 2205.05198).

    The rows of fused matrices must be in the order of `fused_row_order`. Raises `BadInput` where sizes do not divide.
    """
    config, size = model.config, mesh.size()
    counts = {"heads": config.heads, "kv_heads": config.kv_heads, "ffn_width": config.ffn_width}
    if config.qk_norm_shards > 1:
        counts |= {"qk_norm_shards": config.qk_norm_shards, "rows of the norm of keys": config.k_norm_shards}
    for name, count in counts.items():
        if count % size:
            raise BadInput(f"{name} {count} is not divisible by {size}", where="run.tensor_parallel_size")
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    of_tokens = SequenceParallel(use_local_output=True)
    all_tokens, some_tokens = Replicate(), Shard(1)
    plan: dict[str, ParallelStyle] = {
        "attention_norm": of_tokens,
        "attention": PrepareModuleInput(
            input_layouts=(some_tokens, None, None, None), desired_input_layouts=(all_tokens, None, None, None)
        ),
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=some_tokens),
        "ffn_norm": of_tokens,
        "ffn": PrepareModuleInput(input_layouts=(some_tokens,), desired_input_layouts=(all_tokens,)),
        "ffn.gate_up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=some_tokens),
    }
    if config.qk_norm:
        plan |= {"attention.q_norm": QKNormParallel(), "attention.k_norm": QKNormParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, with_adapters(plan, block))
        attention: Any = block.attention
        attention.heads, attention.kv_heads = config.heads // size, config.kv_heads // size
    parallelize_module(model, mesh, {"embed": VocabularyParallel(), "norm": of_tokens, "head": VocabularyParallel()})
    for name, parameter in model.named_parameters():  # PyTorch makes some of them anew
        parameter.requires_grad_(is_trained[name])


def fused_row_order(name: str, config: ModelConfig, size: int) -> Tensor | None:
    """Return the order, int64, in which `size` tensor-parallel devices hold the rows of a matrix; None if unchanged.

    A device's share of a fused matrix is its share of each part: [q₀ k₀ v₀ | q₁ k₁ v₁ | …].
    """
    if size == 1 or not name.endswith("weight") or ".lora_A." in name:
        return None
    if ".qkv." in name:
        heads = torch.arange(config.heads + 2 * config.kv_heads)
        parts = heads.split((config.heads, config.kv_heads, config.kv_heads))
        shares = [share for shares in zip(*(part.chunk(size) for part in parts), strict=True) for share in shares]
        head_order = torch.cat(shares)
        return (head_order[:, None] * config.head_width + torch.arange(config.head_width)).flatten()
    if ".gate_up." in name:
        return torch.arange(2 * config.ffn_width).view(2, size, -1).transpose(0, 1).flatten()
    return None


def parallelize(
    objective: Objective,
    mesh: DeviceMesh | None,
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    param_dtype: torch.dtype | None = None,
) -> None:
    """Apply tensor parallelism, activation checkpointing, compilation and FSDP2, in this order.

    mesh: with the dimensions data_parallel and tensor_parallel; None does not shard. param_dtype: dtype of matrix products
    and activations under FSDP2, while parameters, gradient reduction and optimiser keep the parameters' own (None: all the
    same).
    """
    model = objective.model
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        objective.tensor_parallel_mesh = mesh["tensor_parallel"]
        apply_tensor_parallel(model, objective.tensor_parallel_mesh)
    if compile:
        keep_compiled_code()
    for block in model.blocks:
        assert isinstance(block, Block)
        apply_activation_checkpointing(block, activation_checkpointing)
        if compile:
            if objective.attention == "documents":  # their groups have other shapes in each batch
                block.attention.sdpa.forward = torch.compiler.disable(block.attention.sdpa.forward)  # type: ignore[method-assign]
            block.compile()
    if mesh is None:
        return
    if model.config.tied_head:
        raise BadInput("a model with a tied head cannot be sharded", where="run.data_parallel", remedy="use ddp")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, objective):
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy, reshard_after_forward=True)


def consecutive_runs(indices: Tensor) -> list[slice]:
    """Return indices, int64 [N], as ranges of consecutive ones."""
    ends = (indices.diff() != 1).nonzero()[:, 0] + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in indices.tensor_split(ends) if len(run)]


@torch.no_grad()
def fill_parameters(module: nn.Module, initial_part: Callable[[str, Box], Tensor], kept: dict[str, Tensor]) -> None:
    """Set each parameter and buffer of a module created on `meta` to what `initial_part(name, box)` returns for its part.

    Parts are made on the CPU whatever the default device, so that they are the same on all. kept: tensors that had values
    before the module's memory was allocated, by name.
    """
    for name, target in (*module.named_parameters(), *module.named_buffers()):
        box = local_box(target)
        with torch.device("cpu"):
            value = kept[name][box] if name in kept else initial_part(name, box)
        local_part(target).copy_(value)


@torch.no_grad()
def copy_full_tensor(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor to a target that may be sharded."""
    local_part(target).copy_(source[local_box(target)])
