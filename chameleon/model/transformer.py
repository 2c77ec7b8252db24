"""The early-fusion Transformer: one decoder over one vocabulary of text and image tokens.

Design choices (arXiv 2405.09818, section 2.3):

* LLaMA-2's decoder: RMSNorm, SwiGLU, rotary positions, no biases, untied head;
* QK-norm: LayerNorm with weight and bias over each head's queries and keys, before the rotary embedding;
* pre-norm or Swin order of norms; dropout after attention and after the feed-forward layer;
* rotary pairs are (i, i + half) within a head, so that rotating is two halves and no shuffling; checkpoints whose pairs
  are (2i, 2i + 1) are permuted when they are converted;
* q, k, v are one matrix, gate and up another: fewer and larger products.

Shapes: B batch size, T tokens, S keys, D width, H heads, K kv heads, C head width.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chameleon.model.config import ModelConfig
from chameleon.model.document_attention import DocumentGroups, document_attention
from chameleon.model.kv_cache import BatchLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rope = tuple[Tensor, Tensor]
AttentionMask: TypeAlias = "Tensor | BlockMask | DocumentGroups"


def rope_cos_sin(positions: Tensor, head_width: int, theta: float) -> Rope:
    """Return cos and sin [B, T, 1, C] float32 of the rotary angles at positions int64 [B, T] (arXiv 2104.09864).

    The sin of the first half is negated, as `apply_rope` expects.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions[:, :, None, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, C] by the rotary angles, in x's dtype."""
    x_float = x.float()
    return (x_float * cos).addcmul_(x_float.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def block_diagonal_causal_mask(document_ids: Tensor) -> Tensor:
    """Return the attention mask of packed documents: bool [B, 1, T, T], causal within each document.

    document_ids: int64 [B, T], which document of its row each token belongs to.
    """
    same_document = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    length = document_ids.shape[1]
    return same_document & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()


def block_diagonal_causal_block_mask(document_ids: Tensor) -> BlockMask:
    """Return the same mask for FlexAttention (arXiv 2412.05496), which skips blocks that are masked completely."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    batch_size, length = document_ids.shape
    create_block_mask = block_mask_creator_for(document_ids.device.type)
    block_mask: BlockMask = create_block_mask(mask, batch_size, None, length, length, device=str(document_ids.device))
    return block_mask


@functools.cache
def block_mask_creator_for(device: str) -> Callable[..., Any]:
    """Return PyTorch's function that makes block masks: compiled on GPUs, where it else writes out the whole mask."""
    from torch.nn.attention.flex_attention import create_block_mask  # here, since it takes long to import

    function: Callable[..., Any] = create_block_mask
    return always_compiled(function) if device == "cuda" else function


@functools.cache
def flex_attention_for(device: str) -> Callable[..., Any]:
    """Return FlexAttention for a device type: compiled on GPUs, where only that is fast.

    On CPUs the compiled version has no backward pass.
    """
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return always_compiled(function) if device == "cuda" else function


def always_compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function that is compiled also where monitors have all modules run eagerly.

    FlexAttention would else write out all attention scores. options: of `torch.compile`.
    """
    compiled = torch.compile(function, **options)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():  # as a part of what is compiled
            return compiled(*arguments, **keywords)
        with torch.compiler.set_stance("default"):
            return compiled(*arguments, **keywords)

    return call


class ScaledDotProductAttention(nn.Module):
    """Softmax attention; a module of its own so that forward hooks can observe queries and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q [B, H, T, C], k and v [B, K, S, C] to [B, H, T, C]; without a mask, attention is causal."""
        enable_gqa = q.shape[1] != k.shape[1]
        if isinstance(mask, DocumentGroups):
            return document_attention(q, k, v, mask)
        if mask is not None and not isinstance(mask, Tensor):
            return flex_attention_for(q.device.type)(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
        is_causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=enable_gqa)


class QKNorm(nn.Module):
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

    def expanded(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias of each head, [heads, C]."""
        repeats = heads // len(self.weight)
        return self.weight.repeat_interleave(repeats, dim=0), self.bias.repeat_interleave(repeats, dim=0)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, QK-norm and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_width = layer, config.heads, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = QKNorm(config.qk_norm_shards, config.head_width, config.norm_eps)
            self.k_norm = QKNorm(config.k_norm_shards, config.head_width, config.norm_eps)
        self.sdpa = ScaledDotProductAttention()
        self.joint_norm: tuple[Tensor, Tensor] | None = None
        """Weight and bias [H + K, C] of the norms of queries and keys in one, see `join_qk_norms`."""

    @torch.no_grad()
    def join_qk_norms(self) -> None:
        """Prepare for generation: from the norms' current weights, one operation norms queries and keys."""
        if hasattr(self, "q_norm"):
            norms = (self.q_norm.expanded(self.heads), self.k_norm.expanded(self.kv_heads))
            self.joint_norm = torch.cat((norms[0][0], norms[1][0])), torch.cat((norms[0][1], norms[1][1]))

    def forward(self, x: Tensor, rope: Rope, mask: AttentionMask | None, layout: BatchLayout | None) -> Tensor:
        batch_size, length, _ = x.shape
        qkv = self.qkv(x).view(batch_size, length, self.heads + 2 * self.kv_heads, self.head_width)
        if layout is not None and self.joint_norm is not None:
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            weight, bias = self.joint_norm
            qk = torch.addcmul(bias, F.layer_norm(qk, (self.head_width,), eps=self.q_norm.eps), weight)
            q, k = apply_rope(qk, *rope).split((self.heads, self.kv_heads), dim=2)
        else:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)  # each [B, T, heads, C]
            if hasattr(self, "q_norm"):
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if layout is None:
            output = self.sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        else:
            output = layout.attend(self.layer, q, k, v, self.sdpa)
        return self.out(output.flatten(2))


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
    """Attention and feed-forward layer, each with norm, dropout and residual connection."""

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
        rope: Rope,
        mask: AttentionMask | None = None,
        layout: BatchLayout | None = None,
    ) -> Tensor:
        if self.swin:
            x = x + self.dropout(self.attention_norm(self.attention(x, rope, mask, layout)))
            return x + self.dropout(self.ffn_norm(self.ffn(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, layout))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Embedding(nn.Embedding):
    """An embedding that is not initialised on the meta device, where PyTorch would load its compiler to do so."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """token ids [B, T] → hidden states [B, T, D] → logits [B, T, vocab_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter to its `initial_value`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self.config, seed))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        layout: BatchLayout | None = None,
    ) -> Tensor:
        """Return hidden states [B, T, D] after the final norm.

        token_ids: int64 [B, T]. positions: int64 [B, T], by default 0…T−1. mask: bool [B, 1, T, S], True where a query
        attends to a key, a block mask for FlexAttention, or the batch's documents; by default causal. layout: with a KV
        cache, where the tokens (one row, B = 1) are stored in it; it gives their positions too.
        """
        if layout is not None:
            positions = layout.positions.unsqueeze(0)
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand(token_ids.shape)
        rope = rope_cos_sin(positions, self.config.head_width, self.config.rope_theta)
        x = self.embed(token_ids)
        for block in self.blocks:
            x = block(x, rope, mask, layout)
        return self.norm(x)

    def join_qk_norms(self) -> None:
        """Prepare for generation, see `Attention.join_qk_norms`."""
        for block in self.blocks:
            block.attention.join_qk_norms()  # type: ignore[operator, union-attr]

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states [..., D] to logits [..., vocab_size]. Generation uses slices of the head instead."""
        return F.linear(hidden, self.head.weight)


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of the parameter `name`, float32: a function of name and seed alone.

    Normal with standard deviation 0.02, scaled down by √(2 · layers) for the matrices that end a residual branch (GPT-2's
    rule); norms are 1, biases 0.
    """
    if "norm" in name:
        return torch.zeros(*shape) if name.endswith("bias") else torch.ones(*shape)
    ends_branch = name.endswith(("attention.out.weight", "ffn.down.weight"))
    std = 0.02 / math.sqrt(2 * config.layers) if ends_branch else 0.02
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    return torch.empty(*shape).normal_(std=std, generator=generator)
