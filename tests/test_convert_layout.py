"""Weights of the two other formats: against Hugging Face's model, a plain reading of Meta's, and there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from hugging_face import config_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import ChameleonForConditionalGeneration

from chameleon.convert.layout import from_hf, from_meta, halves_to_pairs, pairs_to_halves, to_hf, to_meta
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig, named_size
from chameleon.model.transformer import Transformer

IDS = 64
SHAPES = [(8, 8, 1), (8, 2, 1), (8, 2, 2), (8, 8, 8)]  # heads, kv heads, shards


def config_for(heads: int, kv_heads: int, shards: int, norm_order: str = "pre", **more: Any) -> ModelConfig:
    return named_size(
        "tiny",
        **{"layers": 2, "width": 64, "ffn_width": 48, "vocab_size": IDS, "heads": heads, "kv_heads": kv_heads}
        | {"qk_norm_shards": shards, "norm_order": norm_order}
        | more,
    )


def random_shards(config: ModelConfig, seed: int = 0) -> list[dict[str, Tensor]]:
    """A checkpoint as Meta writes it, made from nothing of ours but the sizes."""
    random = torch.Generator().manual_seed(seed)
    shards, head = config.qk_norm_shards, config.head_width

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * 0.2

    shared = {"norm.weight": 1 + draw(config.width)}
    for n in range(config.layers):
        shared |= {f"layers.{n}.{kind}_norm.weight": 1 + draw(config.width) for kind in ("attention", "ffn")}
    result = []
    for _ in range(shards):
        shard = {name: value.clone() for name, value in shared.items()}
        shard["tok_embeddings.weight"] = draw(config.vocab_size, config.width // shards)
        shard["output.weight"] = draw(config.vocab_size // shards, config.width)
        shard["rope.freqs"] = draw(head // 2)
        for n in range(config.layers):
            attention, ffn = f"layers.{n}.attention.", f"layers.{n}.feed_forward."
            for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
                shard[f"{attention}w{name}.weight"] = draw(heads * head // shards, config.width)
            shard[attention + "wo.weight"] = draw(config.width, config.width // shards)
            for name in ("q", "k"):
                shard[f"{attention}{name}_normalization.weight"] = 1 + draw(head)
                shard[f"{attention}{name}_normalization.bias"] = draw(head)
            for name in ("w1", "w3"):
                shard[f"{ffn}{name}.weight"] = draw(config.ffn_width // shards, config.width)
            shard[ffn + "w2.weight"] = draw(config.width, config.ffn_width // shards)
        result.append(shard)
    return result


def fuse(shard: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    shard = dict(shard)
    for n in range(layers):
        for inner, names, fused in (("attention", ("wq", "wk", "wv"), "wqkv"), ("feed_forward", ("w1", "w3"), "w13")):
            values = [shard.pop(f"layers.{n}.{inner}.{name}.weight") for name in names]
            shard[f"layers.{n}.{inner}.{fused}.weight"] = torch.cat(values)
    return shard


def meta_logits(shards: list[dict[str, Tensor]], config: ModelConfig, ids: Tensor) -> Tensor:
    """A plain reading of Meta's architecture: every shard computes its heads and columns; pairs turn as complex numbers."""
    length, head = len(ids), config.head_width
    angles = torch.outer(torch.arange(length).float(), config.rope_theta ** -(torch.arange(0, head, 2).float() / head))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    def attention(x: Tensor, n: int) -> Tensor:
        total = torch.zeros_like(x)
        for shard in shards:
            w = {k.removeprefix(f"layers.{n}.attention."): v for k, v in shard.items()}
            q, k, v = (F.linear(x, w[f"w{name}.weight"]).unflatten(-1, (-1, head)) for name in "qkv")
            q, k = (
                F.layer_norm(y, (head,), w[f"{name}_normalization.weight"], w[f"{name}_normalization.bias"])
                for name, y in (("q", q), ("k", k))
            )
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
                for y in (q, k)
            )
            group = q.shape[1] // k.shape[1]
            out = torch.empty_like(q)
            for h in range(q.shape[1]):
                scores = q[:, h] @ k[:, h // group].T / head**0.5
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
                out[:, h] = scores.softmax(-1) @ v[:, h // group]
            total += F.linear(out.flatten(1), w["wo.weight"])
        return total

    def ffn(x: Tensor, n: int) -> Tensor:
        total = torch.zeros_like(x)
        for shard in shards:
            w1, w2, w3 = (shard[f"layers.{n}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
            total += (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        return total

    x = torch.cat([shard["tok_embeddings.weight"][ids] for shard in shards], dim=-1)
    first = shards[0]
    for n in range(config.layers):
        norms = [first[f"layers.{n}.{kind}_norm.weight"] for kind in ("attention", "ffn")]
        for work, weight in zip((attention, ffn), norms, strict=True):
            x = x + (rms(work(x, n), weight) if config.norm_order == "swin" else work(rms(x, weight), n))
    x = rms(x, first["norm.weight"])
    return torch.cat([x @ shard["output.weight"].T for shard in shards], dim=-1)


def shards_of(ours: Mapping[str, Tensor], config: ModelConfig, count: int, **how: bool) -> list[dict[str, Tensor]]:
    """What `to_meta` gives, shard by shard."""
    actual: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for number, name, value in to_meta(ours, config, count, **how):
        actual[number][name] = value
    return actual


def loaded(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_a_plain_reading_of_metas(shape: tuple[int, int, int], norm_order: str) -> None:
    config = config_for(*shape, norm_order)
    shards = random_shards(config)
    model = loaded(config, dict(from_meta(shards, config)))
    ids = torch.randint(0, IDS, (19,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(model(ids[None]))[0], meta_logits(shards, config, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_faces(shape: tuple[int, int, int], norm_order: str) -> None:
    config = config_for(*shape, norm_order)
    model = loaded(config, dict(from_meta(random_shards(config), config)))
    theirs = ChameleonForConditionalGeneration(config_of(config, attn_implementation="eager")).eval()
    picture_part = {name: value for name, value in theirs.state_dict().items() if ".vqmodel." in name}  # not asked here
    theirs.load_state_dict({**dict(to_hf(model.state_dict(), config)), **picture_part})
    ids = torch.randint(0, IDS, (3, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    ours = model.logits(model(ids))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fused", [False, True])
def test_there_and_back_gives_the_same_bytes(shape: tuple[int, int, int], fused: bool) -> None:
    config = config_for(*shape)
    shards = [{k: v.bfloat16() for k, v in shard.items()} for shard in random_shards(config)]
    if fused:
        shards = [fuse(shard, config.layers) for shard in shards]
    ours = dict(from_meta(shards, config))
    for back, shard in zip(shards_of(ours, config, len(shards), fused=fused), shards, strict=True):
        assert back.keys() == shard.keys() - {"rope.freqs"}
        assert all(torch.equal(back[name], shard[name]) and back[name].dtype == torch.bfloat16 for name in back)
    theirs = dict(to_hf(ours, config))
    again = dict(from_hf(theirs, config))
    assert list(again) == list(ours) and all(torch.equal(again[name], ours[name]) for name in ours)


def test_resharding() -> None:
    config = config_for(8, 8, 1)
    ours = dict(from_meta(random_shards(config), config))
    four = shards_of(ours, config, 4)
    wide = config_for(8, 8, 4)
    ids = torch.randint(0, IDS, (1, 9))
    one, other = loaded(config, ours), loaded(wide, dict(from_meta(four, wide)))
    torch.testing.assert_close(other(ids), one(ids), atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="4 QK-norm rows do not go into 2 shards"):
        shards_of(from_meta(four, wide), wide, 2)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 3))
def test_rotary_orders(heads: int, half: int, more: int) -> None:
    rows = torch.arange(heads * half * 2 * (more + 1)).reshape(heads * half * 2, more + 1)
    halves = pairs_to_halves(rows, heads)
    assert torch.equal(halves_to_pairs(halves, heads), rows)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            assert torch.equal(halves[start + i], rows[start + 2 * i])
            assert torch.equal(halves[start + half + i], rows[start + 2 * i + 1])


def test_tied_head() -> None:
    config = config_for(8, 8, 1, tied_head=True)
    model = random_model(IDS, tied_head=True)
    state = model.state_dict()
    theirs = dict(to_hf(state, model.config))
    assert "lm_head.weight" not in theirs
    again = dict(from_hf(theirs, model.config))
    assert torch.equal(again["head.weight"], state["embed.weight"])
    shard = random_shards(config)[0]
    del shard["output.weight"]
    ours = dict(from_meta([shard], config))
    assert torch.equal(ours["head.weight"], shard["tok_embeddings.weight"])
    untied = config_for(8, 8, 1)
    with pytest.raises(BadInput, match=r"shard 00: tensor output.weight is missing"):
        dict(from_meta([shard], untied))


def test_what_does_not_fit_is_named() -> None:
    config = config_for(8, 8, 2)

    def message(change: Any, **more: Any) -> str:
        shards = random_shards(config)
        change(shards)
        with pytest.raises(BadInput) as error:
            dict(from_meta(shards, config, **more))
        return str(error.value)

    name = "layers.1.attention.wk.weight"
    assert f"shard 01: tensor {name} is missing" in message(lambda s: s[1].pop(name))
    assert "shard 00: tensor extra" in message(lambda s: s[0].update(extra=torch.ones(1)))
    assert f"{name} is [31, 64], expected [32, 64]" in message(lambda s: s[0].update({name: s[0][name][1:]}))
    assert "dtype torch.int64" in message(lambda s: s[0].update({name: s[0][name].long()}))
    assert "2 QK-norm rows, 1 shards" in message(lambda s: s.pop(), where="f.pth")
    theirs = dict(to_hf(dict(from_meta(random_shards(config), config)), config))
    key = "model.layers.0.self_attn.q_norm.bias"
    theirs[key] = theirs[key] + torch.arange(8.0)[:, None]
    with pytest.raises(BadInput, match=r"q_norm.bias differs within its 2 shards"):
        dict(from_hf(theirs, config))
    with pytest.raises(BadInput, match=r"tensor lm_head.weight is missing"):
        dict(
            from_hf({k: v for k, v in theirs.items() if k not in ("lm_head.weight", key)} | {key: theirs[key] * 0}, config)
        )


def test_norms_that_differ_between_shards_are_averaged() -> None:
    config, notes = config_for(8, 8, 2), []
    shards = random_shards(config)
    shards[1]["norm.weight"] = shards[1]["norm.weight"] + 1
    ours = dict(from_meta(shards, config, notes=notes))
    torch.testing.assert_close(ours["norm.weight"], shards[0]["norm.weight"] + 0.5)
    assert notes == ["norm.weight differs between shards: averaged, as Hugging Face's own converter does"]


@pytest.mark.parametrize("name", ["7b", "34b"])
def test_full_sizes_map_completely(name: str) -> None:
    """Every tensor of the released sizes, without memory: the keys and shapes Hugging Face's model has."""
    config = named_size(name)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
        theirs = ChameleonForConditionalGeneration(config_of(config)).state_dict()
    ours = {key: value.shape for key, value in to_hf(state, config)}
    assert ours == {key: value.shape for key, value in theirs.items() if ".vqmodel." not in key}
