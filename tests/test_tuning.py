"""What learns when only a part does, the shipped recipes, and the paper's tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import random_model, recipe_file

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.errors import BadInput
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.adapters import LoraConfig, add_lora, fold_adapters
from chameleon.train.recipe import SHIPPED, FinetuneRecipe, FitImageRecipe, PipelineRecipe, PretrainRecipe, read_recipe
from chameleon.train.run import train


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: MixedTokenizer) -> Path:
    """A recipe that tunes a random bundle."""
    Bundle(random_model(tokenizer.vocabulary.size), tokenizer).save(tmp_path / "start")
    path = recipe_file(tmp_path, tokenizer)
    values = yaml.safe_load(path.read_text())
    del values["tokenizers"], values["size"], values["model"]
    values |= {"bundle": str(tmp_path / "start")}
    values["run"] |= {"max_steps": 12}
    values["mixture"][0]["loss"] = "answers"
    path.write_text(yaml.safe_dump(values))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Bundle.load(folder, dtype=torch.float32).model.state_dict())


def test_the_image_head_alone_learns(recipe: Path, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Only the head's rows of image codes move, and what they are asked for they learn."""
    values = yaml.safe_load(recipe.read_text())
    values["mixture"][0]["loss"] = "all"
    recipe.write_text(yaml.safe_dump(values))
    _, figures = train(read_recipe(FinetuneRecipe, recipe, ["trainable=image_head", "optimizer.weight_decay=0.1"]))
    before, after = weights(tmp_path / "start"), weights(tmp_path / "run" / "bundle")
    ids = tokenizer.vocabulary.image_ids.ids
    for name, value in before.items():
        if name == "head.weight":
            rest = torch.ones(len(value), dtype=torch.bool)
            rest[ids] = False
            assert torch.equal(after[name][rest], value[rest])
            assert ((after[name][ids] - value[ids]).abs().amax(1) > 0).all()
        else:
            assert torch.equal(after[name], value), name
    model = Bundle.load(tmp_path / "start", dtype=torch.float32)
    assert figures["train/image_loss"] < 0.9 * float(first_loss(model, recipe))


def first_loss(bundle: Bundle, recipe: Path) -> torch.Tensor:
    """Mean loss of the image codes of the first document."""
    from chameleon.data.token_shards import open_shards

    folder = Path(yaml.safe_load(recipe.read_text())["mixture"][0]["shards"])
    ids = torch.from_numpy(open_shards(folder)[0][0])
    losses = torch.nn.functional.cross_entropy(
        bundle.model.logits(bundle.model(ids[None, :-1]))[0], ids[1:], reduction="none"
    )
    return losses[bundle.vocabulary.modality(ids[1:]) == 1].mean()


def test_lora_is_folded_into_the_weights(recipe: Path, tmp_path: Path) -> None:
    """The bundle's matrices are the old ones plus alpha / rank · B A, by the adapters of the last checkpoint."""
    changes = ["trainable=lora", "lora.rank=3", "lora.alpha=6", "run.save_every_n_steps=11", "optimizer.schedule=constant"]
    bundle, _ = train(read_recipe(FinetuneRecipe, recipe, changes))
    assert bundle is not None
    before, after = weights(tmp_path / "start"), bundle.model.state_dict()
    assert before.keys() == after.keys()
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    kept = SafetensorsFiles({name: file for file in folder.glob("*.safetensors") for name in names_of(file)})
    adapters = [name for name in kept if name.startswith("module.")]
    assert len(adapters) == 2 * 4 * 2 and all(".lora_" in name for name in adapters)  # the frozen weights are not kept
    for name, value in after.items():
        stem = f"module.objective.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.default.weight" in kept:
            product = kept[f"{stem}B.default.weight"] @ kept[f"{stem}A.default.weight"] * 2.0
            assert product.abs().max() > 0.01
            torch.testing.assert_close(value, before[name] + product, atol=0.05, rtol=0.0)  # a step later
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


def names_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_adapters_change_nothing_until_they_learn() -> None:
    model, plain = random_model(30), random_model(30)
    add_lora(model, LoraConfig(rank=2))
    ids = torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(model(ids), plain(ids))
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1))
    moved = model(ids)
    assert (moved - plain(ids)).abs().max() > 0.1
    fold_adapters(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(model(ids), moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainable=lora", "lora.targets=[qkw]"], "no matrix 'qkw'"),
        (["trainable=lora", "lora.rank=0"], "expected rank of 1 or more"),
        (["trainable=lora", "codebook_rows=true"], "does not go with trainable=lora"),
        (["size=7b"], "the recipe is for 7b, whose layers is 32; the bundle's is 2"),
        (["bundle=nowhere"], "no bundle here"),
        (["context_length=97"], "exceeds"),
    ],
)
def test_what_cannot_be_tuned_is_named(changes: list[str], message: str, recipe: Path) -> None:
    with pytest.raises(BadInput, match=message):
        train(read_recipe(FinetuneRecipe, recipe, changes))


def test_the_papers_tuning(recipe: Path) -> None:
    """arXiv 2405.09818, 3: cosine from 1e-5, weight decay 0.1, batch 128, up to 4096, dropout 0.05, the same z-loss."""
    for size in ("7b", "34b"):
        tuning = read_recipe(FinetuneRecipe, f"{size}-finetune")
        optimizer = tuning.optimizer
        assert (optimizer.kind, optimizer.lr, optimizer.schedule, optimizer.min_lr_ratio) == ("adamw", 1e-5, "cosine", 0.0)
        assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.1, 0)
        assert (tuning.global_batch_size, tuning.context_length, tuning.model, tuning.z_loss) == (
            128,
            4096,
            {"dropout": 0.05},
            1e-5,
        )
        assert tuning.balance_modalities and all(source.loss == "answers" for source in tuning.mixture)


def test_a_recipe_whose_bundle_is_not_there_is_planned_by_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "7b-lora", "--device", "h100", "--json"])
    planned = capsys.readouterr()
    assert "its bundle does not exist yet" in planned.err and json.loads(planned.out)["parameters"] > 6.9e9


KINDS: dict[str, Any] = {"pretrain": PretrainRecipe, "image": FitImageRecipe}


def kind_of(name: str) -> Any:
    is_pipeline = (SHIPPED / f"{name}-finetune.yaml").exists()
    return KINDS.get(name.rpartition("-")[2], PipelineRecipe if is_pipeline else FinetuneRecipe)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_parses(name: str) -> None:
    recipe = read_recipe(kind_of(name), name)
    if isinstance(recipe, PipelineRecipe):
        recipe.validate()


@pytest.mark.parametrize("changes", [["bundle=here"], ["image=null"], ["text_pieces=0"]])
def test_a_pipeline_begins_with_a_bundle_or_makes_one(changes: list[str]) -> None:
    with pytest.raises(BadInput, match="give either bundle"):
        read_recipe(PipelineRecipe, "demo", changes).validate()


@pytest.mark.parametrize(
    "name",
    [
        "7b-pretrain",
        "34b-pretrain",
        "7b-finetune",
        "34b-finetune",
        "7b-lora",
        "7b-draw",
        "lumina-finetune",
        "lumina-lora",
        "demo-pretrain",
    ],
)
def test_a_step_of_each_recipe_at_reduced_width_and_depth(name: str, recipe: Path, tmp_path: Path) -> None:
    """All as the recipe says but for sizes, places and devices; sharding, precision and checkpointing stay."""
    recipe_values = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    sources = [{**source, "shards": str(tmp_path / source.get("name", "one"))} for source in recipe_values["mixture"]]
    for number, source in enumerate(sources):
        source.setdefault("name", f"source-{number}")
        source["shards"] = str(tmp_path / source["name"])
        shutil.copytree(tmp_path / "shards", source["shards"])
    small = {"layers": 2, "width": 64, "heads": 8, "kv_heads": 4, "ffn_width": 64, "context_length": 96}
    recipe_values |= {
        "mixture": sources,
        "context_length": 48,
        "global_batch_size": 4,
        "compile": False,
        "num_workers": 0,
        "verify_shards": True,
    }
    recipe_values["micro_batch_size"] = min(1, recipe_values.get("micro_batch_size", 0))
    recipe_values["run"] |= {
        "out": str(tmp_path / "run"),
        "max_steps": 2,
        "devices": 1,
        "tensor_parallel_size": 1,
        "progress": False,
    }
    if "tokenizers" in recipe_values:
        recipe_values |= {"tokenizers": str(tmp_path / "tokenizers"), "model": small}
    else:
        recipe_values |= {"bundle": str(tmp_path / "start"), "size": None, "balance_modalities": False}
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps(recipe_values))
    main(["pretrain" if "tokenizers" in recipe_values else "finetune", "--config", str(path)])
    trained = Bundle.load(tmp_path / "run" / "bundle")
    if "tokenizers" in recipe_values:
        config = trained.model.config
        assert (config.norm_order, config.dropout > 0) == {"34b": ("swin", False), "7b": ("pre", True)}.get(
            recipe_values["size"], ("pre", False)
        )
    assert all(value.isfinite().all() for value in trained.model.state_dict().values())
