"""Hugging Face's Chameleon in the shape of ours: what benchmarks compare with and tests hold the model to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ChameleonConfig, ChameleonVQVAEConfig

from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer


def config_of(ours: ModelConfig, **more: Any) -> ChameleonConfig:
    """Its configuration for the shape `ours`, with `more` keys of its own. Its picture tokenizer is made tiny."""
    return ChameleonConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.width,
        intermediate_size=ours.ffn_width,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        rms_norm_eps=ours.norm_eps,
        max_position_embeddings=ours.context_length,
        swin_norm=ours.norm_order == "swin",
        model_parallel_size=ours.qk_norm_shards,
        vocabulary_map={"<image>": 0},
        vq_config=ChameleonVQVAEConfig(base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=8).to_dict(),
        pad_token_id=0,
        **more,
    )


def state_of(ours: Transformer) -> dict[str, Tensor]:
    """Our weights, split and named as its `ChameleonModel` wants them; all but its picture tokenizer's and the head."""
    c = ours.config
    state = {"embed_tokens.weight": ours.embed.weight, "norm.weight": ours.norm.weight}
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    for number, block in enumerate(ours.blocks):
        layer = f"layers.{number}"
        parts = dict(zip(("q", "k", "v"), block.attention.qkv.weight.split((q, kv, kv)), strict=True))
        for name, value in parts.items():
            state[f"{layer}.self_attn.{name}_proj.weight"] = value
        state[f"{layer}.self_attn.o_proj.weight"] = block.attention.out.weight
        for name, heads in (("q_norm", c.heads), ("k_norm", c.kv_heads)):
            norm = getattr(block.attention, name)
            for kind in ("weight", "bias"):
                repeated = getattr(norm, kind).repeat_interleave(heads // c.qk_norm_shards, dim=0)
                state[f"{layer}.self_attn.{name}.{kind}"] = repeated
        gate, up = block.ffn.gate_up.weight.chunk(2)
        state[f"{layer}.mlp.gate_proj.weight"], state[f"{layer}.mlp.up_proj.weight"] = gate, up
        state[f"{layer}.mlp.down_proj.weight"] = block.ffn.down.weight
        state[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        state[f"{layer}.post_attention_layernorm.weight"] = block.ffn_norm.weight
    return state
