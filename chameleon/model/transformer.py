"""The early-fusion Transformer: one decoder over one vocabulary of text and image ids.

Notable choices (arXiv 2405.09818, 2.3):
* LLaMA-2's decoder: RMSNorm, SwiGLU, rotary positions, no biases, untied head;
* QK-norm: LayerNorm with weight and bias over each head's queries and keys, before the rotation;
* pre-norm or Swin order; dropout after attention and after the feed-forward layer;
* rotary pairs are (i, i + half) of a head, so the rotation is two halves and no shuffling; checkpoints whose pairs
  are (2i, 2i + 1) are permuted when they are converted;
* q, k, v are one matrix, gate and up another: fewer and larger products.

Shapes: B rows, T ids a row, S slots of cache, D width, H heads, K kv heads, C head width.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from chameleon.model.cache import Window
from chameleon.model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]
Mask = Tensor | BlockMask


def rotation(positions: Tensor, head_width: int, theta: float) -> Rotation:
    """cos and sin [B, T, 1, C] float32 of the rotary angles at integer positions [B, T] (arXiv 2104.09864).

    The sin of the first half is negated, as `rotate` wants it.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions[:, :, None, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, C] turned by the angles, in x's dtype."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def packed_mask(document_ids: Tensor) -> Tensor:
    """Who may look at whom: bool [B, 1, T, T], the same document and not later. `document_ids` [B, T]."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    length = document_ids.shape[1]
    return same & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()


def packed_blocks(document_ids: Tensor) -> BlockMask:
    """The same as `packed_mask`, for FlexAttention (arXiv 2412.05496): blocks that nobody may look at cost nothing."""

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    rows, length = document_ids.shape
    return create_block_mask(mask, rows, None, length, length, device=str(document_ids.device))


@functools.cache
def flex(device: str) -> Callable[..., Any]:
    """FlexAttention; on GPUs only the compiled one is fast, and compiled it does not learn on CPUs."""
    chosen: Any = torch.compile(flex_attention) if device == "cuda" else flex_attention
    return chosen


class Attend(nn.Module):
    """Softmax attention. A module of its own so that hooks can see queries and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """q [B, H, T, C], k and v [B, K, S, C] to [B, H, T, C]; with no mask causal."""
        grouped = q.shape[1] != k.shape[1]
        if isinstance(mask, BlockMask):
            return flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class HeadNorm(nn.Module):
    """LayerNorm over each head's C features; row s of the weights serves the s-th share of the heads."""

    def __init__(self, shards: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shards, head_width))
        self.bias = nn.Parameter(torch.zeros(shards, head_width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, C]."""
        shards, width = self.weight.shape
        if shards == 1:
            return F.layer_norm(x, (width,), self.weight[0].to(x.dtype), self.bias[0].to(x.dtype), self.eps)
        weight, bias = self.weight.to(x.dtype).unsqueeze(1), self.bias.to(x.dtype).unsqueeze(1)  # [shards, 1, C]
        normed = F.layer_norm(x, (width,), eps=self.eps).unflatten(2, (shards, -1))
        return (normed * weight + bias).flatten(2, 3)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, QK-norm and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_width = layer, config.heads, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = HeadNorm(config.qk_norm_shards, config.head_width, config.norm_eps)
            self.k_norm = HeadNorm(config.k_norm_shards, config.head_width, config.norm_eps)
        self.attend = Attend()

    def forward(self, x: Tensor, turn: Rotation, mask: Mask | None, window: Window | None) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, self.head_width)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)  # each [B, T, heads, C]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if window is None:
            attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        else:
            attended = window.attend(self.layer, q, k, v, self.attend)
        return self.out(attended.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward layer, each normed, dropped out and added."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.swin = config.norm_order == "swin"
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        turn: Rotation,
        mask: Mask | None = None,
        window: Window | None = None,
    ) -> Tensor:
        if self.swin:
            x = x + self.dropout(self.attention_norm(self.attention(x, turn, mask, window)))
            return x + self.dropout(self.ffn_norm(self.ffn(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), turn, mask, window))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """ids [B, T] → hidden states [B, T, D] → logits [B, T, vocab_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Puts every parameter to its `initial` value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial(name, parameter.shape, self.config, seed))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] behind the last norm.

        ids: int64 [B, T]. positions: int64 [B, T], by default 0…T−1. mask: bool [B, 1, T, S], True where a query may
        look, or blocks for FlexAttention; by default causal. window: the ids, in one row, go on with rows of a cache at
        the window's slots, which are their positions.
        """
        if window is not None:
            positions = window.slots.unsqueeze(0)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        turn = rotation(positions, self.config.head_width, self.config.rope_theta)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, turn, mask, window)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] to logits [..., vocab_size]. Engines cut the head to the ids that may come instead."""
        return F.linear(hidden, self.head.weight)


def initial(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """What the parameter of that name starts from, float32, whoever holds which part of it.

    Normal numbers of deviation 0.02, those that end a branch shrunk by √(2 · layers) (GPT-2's rule); norms are 1, biases 0.
    """
    if "norm" in name:
        return torch.zeros(*shape) if name.endswith("bias") else torch.ones(*shape)
    ends_branch = name.endswith(("attention.out.weight", "ffn.down.weight"))
    deviation = 0.02 / math.sqrt(2 * config.layers) if ends_branch else 0.02
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    return torch.empty(*shape).normal_(std=deviation, generator=generator)
