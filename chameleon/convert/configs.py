"""Configurations in the other two formats: Meta's params.json and vqgan.yaml, Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

from chameleon.errors import BadInput, as_bad_input
from chameleon.model.config import ModelConfig, NormOrder
from chameleon.tokenizers.vqgan import VQGANConfig

CONTEXT = 4096
"""Context length of the released models (arXiv 2405.09818, section 2.3), which Meta's files do not state."""
ROPE_THETA = 10000.0
NORM_GROUPS = 32
"""Groups of every GroupNorm, fixed in both other formats."""


def required(values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise BadInput(f"no key {key}")
    return values[key]


def check_fixed(values: dict[str, Any], supported: dict[str, Any]) -> None:
    """Raise `BadInput` that names a key whose value has no counterpart here."""
    for key, value in supported.items():
        if values.get(key) not in (None, value):
            raise BadInput(f"{key} is {values[key]!r}, only {value!r} is known")


def norm_order_of(swin: Any) -> NormOrder:
    if not isinstance(swin, bool):
        raise BadInput(f"swin_norm is {swin!r}, expected true or false")
    return "swin" if swin else "pre"


# --- Meta ------------------------------------------------------------------------------------------------------------


def meta_ffn_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the hidden width of SwiGLU as in LLaMA's reference code: two thirds of 4 · width, scaled, rounded up."""
    hidden = int(2 * 4 * width / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def from_meta_params(params: dict[str, Any], shards: int, *, vocab_size: int, where: object = "params.json") -> ModelConfig:
    """Return the configuration in params.json, with all keys at the top level, of weights in `shards` files.

    `vocab_size` is used where the file has none, or -1.
    """
    with as_bad_input("a model's parameters", where):
        stated_size = params.get("vocab_size")
        if stated_size not in (None, -1, vocab_size):
            raise BadInput(f"vocab_size {stated_size}, the embedding has {vocab_size} rows")
        width, heads = required(params, "dim"), required(params, "n_heads")
        qk_norm = params.get("qk_normalization", False)
        config = ModelConfig(
            vocab_size=vocab_size,
            layers=required(params, "n_layers"),
            width=width,
            heads=heads,
            kv_heads=heads if params.get("n_kv_heads") is None else params["n_kv_heads"],
            ffn_width=meta_ffn_width(width, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
            context_length=CONTEXT,
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", ROPE_THETA),
            qk_norm=qk_norm,
            qk_norm_shards=shards if qk_norm else 1,
            norm_order=norm_order_of(params.get("swin_norm", False)),
        )
    return config


def to_meta_params(config: ModelConfig, shards: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return params.json and consolidate_params.json, from which all but context length and dropout can be read again."""
    multiple_of, ffn_dim_multiplier = 256, None
    if meta_ffn_width(config.width, multiple_of, None) != config.ffn_width:
        # Half a step above the quotient, so that rounding down gives the width itself.
        multiple_of, ffn_dim_multiplier = 1, (config.ffn_width + 0.5) / int(2 * 4 * config.width / 3)
    model = {
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": ffn_dim_multiplier,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        "qk_normalization": config.qk_norm,
        "swin_norm": config.norm_order == "swin",
    }
    return {"model": model}, {"model_parallel_size": shards}


def from_meta_vqgan(values: dict[str, Any], *, where: object = "vqgan.yaml") -> VQGANConfig:
    """Return the configuration in vqgan.yaml. Raise `BadInput` for a network that has no counterpart here."""
    with as_bad_input("an image tokenizer's configuration", where):
        params = required(required(values, "model"), "params")
        network = required(params, "ddconfig")
        check_fixed(network, {"double_z": False, "in_channels": 3, "out_ch": 3})
        config = VQGANConfig(
            resolution=required(network, "resolution"),
            channels=required(network, "ch"),
            multipliers=tuple(required(network, "ch_mult")),
            res_blocks=required(network, "num_res_blocks"),
            attention_resolutions=tuple(network.get("attn_resolutions") or ()),
            latent_channels=required(network, "z_channels"),
            codebook_size=required(params, "n_embed"),
            codebook_width=required(params, "embed_dim"),
            norm_groups=NORM_GROUPS,
        )
    return config


def check_groups(config: VQGANConfig) -> None:
    if config.norm_groups != NORM_GROUPS:
        raise BadInput(
            f"{config.norm_groups} norm groups, the format knows only {NORM_GROUPS}",
            where="image tokenizer",
            remedy=f"train one with norm_groups: {NORM_GROUPS}",
        )


def to_meta_vqgan(config: VQGANConfig) -> dict[str, Any]:
    """Return vqgan.yaml. Raise `BadInput` for what the format cannot express."""
    check_groups(config)
    network = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }
    sizes = {"embed_dim": config.codebook_width, "n_embed": config.codebook_size}
    return {"model": {"params": {**sizes, "ddconfig": network, "lossconfig": None, "ckpt_path": None}}}


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def from_hf_config(values: dict[str, Any], *, where: object = "config.json") -> ModelConfig:
    """Return the configuration in the config.json of a `ChameleonForConditionalGeneration`, of this and earlier releases.

    QK-norm is always on there. Raises `BadInput` for what has no counterpart here.
    """
    with as_bad_input("a model's configuration", where):
        check_fixed(values, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_scaling": None})
        rope = values.get("rope_parameters") or {}
        check_fixed(rope, {"rope_type": "default"})
        heads = required(values, "num_attention_heads")
        kv_heads = values.get("num_key_value_heads")
        config = ModelConfig(
            vocab_size=required(values, "vocab_size"),
            layers=required(values, "num_hidden_layers"),
            width=required(values, "hidden_size"),
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            ffn_width=required(values, "intermediate_size"),
            context_length=values.get("max_position_embeddings", CONTEXT),
            norm_eps=values.get("rms_norm_eps", 1e-5),
            rope_theta=rope.get("rope_theta", values.get("rope_theta", ROPE_THETA)),
            qk_norm_shards=values.get("model_parallel_size") or 1,
            norm_order=norm_order_of(values.get("swin_norm") or False),
            tied_head=values.get("tie_word_embeddings", False),
        )
    return config


def to_hf_config(config: ModelConfig, image: VQGANConfig) -> dict[str, Any]:
    """Return config.json without what depends on the vocabulary. Raise `BadInput` for a model without QK-norm."""
    if not config.qk_norm:
        raise BadInput("a model without QK-norm has no counterpart in Hugging Face's format", where="model")
    check_groups(image)
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "model_parallel_size": config.qk_norm_shards,
        "swin_norm": config.norm_order == "swin",
        "tie_word_embeddings": config.tied_head,
        "vq_config": {
            "model_type": "chameleon_vqgan",
            "embed_dim": image.codebook_width,
            "num_embeddings": image.codebook_size,
            "double_latent": False,
            "latent_channels": image.latent_channels,
            "resolution": image.resolution,
            "in_channels": 3,
            "base_channels": image.channels,
            "channel_multiplier": list(image.multipliers),
            "num_res_blocks": image.res_blocks,
            "attn_resolutions": list(image.attention_resolutions) or None,
            "dropout": image.dropout,
            "attn_type": "vanilla",
        },
    }


def from_hf_vqgan(values: dict[str, Any], *, where: object = "config.json, vq_config") -> VQGANConfig:
    """Return the image tokenizer's configuration in `vq_config`; keys that are left out have the released value."""
    with as_bad_input("an image tokenizer's configuration", where):
        check_fixed(values, {"double_latent": False, "in_channels": 3, "attn_type": "vanilla"})
        released = VQGANConfig()
        config = VQGANConfig(
            resolution=values.get("resolution", released.resolution),
            channels=values.get("base_channels", released.channels),
            multipliers=tuple(values.get("channel_multiplier", released.multipliers)),
            res_blocks=values.get("num_res_blocks", released.res_blocks),
            attention_resolutions=tuple(values.get("attn_resolutions") or ()),
            latent_channels=values.get("latent_channels", released.latent_channels),
            codebook_size=values.get("num_embeddings", released.codebook_size),
            codebook_width=values.get("embed_dim", released.codebook_width),
            norm_groups=NORM_GROUPS,
            dropout=values.get("dropout", 0.0),
        )
    return config
