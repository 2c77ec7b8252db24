"""Tensors of which each process has a part (PyTorch's DTensor), and plain ones alike: the part, where it lies, how many."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Box = tuple[slice, ...]
"""A part of a tensor: a range of each dimension, or () for all of it."""


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> Box:
    """Return which part of the whole tensor this process has."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))


def num_shards(tensor: Tensor) -> int:
    """Return the number of different parts that a tensor is split into over all processes."""
    if not isinstance(tensor, DTensor):
        return 1
    dims = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(dim) for dim, placement in dims if not placement.is_replicate())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor. A collective operation: every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
