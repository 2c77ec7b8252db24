"""Lumina-mGPT's checkpoints: made here by the format's own rules, read, drawn with as its loop draws, and written back."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from test_convert import hf_weights, meta_folder, meta_tokenizer, same, small
from test_dialect import plain_loop
from torch import Tensor
from transformers import ChameleonForConditionalGeneration

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.convert.convert import convert, detect_format
from chameleon.convert.lumina import MAX_RATIO, UNITS, shapes, stated_side
from chameleon.dialect import SizedDialect
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.image_requests import Drawing, image_request
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.model.config import ModelConfig

RESERVED = list(chain(range(8700, 8712), [8799], range(8801, 8865)))


def lumina_folder(place: Path, config: ModelConfig, *, tied: bool = False) -> tuple[Path, Path]:
    """A checkpoint in their format with random weights, and the folder of Meta's tokenizers."""
    meta = meta_folder(place / "meta", config)
    tokenizer = meta_tokenizer(reserved=RESERVED)
    (meta / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(tokenizer))
    random = torch.Generator().manual_seed(0)
    width, head, ffn = config.width, config.width // config.heads, config.ffn_width
    rows = {"q": config.heads * head, "k": config.kv_heads * head, "v": config.kv_heads * head}
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for n in range(config.layers):
        layer = f"model.layers.{n}."
        sizes |= {f"{layer}self_attn.{name}_proj.weight": (count, width) for name, count in rows.items()}
        sizes[layer + "self_attn.o_proj.weight"] = (width, width)
        for norm in ("q_norm", "k_norm"):  # a row for each model-parallel shard, not for each head
            sizes |= {f"{layer}self_attn.{norm}.{kind}": (config.qk_norm_shards, head) for kind in ("weight", "bias")}
        sizes |= {f"{layer}mlp.{name}_proj.weight": (ffn, width) for name in ("gate", "up")}
        sizes[layer + "mlp.down_proj.weight"] = (width, ffn)
        sizes |= {f"{layer}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    sizes |= {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}
    weights = {name: torch.randn(size, generator=random) * (0.4 if len(size) > 1 else 1) for name, size in sizes.items()}
    folder = place / "Lumina-mGPT-7B-768"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values: dict[str, Any] = {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "attention_bias": False,
        "dropout": 0.05,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": ffn,
        "mask_image_logits": False,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "model_parallel_size": config.qk_norm_shards,
        "model_type": "chameleon",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "swin_norm": config.norm_order == "swin",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "vocab_size": config.vocab_size,
        "vocabulary_map": tokenizer["model"]["vocab"],
        "z_loss_weight": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder, meta


@pytest.fixture(scope="module", params=[(8, 8, 1), (8, 2, 2), (8, 8, 4)], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(the checkpoint, Meta's folder, the bundle), with images of about 2 × 2 cells of 2 × 2 codes."""
    place = tmp_path_factory.mktemp("lumina")
    source, meta = lumina_folder(place, small(*request.param, norm_order="swin" if request.param[2] == 4 else "pre"))
    convert(source, place / "bundle", "bundle", tokenizer=meta, target_side=64)
    return source, meta, place / "bundle"


def repeated(weights: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Their weights as transformers has them: the row of its shard for each head."""
    result = dict(weights)
    for name, value in weights.items():
        for norm, count in (("q_norm", heads), ("k_norm", kv_heads)):
            if f".{norm}." in name:
                result[name] = torch.stack([value[head * len(value) // count] for head in range(count)])
    return result


def test_it_is_recognised_and_comes_back_bit_for_bit(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, bundle = made
    assert detect_format(source) == "lumina"
    convert(bundle, tmp_path / "back", "lumina")
    assert same(hf_weights(tmp_path / "back"), hf_weights(source))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    renamed = configs[1]["vocabulary_map"].pop("<image>")
    configs[1]["vocabulary_map"]["<reserved08707>"] = renamed  # as Hugging Face's file has it
    assert configs[0] == configs[1]


def test_transformers_computes_the_same_with_rows_repeated(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, bundle = made
    convert(bundle, tmp_path / "hf", "hf")
    config = json.loads((source / "config.json").read_text())
    expected = repeated(hf_weights(source), config["num_attention_heads"], config["num_key_value_heads"])
    exported = {name: value for name, value in hf_weights(tmp_path / "hf").items() if "vqmodel" not in name}
    assert same(exported, expected)
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    ours = Chameleon.load(bundle, dtype="float32")
    token_ids = torch.tensor([[ours.vocabulary.bos, *range(60, 90)]])
    seen = ~ours.vocabulary.mask(image=True)  # the library masks the others
    with torch.no_grad():
        logits = theirs(input_ids=token_ids).logits
    torch.testing.assert_close(ours.logits(token_ids)[..., seen], logits[..., seen], atol=2e-4, rtol=1e-4)


def test_how_it_is_asked_and_sampled(made: tuple[Path, Path, Path]) -> None:
    """Prompts have no role words and end with the separator; sizes are in words, width first, and before the codes."""
    model = Chameleon.load(made[2], dtype="float64")
    v, dialect = model.vocabulary, model.vocabulary.dialect
    assert isinstance(dialect, SizedDialect) and (dialect.unit, dialect.target) == (2, 2)
    assert model.bundle.model.config.dropout == 0.05
    assert (model.guidance_scale, model.image_sampling) == (4.0, Sampling(1.0, 1.0, 2000))
    assert (model.edit_guidance_scale, model.edit_sampling.top_k) == (1.0, 200)
    assert v.answer_end == v.sep
    words = "Generate an image of 16x4 according to the following prompt:\nred heart"
    prompt = [v.bos, *model.tokenizer.text_to_ids(words), v.sep]
    drawing = Drawing(model.grid_of((16, 4)))
    request = image_request(model.prompts, "red heart", drawing, seed=0, guidance_scale=4.0, sampling=GREEDY)
    assert list(request.prompt) == prompt
    picture = PILImage.radial_gradient("L").convert("RGB").resize((30, 30))
    block = model.encode_picture(picture)
    image = [*v.started_image(block.code_ids, block.grid), dialect.row_end, v.eoi]
    texts = {
        "Describe the image in detail. ": model.prompts.caption_document(picture),
        "what is {prompt}? ": model.prompts.answer_document(picture, "what is {prompt}?"),
        "make it blue ": model.prompts.edit_document(picture, "make it blue"),
    }
    for text, document in texts.items():
        assert list(model.prompts.token_ids(document)) == [v.bos, *model.tokenizer.text_to_ids(text), *image, v.sep]
    turns = Conversation([Message("user", Document((Text("red"),))), Message("assistant", Document((Image(picture),)))])
    asked = [*turns.messages, Message("user", Document((Text("blue"),)))]
    red, blue = (model.tokenizer.text_to_ids(text) for text in ("red", "blue"))
    assert list(model.prompts.token_ids(Conversation(asked))) == [v.bos, *red, v.sep, *image, v.sep, *blue, v.sep]


def test_a_drawn_picture_is_that_of_their_loop(made: tuple[Path, Path, Path]) -> None:
    model = Chameleon.load(made[2], dtype="float64")
    v, fitter = model.vocabulary, model.tokenizer.fitter
    for size in ((8, 8), (16, 4), (4, 12)):
        grid = fitter.grid_of_size(size)
        request = image_request(model.prompts, "cat", Drawing(grid), seed=0, guidance_scale=4.0, sampling=GREEDY)
        started = [v.boi, *v.dialect.header(grid)]
        expected = [*started, *plain_loop(model, [*request.prompt, *started], 4.0, cell=2)]
        assert model.engine.generate([request]) == [expected]
        drawn = model.draw("cat", size=size, sampling=GREEDY)
        codes = [v.image_ids.index_of[token_id] for token_id in expected if token_id in v.image_ids]
        (decoded,) = model.tokenizer.image.decode(torch.tensor(codes).view(1, *grid))
        assert drawn.size == size and (np.asarray(drawn) == np.asarray(decoded)).all()
    assert model.draw("cat", sampling=GREEDY).size == (8, 8)
    assert model.edit(PILImage.new("RGB", (90, 30)), "blue")[0].size == fitter.size_of(fitter.grid_for((90, 30)))


def test_names_versions_and_what_is_missing(made: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    source, meta, _ = made
    sides = {"Lumina-mGPT-7B-512": 512, "Lumina-mGPT-7B-768-Omni": 768, "Lumina-mGPT-7B-1024": 1024, "Chameleon_7B": None}
    assert {name: stated_side(name) for name in sides} == sides
    assert (shapes(768).target, shapes(768, "2.0").unit, UNITS["1.0"], MAX_RATIO) == (24, 4, 2, 4.0)
    with pytest.raises(BadInput, match="no image tokenizer in these weights"):
        convert(source, tmp_path / "a", "bundle")
    unnamed = tmp_path / "mgpt"
    unnamed.mkdir()
    for path in source.iterdir():
        (unnamed / path.name).symlink_to(path)
    with pytest.raises(BadInput, match="its name does not say the size of images"):
        convert(unnamed, tmp_path / "a", "bundle", tokenizer=meta)
    with pytest.raises(BadInput, match="only for Lumina"):
        convert(meta, tmp_path / "a", "bundle", target_side=512)
    convert(meta, tmp_path / "square", "bundle")
    with pytest.raises(BadInput, match="squares of one size"):
        convert(tmp_path / "square", tmp_path / "a", "lumina")
    main(["convert", str(source), str(tmp_path / "b"), "--to", "bundle", "--tokenizer", str(meta)])
    dialect = Bundle.load(tmp_path / "b").vocabulary.dialect
    assert isinstance(dialect, SizedDialect) and dialect.target == 24
    capsys.readouterr()
