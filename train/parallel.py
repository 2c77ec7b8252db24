"""How a model lies on many devices: FSDP2, tensor parallelism, activations computed again, compiled blocks.

All of it is put on from outside, block by block; the model knows nothing of it. Parameters begin on `meta` and get their
values once each device holds no more than its part, so that no process ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.model.recompute import Checkpointing, recompute
from chameleon.model.transformer import Block, Transformer
from chameleon.train.objective import Objective


class HeadNormParallel(ParallelStyle):
    """QK-norm of the heads that a device has: its own rows of the weights, or the one row that serves all heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def place(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for key, value in list(part.named_parameters(recurse=False)):
                where = Shard(0) if len(value) > 1 else Replicate()
                part.register_parameter(key, nn.Parameter(distribute_tensor(value, mesh, [where])))

        def enter(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Shard(2)])  # [B, T, heads of this device, C]

        def leave(part: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, place, enter, leave)  # type: ignore[arg-type]


def split_heads(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor parallelism (Megatron-LM, arXiv 1909.08053): each device has a share of the heads and of the inner width.

    The fused matrices must lie in the order of `row_order`. Embedding, head and norms stay whole on each device.
    Raises `BadInput` where something does not divide.
    """
    config, size = model.config, mesh.size()
    counts = {"heads": config.heads, "kv_heads": config.kv_heads, "ffn_width": config.ffn_width}
    if config.qk_norm_shards > 1:
        counts |= {"qk_norm_shards": config.qk_norm_shards, "rows of the keys' norm": config.k_norm_shards}
    for name, count in counts.items():
        if count % size:
            raise BadInput(f"{name} {count} does not divide by {size}", where="run.tensor_parallel")
    plan: dict[str, ParallelStyle] = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "ffn.gate_up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(),
    }
    if config.qk_norm:
        plan |= {"attention.q_norm": HeadNormParallel(), "attention.k_norm": HeadNormParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
        attention: Any = block.attention
        attention.heads, attention.kv_heads = config.heads // size, config.kv_heads // size


def row_order(name: str, config: ModelConfig, size: int) -> Tensor | None:
    """Order in which `size` devices in tensor parallel hold the rows of a matrix, int64; None for its own order.

    A device's share of a fused matrix is its share of each part: [q₀ k₀ v₀ | q₁ k₁ v₁ | …].
    """
    if size == 1 or not name.endswith("weight"):
        return None
    if ".qkv." in name:
        heads = torch.arange(config.heads + 2 * config.kv_heads)
        parts = heads.split((config.heads, config.kv_heads, config.kv_heads))
        chosen = torch.cat(
            [share for shares in zip(*(part.chunk(size) for part in parts), strict=True) for share in shares]
        )
        return (chosen[:, None] * config.head_width + torch.arange(config.head_width)).flatten()
    if ".gate_up." in name:
        return torch.arange(2 * config.ffn_width).view(2, size, -1).transpose(0, 1).flatten()
    return None


def parallelize(
    objective: Objective,
    mesh: DeviceMesh | None,
    *,
    checkpointing: Checkpointing = "none",
    compiled: bool = False,
    low: torch.dtype | None = None,
) -> None:
    """Puts on what the settings ask for. `mesh`: of two dimensions, data_parallel and tensor_parallel; None shards nothing.

    low: dtype of products and of what lies between them while parameters, their gradients' sums and the optimiser stay
    in the parameters' own (None: the same).
    """
    model = objective.model
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        split_heads(model, mesh["tensor_parallel"])
    for block in model.blocks:
        assert isinstance(block, Block)
        recompute(block, checkpointing)
        if compiled:
            block.compile()
    if mesh is None:
        return
    if model.config.tied_head:
        raise BadInput("a tied head cannot be sharded", where="run.sharding", remedy="use ddp")
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.blocks, objective):
        fully_shard(part, mesh=mesh["data_parallel"], mp_policy=precision, reshard_after_forward=True)


@torch.no_grad()
def fill(module: nn.Module, values: Callable[[str], Tensor], real: dict[str, Tensor]) -> None:
    """Gives each parameter and buffer of an empty module its value, whole tensors from `values(name)`.

    real: tensors that had values before the module was emptied, by name.
    """
    for name, target in (*module.named_parameters(), *module.named_buffers()):
        put(target, real[name] if name in real else values(name))


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a target that may hold a part of it."""
    if isinstance(target, DTensor):
        whole = whole.to(target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(whole)
