"""Arithmetic of a model: operations for a token, and what a machine can do."""

from __future__ import annotations

import time

import torch

from chameleon.model.config import ModelConfig


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of training for one token: 6 for each weight of a product, and attention's.

    The embedding is a look-up and counts nothing. Attention at full `context`, halved for causality
    (PaLM, arXiv 2204.02311, appendix B, halved).
    """
    kv = config.kv_heads * config.head_width
    block = config.width * (2 * config.width + 2 * kv) + 3 * config.width * config.ffn_width
    weights = config.layers * block + config.vocab_size * config.width
    return 6.0 * weights + 6.0 * config.layers * config.width * context


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> float:
    """Measured operations a second of a large square product: the best of a few tries."""
    device = torch.device(device)
    size = 2048 if device.type == "cpu" else 8192  # large enough that starting it counts for nothing
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
