"""Checkpoints on disk: Meta's and Hugging Face's files, read, written, there and back, and what is wrong with them named.

The checkpoints are made here, by the formats' own rules and with none of our writers.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from conftest import TEXT, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from test_convert_layout import config_for, fuse, meta_logits, random_shards
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, ChameleonForConditionalGeneration, ChameleonProcessor

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.convert.convert import convert
from chameleon.convert.meta import rope_frequencies
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.files import read_json, sha256_of
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.sampling import GREEDY
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import TorchFile
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.json_text import JsonTextTokenizer, to_json_text
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.vocabulary import Vocabulary

CODES = 40
SIZE = 512  # rows of the embedding: more than there are names
VQ = VQGANConfig(
    resolution=8,
    channels=32,
    multipliers=(1, 1),
    res_blocks=1,
    latent_channels=8,
    codebook_size=CODES,
    codebook_width=4,
)


# --- a checkpoint as Meta publishes one ------------------------------------------------------------------------------


def image_piece(code: int) -> str:
    return "IMGIMG" + str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) + "Z"


def meta_tokenizer(order: list[int] | None = None, reserved: Iterable[int] = range(8700, 8712)) -> dict[str, Any]:
    """A tokenizer.json of the published structure: specials, image pieces, reserved pieces, byte-level text.

    `order`: the code of each image piece, by id. `reserved`: numbers in the names of reserved pieces.
    """
    splits = [
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
    ]
    output = tokenizers.Tokenizer(models.BPE())
    output.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    output.train_from_iterator(TEXT * 5, trainer)
    output.decoder = decoders.ByteLevel()
    learned = json.loads(output.to_str())
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_piece, order or range(CODES)), "<eoss>", "<racm3:break>"]
    names += [f"<reserved{number:05d}>" for number in reserved]
    specials = [name for name in names if not name.startswith("IMGIMG")]
    names += sorted(learned["model"]["vocab"], key=lambda piece: learned["model"]["vocab"][piece])
    learned["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    learned["added_tokens"] = [{"id": names.index(name), "content": name, **flags, "special": True} for name in specials]
    return learned


def random_vqgan(seed: int = 0) -> dict[str, Tensor]:
    """Weights under the published names. The shapes are held elsewhere against the published configuration."""
    random = torch.Generator().manual_seed(seed)
    state = VQGAN(VQ).released_state_dict()
    return {name: torch.randn(value.shape, generator=random) * (value[0].numel() ** -0.5 if value.dim() > 1 else 0.3)
            for name, value in state.items()}  # fmt: skip


def meta_folder(place: Path, config: ModelConfig, *, fused: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A folder in Meta's format with random weights, `config.qk_norm_shards` files of them."""
    shards = random_shards(config)
    for shard in shards:
        shard["rope.freqs"] = config.rope_theta ** -(torch.arange(0, config.head_width, 2).float() / config.head_width)
    shards = [{name: value.to(dtype) for name, value in shard.items()} for shard in shards]
    if fused:
        shards = [fuse(shard, config.layers) for shard in shards]
    model, tokens = place / "models" / "small", place / "tokenizer"
    model.mkdir(parents=True)
    tokens.mkdir()
    params = {
        "model": {
            "dim": config.width,
            "n_layers": config.layers,
            "n_heads": config.heads,
            "n_kv_heads": config.kv_heads,
            "multiple_of": 1,
            "ffn_dim_multiplier": (config.ffn_width + 0.5) / int(8 * config.width / 3),
            "norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "vocab_size": -1,
            "qk_normalization": True,
            "swin_norm": config.norm_order == "swin",
        }
    }
    (model / "params.json").write_text(json.dumps(params))
    (model / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(shards)}))
    for number, shard in enumerate(shards):
        name = "consolidated.pth" if len(shards) == 1 else f"consolidated.{number:02d}.pth"
        torch.save(shard, model / name)
    (tokens / "text_tokenizer.json").write_text(json.dumps(meta_tokenizer()))
    torch.save({"state_dict": random_vqgan()}, tokens / "vqgan.ckpt")
    network = {
        "double_z": False,
        "z_channels": VQ.latent_channels,
        "resolution": VQ.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": VQ.channels,
        "ch_mult": list(VQ.multipliers),
        "num_res_blocks": VQ.res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    values = {"embed_dim": VQ.codebook_width, "n_embed": CODES, "ddconfig": network, "lossconfig": {"target": "x"}}
    (tokens / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": values}}))
    return place


def small(heads: int = 8, kv_heads: int = 8, shards: int = 1, norm_order: str = "pre", **more: Any) -> ModelConfig:
    return config_for(heads, kv_heads, shards, norm_order, vocab_size=SIZE, **more)


def meta_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """File → name → tensor of all pickles below a folder."""
    actual = {}
    for path in sorted([*folder.rglob("*.pth"), *folder.rglob("*.ckpt")]):
        value = torch.load(path, weights_only=True)
        actual[path.name] = value.get("state_dict", value)
    return actual


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def same_file(name: str, *folders: Path) -> bool:
    return len({(folder / name).read_bytes() for folder in folders}) == 1


def weights_in(path: Path) -> dict[str, Tensor]:
    """Return copies: the library may map the file, which tests then overwrite."""
    return {name: value.clone() for name, value in load_file(path).items()}


def hf_weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in weights_in(path).items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return meta_folder(tmp_path_factory.mktemp("published") / "data", small())


@pytest.fixture(scope="module")
def exported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    convert(published, folder / "bundle", "bundle")
    convert(folder / "bundle", folder / "hf", "hf")
    return folder


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 2, 2), (8, 8, 8)])
@pytest.mark.parametrize("fused", [False, True])
def test_meta_to_bundle_to_meta_gives_the_same_bytes(shape: tuple[int, int, int], fused: bool, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "in", small(*shape, "swin"), fused=fused, dtype=torch.bfloat16)
    convert(source, tmp_path / "bundle", "bundle")
    convert(tmp_path / "bundle", tmp_path / "out", "meta")
    before, after = meta_weights(source), meta_weights(tmp_path / "out")
    assert before.keys() == after.keys() and len(before) == shape[2] + 1
    for name in before:
        assert same(before[name], after[name]), name
    text = "tokenizer/text_tokenizer.json"
    assert (source / text).read_bytes() == (tmp_path / "out" / text).read_bytes()
    convert(tmp_path / "out", tmp_path / "again", "bundle")
    for name in ("config.json", "model.safetensors", "image_tokenizer.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes(), name


def independent_hf(shards: list[dict[str, Tensor]], config: ModelConfig) -> dict[str, Tensor]:
    """Meta's weights in Hugging Face's form, by index arithmetic: row i of a head is pair i's first, then its second."""
    head = config.head_width
    halves = [2 * i for i in range(head // 2)] + [2 * i + 1 for i in range(head // 2)]
    result = {
        "model.embed_tokens.weight": torch.cat([shard["tok_embeddings.weight"] for shard in shards], 1),
        "lm_head.weight": torch.cat([shard["output.weight"] for shard in shards]),
        "model.norm.weight": shards[0]["norm.weight"],
    }
    for n in range(config.layers):
        theirs, ours = f"layers.{n}.", f"model.layers.{n}."
        result[ours + "input_layernorm.weight"] = shards[0][theirs + "attention_norm.weight"]
        result[ours + "post_attention_layernorm.weight"] = shards[0][theirs + "ffn_norm.weight"]
        for name, new in (("w1", "gate"), ("w3", "up")):
            result[f"{ours}mlp.{new}_proj.weight"] = torch.cat([s[f"{theirs}feed_forward.{name}.weight"] for s in shards])
        result[ours + "mlp.down_proj.weight"] = torch.cat([s[theirs + "feed_forward.w2.weight"] for s in shards], 1)
        result[ours + "self_attn.o_proj.weight"] = torch.cat([s[theirs + "attention.wo.weight"] for s in shards], 1)
        for name in "qkv":
            rows = torch.cat([s[f"{theirs}attention.w{name}.weight"] for s in shards])
            if name != "v":
                rows = torch.stack([rows[h * head + i] for h in range(len(rows) // head) for i in halves])
            result[f"{ours}self_attn.{name}_proj.weight"] = rows
        for name, heads in (("q", config.heads), ("k", config.kv_heads)):
            for kind in ("weight", "bias"):
                per_head = [
                    s[f"{theirs}attention.{name}_normalization.{kind}"][halves]
                    for s in shards
                    for _ in range(heads // len(shards))
                ]
                result[f"{ours}self_attn.{name}_norm.{kind}"] = torch.stack(per_head)
    return result


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 2, 2), (8, 8, 8)])
def test_meta_to_hugging_face_equals_an_independent_conversion(shape: tuple[int, int, int], tmp_path: Path) -> None:
    config = small(*shape)
    source = meta_folder(tmp_path / "in", config)
    convert(source, tmp_path / "bundle", "bundle")
    convert(tmp_path / "bundle", tmp_path / "hf", "hf")
    convert(source, tmp_path / "straight", "hf")
    shards = [weights for name, weights in meta_weights(source).items() if name.startswith("consolidated")]
    expected = independent_hf(shards, config)
    expected |= {
        f"model.vqmodel.{name}": value for name, value in random_vqgan().items() if not name.startswith("decoder.")
    }
    assert same(hf_weights(tmp_path / "hf"), expected)
    assert same(hf_weights(tmp_path / "straight"), expected)


def test_hugging_face_to_bundle_to_hugging_face_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    convert(exported / "hf", tmp_path / "bundle", "bundle")
    convert(tmp_path / "bundle", tmp_path / "hf", "hf")
    for path in (exported / "hf").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("kv_heads", "shards", "tied"), [(8, 1, False), (8, 1, True), (2, 2, False)])
def test_a_model_trained_in_hugging_faces_format_comes_back(kv_heads: int, shards: int, tied: bool, tmp_path: Path) -> None:
    """Each head's norms are its own there, and a head may be tied: nothing may be averaged or lost."""
    folder = tmp_path / "hf"
    convert(meta_folder(tmp_path / "in", small(8, kv_heads, shards)), folder, "hf")
    values = read_json(folder / "config.json")
    values["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(values))
    state = hf_weights(folder)
    for name, value in state.items():
        if "_norm." in name and "self_attn" in name:
            state[name] = value + torch.randn_like(value) * 0.1
    if tied:
        del state["lm_head.weight"]
        (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        assert "lm_head.weight is missing; is tie_word_embeddings to be true?" in refused(folder, tmp_path)
        (folder / "config.json").write_text(json.dumps(values))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "bundle", "bundle")
    bundle = Bundle.load(tmp_path / "bundle", dtype=torch.float32)
    assert bundle.model.config.qk_norm_shards == 8 and bundle.model.config.tied_head == tied
    convert(tmp_path / "bundle", tmp_path / "back", "hf")
    assert same(hf_weights(tmp_path / "back"), state)
    theirs = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, SIZE, (2, 17))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    ours = Chameleon(bundle).logits(ids)
    seen = ~bundle.vocabulary.mask(image=True)
    torch.testing.assert_close(ours[..., seen], expected[..., seen], atol=1e-4, rtol=0)


def test_names_of_earlier_releases(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported / "hf", folder)
    moved = {}
    for name, value in hf_weights(folder).items():
        new = (
            name.replace("model.vqmodel.", "vq.") if "vqmodel" in name else name.replace("model.", "language_model.model.")
        )
        moved[new if name != "lm_head.weight" else "language_model.lm_head.weight"] = value
    moved["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(moved, folder / "model.safetensors")
    values = read_json(folder / "config.json")
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(values))
    convert(folder, tmp_path / "bundle", "bundle")
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == (
        exported / "bundle" / "model.safetensors"
    ).read_bytes()


def test_an_index_of_several_files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon.tensor_files.MAX_FILE_BYTES", 100_000)
    convert(exported / "bundle", tmp_path / "hf", "hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    assert same(hf_weights(tmp_path / "hf"), hf_weights(exported / "hf"))
    _, report = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    convert(tmp_path / "hf", tmp_path / "bundle", "bundle")
    first = next((tmp_path / "hf").glob("model-00001*"))
    first.unlink()
    with pytest.raises(BadInput, match=f"{first.name}: file is missing"):
        convert(tmp_path / "hf", tmp_path / "other", "bundle")


def test_shards_on_request(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "four", "meta", shards=4)
    convert(tmp_path / "four", tmp_path / "bundle", "bundle")
    weights = meta_weights(tmp_path / "four")
    assert sorted(weights) == [*(f"consolidated.{n:02d}.pth" for n in range(4)), "vqgan.ckpt"]
    config = small(8, 8, 4)
    ids = torch.randint(0, SIZE, (9,))
    ours = Chameleon.load(tmp_path / "bundle", dtype="float32").logits(ids[None])[0]
    shards = [weights[f"consolidated.{n:02d}.pth"] for n in range(4)]
    torch.testing.assert_close(ours, meta_logits(shards, config, ids), atol=1e-4, rtol=0)
    one = [meta_weights(published)["consolidated.pth"]]
    torch.testing.assert_close(ours, meta_logits(one, small(), ids), atol=1e-4, rtol=0)
    with pytest.raises(BadInput, match="does not divide by 3 shards"):
        convert(published, tmp_path / "three", "meta", shards=3)
    assert not (tmp_path / "three").exists()


# --- what Hugging Face's library makes of it -------------------------------------------------------------------------


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_transformers_loads_the_export(norm_order: str, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "in", small(8, 2, 2, norm_order))
    convert(source, tmp_path / "bundle", "bundle")
    convert(tmp_path / "bundle", tmp_path / "hf", "hf")
    theirs, report = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs.eval()
    ours = Chameleon.load(tmp_path / "bundle", dtype="float32")
    v = ours.vocabulary
    picture = PILImage.effect_noise((8, 8), 90).convert("RGB")
    prompt = ours.prompts.token_ids(Document((Image(picture), Text("which style is it?"))))
    seen = ~v.mask(image=True)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([prompt])).logits
        codes = theirs.get_image_tokens(ours.tokenizer.image.preprocess([picture]))
    assert tuple(codes[0].tolist()) == prompt[2 : 2 + math.prod(v.grid)]
    actual = ours.logits(torch.tensor([prompt]))
    torch.testing.assert_close(actual[..., seen], expected[..., seen], atol=1e-4, rtol=0)
    assert torch.equal(actual[..., seen].argmax(-1), expected[..., seen].argmax(-1))
    assert theirs.config.bos_token_id == v.bos and theirs.generation_config.eos_token_id == v.eos

    processor = ChameleonProcessor.from_pretrained(tmp_path / "hf")
    queries = processor(text="<image>which style is it?", images=picture, return_tensors="pt")
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    output = [place if number in v.image_ids else number for number in prompt]
    assert queries["input_ids"][0].tolist() == output
    assert queries["pixel_values"].shape == (1, 3, 8, 8)
    # Meta's code puts <s> at the start itself, and encodes each text with what its tokenizer adds.
    convert(tmp_path / "hf", tmp_path / "back", "meta", tokenizer=source)
    for folder in (source, tmp_path / "back"):
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "text_tokenizer.json"))
        text = library.encode("which style is it?").ids
        assert [v.bos, *prompt[1 : 3 + math.prod(v.grid)], *text, v.sep] == list(prompt)
    torch.testing.assert_close(queries["pixel_values"], ours.tokenizer.image.preprocess([picture]), atol=0.02, rtol=0)
    answer = theirs.generate(**queries, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= len(prompt) + 3


def test_our_own_models_go_to_transformers_and_come_back(text_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    network = VQGAN(VQ)
    network.load_state_dict(random_vqgan())
    tokenizer = MixedTokenizer(text_tokenizer, ImageTokenizer(network))
    bundle = Bundle(random_model(tokenizer.vocabulary.size), tokenizer, "document")
    bundle.save(tmp_path / "bundle", torch.float32)
    convert(tmp_path / "bundle", tmp_path / "hf", "hf")
    convert(tmp_path / "bundle", tmp_path / "meta", "meta")
    convert(tmp_path / "hf", tmp_path / "back", "bundle", tokenizer=tmp_path / "meta" / "tokenizer", prompting="document")
    convert(tmp_path / "meta", tmp_path / "back2", "bundle", prompting="document")
    library = AutoTokenizer.from_pretrained(tmp_path / "hf")
    v = tokenizer.vocabulary
    for text in [*TEXT, "  two  spaces\n\n\tand tabs\t\t", "日本 🎉", "x" * 50, "<s> is text here, as is IMGIMGAZ"]:
        ids = tokenizer.text_to_ids(text)
        if "<s>" not in text:
            assert library(text)["input_ids"] == [v.bos, *ids]
            assert library.decode(ids) == text
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, v.size, (2, 20))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    seen = ~v.mask(image=True)
    models = [Chameleon.load(tmp_path / name, dtype="float32") for name in ("bundle", "back", "back2")]
    torch.testing.assert_close(models[0].logits(ids)[..., seen], expected[..., seen], atol=1e-4, rtol=0)
    queries = Document((Text("orange ▁ heart <pad>"), Image(PILImage.new("RGB", (8, 8), "red"))))
    drawn = [model.draw("orange heart", seed=3).tobytes() for model in models]
    for model, picture in zip(models[1:], drawn[1:], strict=True):
        assert picture == drawn[0]
        assert torch.equal(model.encode(queries), models[0].encode(queries))
        assert torch.equal(model.logits(ids), models[0].logits(ids))


def test_without_a_decoder_drawing_says_what_is_missing(exported: Path, published: Path, tmp_path: Path) -> None:
    convert(exported / "hf", tmp_path / "bundle", "bundle")
    model = Chameleon.load(tmp_path / "bundle")
    picture = PILImage.new("RGB", (8, 8), "blue")
    assert isinstance(model.caption(picture, max_new_tokens=2), str)
    assert not model.generate(Document((Text("hello"),)), max_new_tokens=4).images
    for work in (
        lambda: model.draw("a heart"),
        lambda: model.generate(Document(), max_images=1),
        lambda: model.decode(model.encode(Document((Image(picture),)))),
    ):
        with pytest.raises(
            BadInput, match=r"no decoder, so it encodes images.*--tokenizer, the folder with Meta's vqgan.ckpt"
        ):
            work()
    with pytest.raises(BadInput, match="no decoder, which Meta's format needs"):
        convert(tmp_path / "bundle", tmp_path / "meta", "meta")
    convert(tmp_path / "bundle", tmp_path / "whole", "bundle", tokenizer=published / "tokenizer")
    for name in ("image_tokenizer.safetensors", "image_tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (exported / "bundle" / name).read_bytes()
    other = {**random_vqgan(), "quantize.embedding.weight": torch.randn(CODES, VQ.codebook_width)}
    tokens = tmp_path / "tokenizer"
    shutil.copytree(published / "tokenizer", tokens)
    torch.save({"state_dict": other}, tokens / "vqgan.ckpt")
    with pytest.raises(BadInput, match="its codebook is not the model's"):
        convert(exported / "hf", tmp_path / "no", "bundle", tokenizer=tokens)


def test_weights_without_an_image_tokenizer_take_metas(exported: Path, published: Path, tmp_path: Path) -> None:
    """The language model alone."""
    folder = tmp_path / "hf"
    folder.mkdir()
    values = {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps({**read_json(exported / "hf" / "config.json"), **values}))
    state = {name: value for name, value in hf_weights(exported / "hf").items() if "vqmodel" not in name}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"tokenizer.json: file is missing"):
        convert(folder, tmp_path / "bundle", "bundle")
    shutil.copy(exported / "hf" / "tokenizer.json", folder)
    with pytest.raises(BadInput, match="no image tokenizer in these weights; give the folder of Meta's with --tokenizer"):
        convert(folder, tmp_path / "bundle", "bundle")
    (folder / "tokenizer.json").unlink()
    convert(folder, tmp_path / "bundle", "bundle", tokenizer=published)
    for name in ("config.json", "model.safetensors", "image_tokenizer.safetensors"):
        assert (tmp_path / "bundle" / name).read_bytes() == (exported / "bundle" / name).read_bytes(), name


def test_a_converted_model_is_tuned(exported: Path, tmp_path: Path) -> None:
    PILImage.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    queries = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "which colour?"}]
    messages = [{"role": "user", "content": queries}, {"role": "assistant", "content": [{"type": "text", "text": "red\n"}]}]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    main(["tokenize", str(tmp_path / "c.jsonl"), "--model", str(exported / "bundle"), "--out", str(tmp_path / "shards")])
    settings = {
        "bundle": exported / "bundle",
        "mixture": f"[{{shards: {tmp_path / 'shards'}}}]",
        "context_length": 128,
        "global_batch_size": 4,
        "run.out": tmp_path / "run",
        "run.max_steps": 20,
        "run.precision": "32-true",
        "run.progress": "false",
        "optimizer.kind": "adamw",
        "optimizer.lr": 0.01,
        "optimizer.warmup_steps": 1,
        "validation": "[]",
    }
    main(["finetune", "--config", "emoji-finetune", *(f"{key}={value}" for key, value in settings.items())])
    model = Chameleon.load(tmp_path / "run" / "bundle", dtype="float32")
    assert model.answer(tmp_path / "red.png", "which colour?") == "red"
    assert read_json(tmp_path / "run" / "bundle" / "provenance.json")["source"]["format"] == "meta"
    convert(tmp_path / "run" / "bundle", tmp_path / "hf", "hf")


def test_the_image_head_of_a_converted_model_learns_to_draw(exported: Path, tmp_path: Path) -> None:
    """Of all weights only the head's rows of image codes move, and the model draws what it was shown."""
    PILImage.linear_gradient("L").resize((9, 9)).convert("RGB").save(tmp_path / "shade.png")
    messages = [{"role": "user", "content": [{"type": "text", "text": "draw"}]}]
    messages.append({"role": "assistant", "content": [{"type": "image", "image": "shade.png"}]})
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    start = exported / "bundle"
    main(["tokenize", str(tmp_path / "c.jsonl"), "--model", str(start), "--out", str(tmp_path / "shards")])
    mixture = f"mixture=[{{shards: {tmp_path / 'shards'}, loss: answers}}]"
    settings = [
        "size=null",
        "context_length=128",
        "global_batch_size=4",
        "micro_batch_size=0",
        "num_workers=0",
        "run.max_steps=80",
        "run.precision=32-true",
    ]
    settings += ["optimizer.lr=0.1", "optimizer.warmup_steps=1", "run.progress=false", f"run.out={tmp_path / 'run'}"]
    main(["finetune", "--config", "7b-draw", f"bundle={start}", mixture, *settings])
    before, after = (Bundle.load(folder, dtype=torch.float32) for folder in (start, tmp_path / "run" / "bundle"))
    rounded = {name: value.bfloat16().float() for name, value in before.model.state_dict().items()}
    moved = {name for name, value in after.model.state_dict().items() if not torch.equal(value, rounded[name])}
    assert moved == {"head.weight"}
    model = Chameleon(after)
    drawn = model.draw("draw", guidance_scale=1, sampling=GREEDY)
    expected = after.tokenizer.image.decode(after.tokenizer.image.encode([tmp_path / "shade.png"]))[0]
    assert drawn.tobytes() == expected.tobytes()


# --- the vocabulary --------------------------------------------------------------------------------------------------

json_tokenizer = JsonTextTokenizer(json.dumps(meta_tokenizer()).encode())
STRUCTURE_NAMES = {token["content"] for token in meta_tokenizer()["added_tokens"]} | {"<image>", "<reserved08707>"}
library_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(meta_tokenizer()))


@given(st.text(max_size=60) | st.sampled_from(TEXT))
def test_text_ids_are_the_librarys_and_text_comes_back(text: str) -> None:
    v = json_tokenizer.vocabulary(CODES, (4, 4))
    pieces = json_tokenizer.encode(text)
    ids = [v.text_ids.order[piece] for piece in pieces]
    if not any(name in text for name in STRUCTURE_NAMES):
        assert ids == library_tokenizer.encode(text, add_special_tokens=False).ids
    assert json_tokenizer.decode(pieces) == text
    assert b"".join(json_tokenizer.decode_bytes([piece]) for piece in pieces) == text.encode()


@given(st.text(max_size=60) | st.sampled_from(TEXT))
def test_our_own_tokenizer_in_the_librarys_form(text_tokenizer: SentencePieceTokenizer, text: str) -> None:
    v = text_tokenizer.vocabulary(CODES, (4, 4))
    output = to_json_text(text_tokenizer, v)
    library = tokenizers.Tokenizer.from_str(output.data.decode())
    ids = [v.text_ids.order[piece] for piece in text_tokenizer.encode(text)]
    read = output.vocabulary(CODES, (4, 4))
    assert [read.text_ids.order[piece] for piece in output.encode(text)] == ids
    assert output.decode(output.encode(text)) == text
    if not any(name in text for name in ("\u2581", *STRUCTURE_NAMES)):
        assert library.encode(text, add_special_tokens=False).ids == ids


def test_no_text_spells_structure() -> None:
    value = meta_tokenizer()
    vocab = value["model"]["vocab"]
    for left, right in (("IM", "G"), ("IMG", "IMG"), ("IMGIMG", "A"), ("IMGIMGA", "Z"), ("I", "M")):
        vocab.setdefault(left, len(vocab)), vocab.setdefault(left + right, len(vocab))
        value["model"]["merges"].append([left, right])
    value["model"]["merges"].sort(key=lambda pair: pair != ["I", "M"])
    tokenizer = JsonTextTokenizer(json.dumps(value).encode())
    library = tokenizers.Tokenizer.from_str(json.dumps(value))
    v = tokenizer.vocabulary(CODES, (4, 4))
    text = "<s>an IMGIMGAZ and a <racm3:break></s><reserved08706>"
    assert v.image_start in library.encode(text).ids  # the library lets text through to the pictures
    pieces = tokenizer.encode(text)
    assert tokenizer.decode(pieces) == text
    assert v.is_text(torch.tensor([v.text_ids.order[piece] for piece in pieces])).all()


def test_image_ids_are_found_by_name() -> None:
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(1)).tolist()
    tokenizer = JsonTextTokenizer(json.dumps(meta_tokenizer(order)).encode())
    v = tokenizer.vocabulary(CODES, (4, 4), SIZE)
    assert (v.bos, v.pad, v.eos, v.eoi, v.boi) == (0, 1, 2, 4 + CODES, 5 + CODES)
    assert v.sep == tokenizer.names["<reserved08706>"] and v.size == SIZE
    codes = torch.arange(CODES)
    ids = v.codes_to_ids(codes)
    assert [order[number - 4] for number in ids.tolist()] == codes.tolist()
    assert torch.equal(v.ids_to_codes(ids.view(4, -1)), codes.view(4, -1))
    assert v.image_slice == slice(4, 4 + CODES) and torch.equal(v.mask(image=True).nonzero()[:, 0], ids.sort().values)
    assert Vocabulary.from_json(v.to_json()) == v
    unused = [tokenizer.names["<reserved08700>"], tokenizer.names["<unk>"], SIZE - 1]
    assert not v.mask(text=True, image=True, specials=v.specials)[unused].any()


def test_a_model_whose_image_ids_are_shuffled_says_and_draws_the_same(published: Path, tmp_path: Path) -> None:
    """The same model with its image pieces, and the rows of embedding and head, in another order."""
    source = copy_of(published, tmp_path)
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(2))
    path = source / "models" / "small" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name][4 : 4 + CODES] = state[name][4 : 4 + CODES][order].clone()
    torch.save(state, path)
    (source / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(meta_tokenizer(order.tolist())))
    for name, folder in (("plain", published), ("shuffled", source)):
        convert(folder, tmp_path / name, "bundle")
    plain, permuted = (Chameleon.load(tmp_path / name, dtype="float32") for name in ("plain", "shuffled"))
    pictures = [model.draw("orange heart", sampling=GREEDY, guidance_scale=2.0) for model in (plain, permuted)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert plain.caption(pictures[0], max_new_tokens=8) == permuted.caption(pictures[0], max_new_tokens=8)
    queries = Document((Image(pictures[0]), Text("hello")))
    assert not torch.equal(plain.encode(queries), permuted.encode(queries))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_shuffled_image_ids_come_back(data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(CODES)))
    v = JsonTextTokenizer(json.dumps(meta_tokenizer(list(order))).encode()).vocabulary(CODES, (4, 4))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, CODES - 1), min_size=1, max_size=16)))
    assert torch.equal(v.ids_to_codes(v.codes_to_ids(codes)), codes)


def wrong_tokenizer(change: Callable[[dict[str, Any]], object]) -> str:
    value = meta_tokenizer()
    change(value)
    with pytest.raises(BadInput) as error:
        JsonTextTokenizer(json.dumps(value).encode()).vocabulary(CODES, (4, 4))
    return str(error.value)


def test_pieces_decode_as_the_library_does() -> None:
    value = meta_tokenizer()
    value["model"]["vocab"]["日本"] = len(value["model"]["vocab"])  # no byte-level name, yet some tokenizers have such
    tokenizer = JsonTextTokenizer(json.dumps(value).encode())
    library = tokenizers.Tokenizer.from_str(json.dumps(value))
    for piece, number in enumerate(tokenizer.text_ids):
        assert tokenizer.decode([piece]) == library.decode([number])


def test_added_tokens_keep_their_ids_and_nothing_is_cut() -> None:
    value = meta_tokenizer()
    count = len(value["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [("<extra>", True), ("foo_one", False), ("bar_two", False)]
    value["added_tokens"] += [{"id": count + n, "content": c, **flags, "special": s} for n, (c, s) in enumerate(more)]
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = JsonTextTokenizer(json.dumps(value).encode())
    library = tokenizers.Tokenizer.from_str(json.dumps({**value, "truncation": None}))
    v = tokenizer.vocabulary(CODES, (4, 4))
    pieces = tokenizer.encode("a foo_one and bar_two here")
    assert [v.text_ids.order[piece] for piece in pieces] == library.encode("a foo_one and bar_two here").ids
    assert tokenizer.decode(pieces) == "a foo_one and bar_two here"


def test_wrong_tokenizers_are_named() -> None:
    def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
        def change(value: dict[str, Any]) -> None:
            vocab = value["model"]["vocab"]
            vocab[new] = vocab.pop(old)
            value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != old]

        return change

    assert "40 image pieces, but none is IMGIMGHZ, code 7; their codes must be 0…n−1" in wrong_tokenizer(
        rename("IMGIMGHZ", "IMGIMGHHHZ")
    )
    assert "two image pieces for code 7" in wrong_tokenizer(rename("IMGIMGDZ", "IMGIMGAHZ"))
    assert "no piece <racm3:break>" in wrong_tokenizer(rename("<racm3:break>", "<boi>"))
    assert "a WordPiece tokenizer; only BPE is supported" in wrong_tokenizer(lambda v: v["model"].update(type="WordPiece"))
    assert "neither byte-level nor with byte pieces" in wrong_tokenizer(
        lambda v: v.update(decoder=None, pre_tokenizer=None)
    )
    assert "not a tokenizer" in wrong_tokenizer(lambda v: v.pop("model"))
    assert "overlap" in wrong_tokenizer(lambda v: v["model"]["vocab"].update({"<eoss>": 0}) or v.update(added_tokens=[]))


# --- what is wrong with files ----------------------------------------------------------------------------------------


def copy_of(published: Path, place: Path) -> Path:
    return shutil.copytree(published, place / "data")


def refused(source: Path, tmp_path: Path, to: str = "bundle", **options: Any) -> str:
    with pytest.raises(BadInput) as error:
        convert(source, tmp_path / "out", to, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    text = str(error.value)
    assert "\n" not in text
    return text


class Bomb:
    """Pickled, it touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(published: Path, tmp_path: Path) -> None:
    source = copy_of(published, tmp_path)
    path, sign = source / "models" / "small" / "consolidated.pth", tmp_path / "ran"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "extra": Bomb(sign)}, path)
    assert f"{path}: the pickle would run code or holds other objects than tensors" in refused(source, tmp_path)
    for data in (pickle.dumps({**state, "extra": Bomb(sign)}), random.Random(0).randbytes(5000), b""):
        path.write_bytes(data)
        assert f"{path}: damaged, or not a file of tensors" in refused(source, tmp_path)
    assert not sign.exists()
    torch.save({**state, "step": 3}, path)
    assert "'step' is not a dense tensor" in refused(source, tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert f"{path}: damaged" in refused(source, tmp_path)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # the form before torch 1.6 is read all the same
    convert(source, tmp_path / "old", "bundle")


def test_tensors_that_do_not_fit_are_named(published: Path, tmp_path: Path) -> None:
    source = copy_of(published, tmp_path)
    path = source / "models" / "small" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    name = "layers.1.attention.wk.weight"

    def message(**changes: Any) -> str:
        torch.save({**{key: value for key, value in state.items() if key not in changes}, **{
            key: value for key, value in changes.items() if value is not None}}, path)  # fmt: skip
        return refused(source, tmp_path)

    assert f"tensor {name} is missing" in message(**{name: None})
    assert "tensor more is not of this model" in message(more=torch.ones(1))
    assert f"tensor {name} is [63, 64], expected [64, 64]" in message(**{name: state[name][1:]})
    assert f"tensor {name} is of dtype torch.int8; expected float32" in message(**{name: state[name].to(torch.int8)})
    assert "'rope.more' is not a dense tensor" in message(**{"rope.more": "x"})
    torch.save(state, path)
    pictures = source / "tokenizer" / "vqgan.ckpt"
    weights = random_vqgan()
    torch.save({"state_dict": {**weights, "loss.discriminator.weight": torch.ones(2)}}, pictures)
    actual = convert(source, tmp_path / "fine", "bundle")
    assert actual["notes"] == [f"{pictures}: ignored 1 tensors that are no part of the network"]
    torch.save({"state_dict": {**weights, "decoder.more": torch.ones(2)}}, pictures)
    assert f"{pictures}: tensor decoder.more is not of this model" in refused(source, tmp_path)
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != "encoder.conv_in.bias"}}, pictures)
    assert f"{pictures}: tensor encoder.conv_in.bias is missing" in refused(source, tmp_path)
    torch.save(weights, pictures)
    assert f"{pictures}: has no key state_dict" in refused(source, tmp_path)


@pytest.mark.parametrize("freqs", [None, torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(9000)])
def test_rotary_frequencies_may_be_anything(published: Path, tmp_path: Path, freqs: Any) -> None:
    """Meta's loader does not read them, and tools that write its format put in what they like."""
    source = copy_of(published, tmp_path)
    path = source / "models" / "small" / "consolidated.pth"
    torch.save({**torch.load(path, weights_only=True), "rope.freqs": freqs}, path)
    convert(source, tmp_path / "bundle", "bundle")
    convert(tmp_path / "bundle", tmp_path / "meta", "meta")
    back = meta_weights(tmp_path / "meta")["consolidated.pth"]["rope.freqs"]
    kept = freqs is not None and freqs.numel() < 5000
    assert torch.equal(back, freqs if kept else rope_frequencies(small()))


def test_a_bundle_that_was_tampered_with(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(exported / "bundle", folder)
    state = weights_in(folder / "model.safetensors")

    def message(**changes: Tensor | None) -> str:
        kept = {**state, **changes}
        save_file({name: value for name, value in kept.items() if value is not None}, folder / "model.safetensors")
        value = read_json(folder / "provenance.json")
        value["sha256"] = {path.name: sha256_of(path) for path in folder.iterdir() if path.name in value["sha256"]}
        (folder / "provenance.json").write_text(json.dumps(value))
        return refused(folder, tmp_path, "hf")

    assert "tensor norm.weight is missing" in message(**{"norm.weight": None})
    assert "tensor more is not of this model" in message(more=torch.ones(1))
    assert "tensor norm.weight is [3], expected [64]" in message(**{"norm.weight": torch.ones(3)})
    assert "dtype torch.int64" in message(**{"norm.weight": torch.ones(64).long()})
    (folder / "model.safetensors").write_bytes(b"else")
    assert "file was altered" in refused(folder, tmp_path, "hf")


def test_files_that_are_absent_are_named(tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "data", small(8, 8, 4))
    model, tokens = source / "models" / "small", source / "tokenizer"
    for path, what in (
        (model / "consolidated.01.pth", "consolidated.01.pth: shard is absent, of 4"),
        (model / "consolidated.03.pth", "consolidated.03.pth: shard is absent, of 4"),
        (tokens / "vqgan.yaml", "vqgan.yaml: file is missing"),
        (tokens / "vqgan.ckpt", "vqgan.ckpt: file is missing"),
        (tokens / "text_tokenizer.json", "no text_tokenizer.json here or below; give its folder with --tokenizer"),
    ):
        held = path.with_name("held")
        path.rename(held)
        assert what in refused(source, tmp_path)
        held.rename(path)
    (model / "consolidate_params.json").write_text('{"model_parallel_size": 2}')
    assert "model_parallel_size 2, but 4 files of weights" in refused(source, tmp_path)
    (model / "params.json").write_text('{"model": {"dim": 64')
    assert "params.json: not JSON" in refused(source, tmp_path)
    assert "neither config.json here nor params.json here or below" in refused(tokens, tmp_path)
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path)


def test_consolidated_parameters_come_last(published: Path, tmp_path: Path) -> None:
    """Meta's loader lays `model` over params.json and consolidate_params.json over both."""
    source = copy_of(published, tmp_path)
    path = source / "models" / "small" / "consolidate_params.json"
    path.write_text(json.dumps({"norm_eps": 0.5, "model": {"norm_eps": 0.25}}))
    convert(source, tmp_path / "bundle", "bundle")
    assert read_json(tmp_path / "bundle" / "config.json")["model"]["norm_eps"] == 0.5


def test_a_strangers_provenance_writes_nowhere_else(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "bundle", "bundle")
    path = tmp_path / "bundle" / "provenance.json"
    value = read_json(path)
    for key, wrong in (
        ("name", "../../elsewhere"),
        ("name", ".."),
        ("shards", -1),
        ("shards", "4"),
        ("fused", 3),
        ("frequencies", {"dtype": "float32", "shape": [2], "values": "none"}),
        ("frequencies", [1.0]),
        ("more", 1),
    ):
        path.write_text(json.dumps({**value, "source": {**value["source"], key: wrong}}))
        assert "provenance.json: source cannot be read" in refused(tmp_path / "bundle", tmp_path, "meta")
    path.write_text(json.dumps({**value, "source": "meta"}))
    assert "provenance.json: source cannot be read" in refused(tmp_path / "bundle", tmp_path, "meta")


def test_several_models_are_named_and_one_chosen(published: Path, tmp_path: Path) -> None:
    source = copy_of(published, tmp_path)
    shutil.copytree(source / "models" / "small", source / "models" / "other")
    assert "several models: models/other, models/small; choose with --model-dir" in refused(source, tmp_path)
    assert "there are: models/other, models/small" in refused(source, tmp_path, model_dir="7b")
    for number, name in enumerate(("other", "models/other")):
        convert(source, tmp_path / f"chosen-{number}", "bundle", model_dir=name)
        provenance = read_json(tmp_path / f"chosen-{number}" / "provenance.json")
        assert provenance["source"]["name"] == "other" and provenance["source"]["shards"] == 1


def test_hugging_face_folders_that_do_not_fit(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported / "hf", folder)
    values, state = read_json(folder / "config.json"), hf_weights(folder)

    def with_config(**changes: Any) -> str:
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        text = refused(folder, tmp_path)
        (folder / "config.json").write_text(json.dumps(values))
        return text

    def with_weights(**changes: Any) -> str:
        save_file({**state, **changes}, folder / "model.safetensors")
        text = refused(folder, tmp_path)
        save_file(state, folder / "model.safetensors")
        return text

    moved = {**values["vocabulary_map"], "IMGIMGCZ": 3}
    assert "IMGIMGCZ is id 3, in" in with_config(vocabulary_map=moved)
    assert "quantised" in with_config(quantization_config={"bits": 4})
    assert "lm_head.weight is not the embedding, though" in with_config(tie_word_embeddings=True)
    fewer = {**values["vq_config"], "num_embeddings": 30}
    assert "tensor model.vqmodel.quantize.embedding.weight is [40, 4], expected [30, 4]" in with_config(vq_config=fewer)
    assert "tensor model.more is not of this model" in with_weights(**{"model.more": torch.ones(1)})
    short = state["model.norm.weight"][1:].contiguous()
    assert "tensor model.norm.weight is [63], expected [64]" in with_weights(**{"model.norm.weight": short})
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors: damaged" in refused(folder, tmp_path)


def test_a_conversion_that_is_interrupted_leaves_nothing(published: Path, tmp_path: Path) -> None:
    for to in ("bundle", "hf", "meta"):
        written = 0

        def stop(count: int) -> None:
            nonlocal written
            written += count
            if written > 100_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(published, tmp_path / to, to, progress=stop)  # type: ignore[arg-type]
        assert written > 100_000 and list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(BadInput, match="is there already; name a new folder"):
        convert(published, tmp_path / "there", "bundle")
    with pytest.raises(BadInput, match="lies in the source"):
        convert(published, published / "bundle", "bundle")
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_a_conversion_that_is_stopped_leaves_nothing(published: Path, tmp_path: Path) -> None:
    """SIGTERM ends it cleanly; what SIGKILL leaves is removed by the next one."""
    code = """
import os, signal, sys
from chameleon import tensor_files
from chameleon.cli import main
write = tensor_files.raw_bytes
def stop(value):
    os.kill(os.getpid(), int(sys.argv[1]))
    return write(value)
tensor_files.raw_bytes = stop
main(["convert", sys.argv[2], sys.argv[3], "--to", "bundle"])
"""
    for sign, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        command = [sys.executable, "-c", code, str(int(sign)), str(published), str(tmp_path / "out")]
        assert subprocess.run(command, capture_output=True).returncode in (130, -int(sign))
        assert len(list(tmp_path.iterdir())) == left and not (tmp_path / "out").exists()
    convert(published, tmp_path / "out", "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_verb(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(published), str(tmp_path / "bundle"), "--to", "bundle", "--json"])
    actual = json.loads(capsys.readouterr().out)
    assert actual["from"] == "meta" and actual["vocabulary"] == SIZE and actual["decoder"]
    main(["convert", str(tmp_path / "bundle"), str(tmp_path / "hf"), "--to", "hf"])
    assert "billion parameters, 512 token ids" in capsys.readouterr().out
    main(["info", str(tmp_path / "bundle")])
    assert "image codes           40" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["convert", str(tmp_path / "hf"), str(tmp_path / "bundle"), "--to", "bundle"])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"chameleon convert: {tmp_path / 'bundle'}: is there already; name a new folder"]


def test_bytes_of_progress_are_those_written(published: Path, tmp_path: Path) -> None:
    total, written = [0], [0]
    convert(
        published,
        tmp_path / "bundle",
        "bundle",
        on_total=lambda count: total.__setitem__(0, count),
        progress=lambda count: written.__setitem__(0, written[0] + count),
    )
    assert 0.7 < written[0] / total[0] <= 1  # the rest is what a small file has around its tensors


def test_frequencies_are_metas() -> None:
    config = small()
    expected = 1.0 / (10000.0 ** (torch.arange(0, 8, 2)[:4].float() / 8))
    assert torch.equal(rope_frequencies(config), expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("to", ["bundle", "hf", "meta"])
def test_memory_is_bounded_by_the_largest_tensor(to: str, tmp_path: Path) -> None:
    """About 2 GB of weights in two shards; what the process holds beyond its libraries, at its peak."""
    config = config_for(16, 16, 2, width=2048, ffn_width=5504, layers=14, vocab_size=65536)
    source = meta_folder(tmp_path / "data", config, dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in source.rglob("*.pth"))
    assert size > 1.8e9
    code = (
        "import re, sys; from pathlib import Path; from chameleon.convert.convert import convert; import torch\n"
        "peak = lambda: 1024 * int(re.search('VmHWM:\\\\s+(\\\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "convert(sys.argv[1], sys.argv[2] + '-small', sys.argv[4]); before = peak()\n"  # loads what libraries load late
        "convert(sys.argv[3], sys.argv[2], sys.argv[4]); print(peak() - before)"
    )
    little = meta_folder(tmp_path / "little", small())
    done = subprocess.run(
        [sys.executable, "-c", code, little, tmp_path / "out", source, to], capture_output=True, text=True, check=True
    )
    used, largest = int(done.stdout), 65536 * 2048 * 2
    print(f"{to}: {used / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights, the largest tensor {largest / 1e6:.0f} MB")
    assert used < 2 * largest + 2**28 < largest + 2**30
    if to == "meta":
        assert all(same(meta_weights(source)[name], meta_weights(tmp_path / "out")[name]) for name in meta_weights(source))


def test_incrementally_written_torch_files_are_valid_archives(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "meta", "meta", shards=2)
    files = [*(tmp_path / "meta").rglob("*.pth"), *(tmp_path / "meta").rglob("*.ckpt")]
    assert len(files) == 3
    for path in files:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # every member's checksum is right


def test_torch_files_are_mappings(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.pth")
    actual = TorchFile(tmp_path / "x.pth")
    assert list(actual) == ["a", "b"] and len(actual) == 2 and actual.dtype("b") == torch.bfloat16
    assert torch.equal(actual["a"], torch.arange(4.0))


def test_codes_of_levels_go_into_no_other_format(bundle: Bundle, tmp_path: Path) -> None:
    image = ImageTokenizer(VQGAN(replace(bundle.tokenizer.image.config, levels=(4, 2, 2, 2))))
    Bundle(bundle.model, MixedTokenizer(bundle.tokenizer.text, image), "conversation").save(tmp_path / "levels")
    for to in ("hf", "meta"):
        with pytest.raises(BadInput, match="combinations of levels"):
            convert(tmp_path / "levels", tmp_path / to, to)  # type: ignore[arg-type]
        assert not (tmp_path / to).exists()
