"""Hugging Face's Chameleon in the shape of ours: what benchmarks compare with and tests hold the model to."""

from __future__ import annotations

from typing import Any

from transformers import ChameleonConfig, ChameleonVQVAEConfig

from chameleon.model.config import ModelConfig


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
        max_position_embeddings=ours.context,
        swin_norm=ours.norm_order == "swin",
        model_parallel_size=ours.qk_norm_shards,
        vocabulary_map={"<image>": 0},
        vq_config=ChameleonVQVAEConfig(base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=8).to_dict(),
        pad_token_id=0,
        **more,
    )
