"""Shapes of the two other formats: against Hugging Face's configuration and network, the released sizes, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ChameleonConfig, ChameleonVQVAE

from chameleon.convert.configs import (
    from_hf_config,
    from_hf_vqgan,
    from_meta_params,
    from_meta_vqgan,
    to_hf_config,
    to_meta_params,
    to_meta_vqgan,
)
from chameleon.errors import BadInput
from chameleon.model.config import SIZES, ModelConfig, named_size
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

IMAGE = VQGANConfig(resolution=64, channels=32, multipliers=(1, 2), res_blocks=1, attention_resolutions=(32,))


@given(
    layers=st.integers(1, 5),
    head=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    ffn_width=st.integers(1, 30000),
    swin=st.booleans(),
)
def test_there_and_back(layers: int, head: int, kv_heads: int, groups: int, ffn_width: int, swin: bool) -> None:
    heads = kv_heads * groups
    config = ModelConfig(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        width=2 * head * heads,
        ffn_width=ffn_width,
        norm_order="swin" if swin else "pre",
        qk_norm_shards=kv_heads,
    )
    params, more = to_meta_params(config, kv_heads)
    assert from_meta_params({**params["model"], **more}, kv_heads, vocab_size=config.vocab_size) == config
    assert from_hf_config(to_hf_config(config, IMAGE)) == config


@pytest.mark.parametrize("name", sorted(SIZES))
def test_hugging_faces_own_reading(name: str) -> None:
    config = replace(named_size(name), dropout=0.0)
    theirs = ChameleonConfig(**to_hf_config(config, IMAGE))
    assert (theirs.hidden_size, theirs.num_key_value_heads) == (config.width, config.kv_heads)
    assert from_hf_config(theirs.to_dict()) == config
    assert from_hf_vqgan(theirs.vq_config.to_dict()) == IMAGE
    with torch.device("meta"):
        network, ours = ChameleonVQVAE(theirs.vq_config), VQGAN(IMAGE)
    expected = {key: value.shape for key, value in network.state_dict().items()}
    actual = {key: value.shape for key, value in ours.released_state_dict().items() if not key.startswith("decoder.")}
    assert actual == expected


def test_released_parameters() -> None:
    """What the released files say (LLaMA's keys) gives the table's sizes."""
    seven: dict[str, Any] = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5}
    seven |= {"qk_normalization": True, "swin_norm": False, "vocab_size": -1}
    assert from_meta_params(seven, 1, vocab_size=65536) == replace(named_size("7b"), dropout=0.0)
    large = {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256}
    large |= {"qk_normalization": True, "swin_norm": True}
    assert from_meta_params(large, 4, vocab_size=65536) == replace(named_size("34b"), ffn_width=22016)
    assert from_meta_vqgan(to_meta_vqgan(VQGANConfig())) == VQGANConfig()
    assert from_meta_vqgan(to_meta_vqgan(IMAGE)) == IMAGE


def junk() -> list[tuple[str, Any]]:
    """Every key of any of the formats with every kind of wrong value."""
    meta = ["dim", "n_heads", "n_layers", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"]
    meta += ["vocab_size", "swin_norm", "qk_normalization"]
    config = to_hf_config(named_size("tiny"), IMAGE)
    values: list[Any] = [None, "x", "1", [], {}, 0, -1, 2.5, 1e300, True, float("nan"), float("inf"), [1, "2"]]
    return [(name, value) for name in [*meta, *config, *config["vq_config"]] for value in values]


def survives(read: Callable[[], object]) -> None:
    """It reads, or says what is wrong with the file."""
    with contextlib.suppress(BadInput):
        read()


def test_what_cannot_be_is_named() -> None:
    config = to_hf_config(named_size("tiny"), IMAGE)
    for changes, words in (
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"rms_norm_eps": "0"}, r"config\.json: norm_eps is '0', expected a number of 0 or more"),
        ({"swin_norm": "no"}, "swin_norm"),
        ({"hidden_size": None}, "hidden|width|not a model"),
        ({"num_key_value_heads": 2}, "is not divisible by"),
    ):
        with pytest.raises(BadInput, match=words):
            from_hf_config({**config, **changes})
    del config["vocab_size"]
    with pytest.raises(BadInput, match=r"config\.json: no key vocab_size"):
        from_hf_config(config)
    with pytest.raises(BadInput, match="without QK-norm"):
        to_hf_config(named_size("tiny", qk_norm=False), IMAGE)
    with pytest.raises(BadInput, match="norm groups"):
        to_meta_vqgan(replace(IMAGE, norm_groups=16))
    with pytest.raises(BadInput, match=r"params\.json: no key dim"):
        from_meta_params({"n_heads": 2}, 1, vocab_size=10)
    with pytest.raises(BadInput, match="the embedding has 10 rows"):
        from_meta_params({"dim": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 9}, 1, vocab_size=10)
    for name, value in junk():
        params = {"dim": 8, "n_heads": 2, "n_layers": 1, "multiple_of": 4, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5}
        params |= {"n_kv_heads": 2, "rope_theta": 1e4, "vocab_size": 10, "swin_norm": True, "qk_normalization": True}
        survives(lambda: from_meta_params({**params, name: value}, 1, vocab_size=10))  # noqa: B023
        survives(lambda: from_hf_config({**config, name: value, "vocab_size": 10}))  # noqa: B023
        survives(lambda: from_hf_vqgan({name: value}))  # noqa: B023
    values = to_meta_vqgan(IMAGE)
    values["model"]["params"]["ddconfig"]["double_z"] = True
    with pytest.raises(BadInput, match="double_z"):
        from_meta_vqgan(values)
