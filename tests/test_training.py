"""Training: what decays, Muon against its formula, rows from the codebook, validation, several processes, the VQGAN."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_VQGAN, random_model, recipe_file
from PIL import Image as PILImage
from torch import distributed, multiprocessing

from chameleon.bundle import Bundle
from chameleon.data.mixture import SourceConfig
from chameleon.data.picture_index import PictureSet, PictureSources
from chameleon.data.token_shards import open_shards
from chameleon.errors import BadInput
from chameleon.model.transformer import Transformer
from chameleon.tokenizers.image import ImageTokenizer, fit_square, load_picture, to_tensor
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.quantizer import MovingAverageCodebook, build_quantizer, nearest
from chameleon.tokenizers.vq_loss import VQLossConfig
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.train.adapters import add_codebook_rows, fold_adapters
from chameleon.train.image_tokenizer import ImageBatchDataset, ImageTokenizerModule, fit_image
from chameleon.train.language_data import TimedLoader
from chameleon.train.language_module import LanguageModule
from chameleon.train.muon import Muon, orthogonalize
from chameleon.train.optimizer import OptimizerConfig, build_optimizers
from chameleon.train.recipe import FitImageRecipe, PretrainRecipe, RunConfig, read_recipe
from chameleon.train.run import train
from chameleon.vocabulary import Modality


def test_matrices_decay_and_norms_do_not() -> None:
    """With zero gradients AdamW only decays: what shrank is what decays."""
    model = random_model(20).requires_grad_(True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    (optimizer,) = build_optimizers(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(value.detach(), before[name] * factor, msg=name)


def test_codebooks_do_not_decay() -> None:
    config = VQGANConfig(resolution=16, channels=8, multipliers=(1, 2), norm_groups=4)
    network = VQGAN(config, build_quantizer("plain", *config.codebook_shape))
    (optimizer,) = build_optimizers(network, OptimizerConfig())
    still = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(network.quantize.embedding.weight) in still
    assert id(network.quant_conv.weight) not in still


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    """Its step is the orthogonal matrix nearest to the gradient, scaled to AdamW's size (arXiv 2502.16982, eq. 4)."""
    model = random_model(20).requires_grad_(True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    muon, adamw = build_optimizers(model, OptimizerConfig(kind="muon", lr=0.01, weight_decay=0.0))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest
    assert taken | rest == {id(p) for p in model.parameters()}
    assert len(taken) == 4 * len(model.blocks)
    assert id(model.embed.weight) in rest
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    for name, value in model.named_parameters():
        step = (before[name] - value.detach()) / 0.01
        if id(value) in taken:
            left, _, right = torch.linalg.svd(value.grad, full_matrices=False)  # the nearest orthogonal is left · right
            expected = left @ right * 0.2 * max(step.shape) ** 0.5
            torch.testing.assert_close(step.norm(), expected.norm(), rtol=0.25, atol=0.0)
            assert torch.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.97, name
        else:
            assert not step.any(), name


def test_codebook_rows_share_and_fold(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    model = random_model(v.size).requires_grad_(True)
    codebook = torch.randn(v.num_image_codes, 5)
    codebook[1] = codebook[0]
    plain = model.embed.weight.detach().clone()
    add_codebook_rows(model, codebook, v)
    assert torch.equal(model.embed.weight, plain)  # starts as nothing
    model.embed(torch.tensor([v.image_start])).sum().backward()
    with torch.no_grad():
        for parameter in model.embed.parametrizations.parameters():
            parameter -= parameter.grad
    moved = (model.embed.weight - plain).detach()
    shared = moved[v.image_start + 1]  # a code with the same entry moves too, though it was not in the batch
    assert shared.abs().min() > 0
    torch.testing.assert_close(moved[v.image_start], shared - 1)
    assert not moved[: v.image_start].any()
    assert not moved[v.text_start :].any()
    ids = torch.randint(0, v.size, (2, 9))
    before = model.logits(model(ids)).detach()
    names = set(random_model(v.size).state_dict())
    fold_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model.logits(model(ids)).detach(), before)


def test_muon_and_codebook_rows_end_in_a_plain_bundle(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = recipe_file(tmp_path, tokenizer)
    trained, figures = train(
        read_recipe(PretrainRecipe, path, ["codebook_rows=true", "optimizer.kind=muon", "run.max_steps=60"])
    )
    again = Bundle.load(tmp_path / "run" / "bundle", dtype=torch.float32).model.state_dict()
    assert set(again) == set(Transformer(trained.model.config).state_dict())
    for name, value in trained.model.state_dict().items():
        assert torch.equal(again[name], value.bfloat16().float()), name
    assert figures["train/text_loss"] < math.log(tokenizer.vocabulary.size) / 2


def test_muon_without_blocks_is_refused() -> None:
    with pytest.raises(BadInput, match="no hidden layer for muon"):
        build_optimizers(torch.nn.Linear(2, 2), OptimizerConfig(kind="muon"))


def test_a_tied_head_has_no_rows_of_its_own(tokenizer: MixedTokenizer) -> None:
    model = random_model(tokenizer.vocabulary.size, tied_head=True)
    with pytest.raises(BadInput, match="tied_head"):
        add_codebook_rows(model, torch.randn(tokenizer.vocabulary.num_image_codes, 5), tokenizer.vocabulary)


# --- the language module ---------------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_all_ids_of_a_modality(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Batches hold different numbers of text ids; the logged mean must weigh ids alike, not batches."""
    path = recipe_file(tmp_path, tokenizer)
    recipe = read_recipe(PretrainRecipe, path, ["run.max_steps=2", "global_batch_size=1"])
    recipe.validation = [SourceConfig(str(tmp_path / "shards"), swap_pairs=False)]
    bundle, figures = train(recipe)
    v, total = tokenizer.vocabulary, {Modality.TEXT: [], Modality.IMAGE: []}
    for number in range(len(shard := open_shards(tmp_path / "shards")[0])):
        ids = torch.from_numpy(shard[number])
        logits = bundle.model.logits(bundle.model(ids[None, :-1]))[0]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        for kind, values in total.items():
            values += nll[v.modality(ids[1:]) == kind].tolist()
    for kind, values in total.items():
        assert figures[f"validation/{kind.name.lower()}_loss"] == pytest.approx(sum(values) / len(values), rel=1e-4)


@pytest.mark.slow
def test_several_processes_train_as_one(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Two processes share the rows of each step; the weights that come out are those of one process."""
    path = recipe_file(tmp_path, tokenizer)
    weights = []
    for devices in (1, 2):
        out = tmp_path / f"on-{devices}"
        settings = [f"run.out={out}", f"run.devices={devices}", "run.accelerator=cpu", "run.max_steps=6"]
        settings += ["optimizer.kind=muon", "codebook_rows=true"]
        command = [sys.executable, "-m", "chameleon.cli", "pretrain", "--config", str(path), *settings]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        weights.append(Bundle.load(out / "bundle", dtype=torch.float32).model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=2e-2, msg=name)


def test_tokens_without_weight_are_in_no_metric(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = recipe_file(tmp_path, tokenizer, image_loss_weight=0.0)
    train(read_recipe(PretrainRecipe, path, ["run.max_steps=1", "run.log_every_n_steps=1"]))
    (row,) = log_of(tmp_path / "run")
    assert math.isnan(float(row["train/image_loss"])) and math.isfinite(float(row["train/text_loss"]))
    chance = math.log(tokenizer.vocabulary.size)
    assert float(row["train/text_log_z"]) == pytest.approx(chance, rel=0.1)
    assert float(row["train/log_z"]) == pytest.approx(chance, rel=0.1)  # zeros of image tokens would bring it down


# --- the image tokenizer's module ------------------------------------------------------------------------------------


def image_recipe(folder: Path, **loss: object) -> FitImageRecipe:
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(12):
        values = generator.integers(0, 256, 3, dtype=np.uint8)
        pixels = np.broadcast_to(values, (16, 16, 3)).copy()
        pixels[4:12, 4:12] = 255 - values
        PILImage.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return FitImageRecipe(
        sources=[f"{folder}/pictures/*.png"],
        validation=[f"{folder}/pictures/*.png"],
        run=RunConfig(
            out=str(folder / "run"),
            max_steps=30,
            log_every_n_steps=1,
            validate_every_n_steps=600,
            progress=False,
            precision="32-true",
        ),
        model=replace(SMALL_VQGAN, codebook_size=16),
        loss=VQLossConfig(discriminator_channels=8, discriminator_layers=1, **loss),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, warmup_steps=0, schedule="constant"),
        global_batch_size=8,
    )


def test_image_tokenizer_learns_and_comes_back(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    trained, figures = fit_image(recipe)
    rows = log_of(tmp_path / "run")
    first, last = (float(rows[place]["train/psnr"]) for place in (0, 29))
    assert last > first + 3
    assert 0 < figures["validation/codebook_usage"] <= 1
    pictures = sorted((tmp_path / "pictures").iterdir())
    again = ImageTokenizer.load(tmp_path / "run")
    assert torch.equal(again.encode(pictures), trained.encode(pictures))
    expected, drawn = trained.preprocess(pictures), trained.network.decode(trained.encode(pictures))
    measured = (10 * torch.log10(4 / (drawn - expected).square().mean((1, 2, 3)))).mean()
    assert float(measured) == pytest.approx(figures["validation/psnr"], abs=0.05)


def test_pictures_that_cannot_be_read_are_named_once_and_others_drawn(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    bad = tmp_path / "pictures" / "bad.png"
    bad.write_bytes((tmp_path / "pictures" / "0.png").read_bytes()[:40])
    with pytest.raises(BadInput, match=r"bad\.png"):
        fit_image(recipe)
    skipped: list[str] = []
    fit_image(recipe, lambda where, why, _=0: skipped.append(where))
    assert 1 <= len(skipped) <= 2 and set(skipped) == {str(bad)}  # in training and in validation
    skipped.clear()
    recipe.num_workers, recipe.run.validate_every_n_steps = 2, 5
    fit_image(recipe, lambda where, why, _=0: skipped.append(where))
    assert skipped == [str(bad)] * 2  # of two processes, and six times in validation
    training = ImageBatchDataset(pictures_of(recipe), recipe, lambda *_: None)
    assert torch.equal(training[3], ImageBatchDataset(pictures_of(recipe), recipe, lambda *_: None)[3])
    recipe.global_batch_size = 9
    training.world = 2
    with pytest.raises(BadInput, match="global_batch_size 9 is not divisible by 2"):
        training[0]


def test_what_a_process_of_the_loader_cannot_read_is_one_line(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    dataset = ImageBatchDataset(pictures_of(recipe), recipe, lambda *_: None)
    for path in (tmp_path / "pictures").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(BadInput) as error:
        next(iter(TimedLoader(dataset, num_workers=1)))
    assert str(error.value) == f"{tmp_path}/pictures/*.png: none of 100 pictures could be read"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "exponential", "min_lr_ratio": 0.0},
            "min_lr_ratio is 0, which an exponential schedule",
        ),
        ({"max_grad_norm": -1.0}, "optimizer.max_grad_norm is -1.0, expected 0 or more"),
        ({"lr": math.nan}, "optimizer.lr is nan, expected 0 or more"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas is [0.9, 1.0], expected numbers from 0 to below 1"),
    ],
)
def test_optimizers_that_cannot_train_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.log_every_n_steps=0", "run.log_every_n_steps is 0, expected 1 or more"),
        ("run.save_every_n_minutes=-1", "run.save_every_n_minutes is -1.0, expected 0 or more"),
        ("stability.window_steps=0", "stability.window_steps is 0, expected 1 or more"),
        ("micro_batch_size=-1", "micro_batch_size is -1, expected 0 or more"),
        ("optimizer={schedule: exponential, min_lr_ratio: 0}", "which an exponential schedule never reaches"),
    ],
)
def test_recipes_with_impossible_numbers_are_refused(
    setting: str, message: str, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), [setting])


def test_a_run_that_ends_during_warm_up_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"ends during warm-up: optimizer.warmup_steps is 4000, run.max_steps 1000"):
        OptimizerConfig().warn_of_warmup(RunConfig().max_steps)


@pytest.mark.slow
def test_image_tokenizer_trains_on_two_processes_with_a_discriminator(tmp_path: Path) -> None:
    """The two halves of a batch teach as one process does the whole; with a discriminator both run to the end."""
    image_recipe(tmp_path)
    settings = ["model.channels=8", "model.multipliers=[1,2,2]", "model.res_blocks=1", "model.latent_channels=8"]
    settings += [
        "model.resolution=16",
        "model.codebook_size=4",
        "model.codebook_width=4",
        "model.norm_groups=4",
    ]  # few codes, of which none dies
    settings += [f"sources=[{tmp_path}/pictures/*.png]", f"validation=[{tmp_path}/pictures/*.png]", "global_batch_size=8"]
    settings += [
        "run.max_steps=12",
        "run.log_every_n_steps=1",
        "run.precision=32-true",
        "run.accelerator=cpu",
        "run.progress=false",
    ]
    settings += ["optimizer.warmup_steps=0", "optimizer.lr=0.003", "optimizer.schedule=constant"]
    results = []
    for devices, adversarial in ((1, 0), (2, 0), (2, 0.5)):
        out = tmp_path / f"{devices}-{adversarial}"
        own = [f"run.devices={devices}", f"loss.adversarial={adversarial}", f"run.out={out}"]
        own += ["loss.discriminator_channels=8", "loss.discriminator_layers=1", "--json"]
        command = [sys.executable, "-m", "chameleon.cli", "fit-image", "--config", "emoji-image", *settings, *own]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1  # one of the processes speaks
        results.append(ImageTokenizer.load(out).network.state_dict())
    moved = []
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=5e-3, rtol=5e-2, msg=name)
        moved.append((results[2][name] - value).abs().max())
    assert max(moved) > 0.02  # the discriminator did teach something else


def teach(rank: int, folder: str) -> None:
    """One of two processes: a codebook that sees half of each batch, and whose codes soon die."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    quantizer = MovingAverageCodebook(6, 2, decay=0.5, revive_below=0.6)  # of a mean of 16 / 6 uses
    quantizer.set_codes(torch.arange(6), torch.arange(12.0).view(6, 2))
    for batch in torch.load(f"{folder}/batches.pt"):
        half = batch[rank::2]
        quantizer.update(half, nearest(half, quantizer.codebook()))
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("is_fast", [True, False])
def test_muon_is_pytorchs_in_either_dtype(monkeypatch: pytest.MonkeyPatch, is_fast: bool) -> None:
    """PyTorch orthogonalises in bfloat16 everywhere; where that is slow, ours differs by bfloat16's rounding alone."""
    monkeypatch.setattr("chameleon.train.muon.fast_bfloat16", lambda *_: is_fast)
    torch.manual_seed(0)
    for shape in ((12, 40), (40, 12), (16, 16)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        mine = Muon([ours], lr=0.1, weight_decay=0.1)
        other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape)
            mine.step()
            other.step()
        tolerance = 1e-6 if is_fast else 0.02
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=tolerance, rtol=tolerance)


def test_orthogonal_matrices_have_singular_values_near_1() -> None:
    torch.manual_seed(0)
    for shape in ((20, 60), (60, 20)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3, torch.float32))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert not orthogonalize(torch.zeros(3, 4), torch.float32).any()


def test_muon_takes_the_kernels_of_hidden_layers() -> None:
    network = VQGAN(SMALL_VQGAN, build_quantizer("plain", *SMALL_VQGAN.codebook_shape))
    muon, adamw = build_optimizers(network, OptimizerConfig(kind="muon"))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | rest == set(names.values()) and not taken & rest
    assert "encoder.mid.block_1.conv1.weight" in taken
    assert {"encoder.conv_in.weight", "decoder.conv_out.weight", "quantize.embedding.weight"} <= rest
    assert all(network.get_parameter(name).ndim == 4 for name in taken)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    network(torch.rand(2, 3, 16, 16))[0].square().mean().backward()
    muon.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == taken


@pytest.mark.slow
def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    """Moving averages over both halves are those of one process on the whole batch, and revived codes are alike."""
    batches = [torch.randn(16, 2, generator=torch.Generator().manual_seed(n)) * 6 for n in range(3)]
    alone = MovingAverageCodebook(6, 2, decay=0.5, revive_below=0.0)
    alone.set_codes(torch.arange(6), torch.arange(12.0).view(6, 2))
    alone.update(batches[0], nearest(batches[0], alone.codebook()))
    for count in (1, 3):
        torch.save(batches[:count], tmp_path / "batches.pt")
        multiprocessing.spawn(teach, (str(tmp_path),), nprocs=2)
        (tmp_path / "meet").unlink(missing_ok=True)
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        for name, value in first.items():
            assert torch.equal(second[name], value), name
        if count == 1:
            kept = alone.uses >= 0.6 * 16 / 6
            assert kept.any() and not kept.all()  # the others were revived
            torch.testing.assert_close(first["uses"][kept], alone.uses[kept])
            torch.testing.assert_close(first["sums"][kept], alone.sums[kept])
            assert all((batches[0][0::2] == code).all(1).any() for code in first["embedding.weight"][~kept])


def test_discriminator_starts_at_its_step(tmp_path: Path) -> None:
    """Before it nothing adversarial is logged; at it the discriminator judges as a fresh one does."""
    recipe = image_recipe(tmp_path, adversarial=0.5, adversarial_start=20)
    fit_image(recipe)
    rows = log_of(tmp_path / "run")
    assert [bool(row.get("train/adversarial")) for row in rows] == [number >= 20 for number in range(30)]
    assert all(float(row["train/adaptive_weight"]) >= 0 for row in rows[20:])
    judged = [float(row["train/discriminator"]) for row in rows[20:]]
    assert judged[0] == pytest.approx(1.0, abs=0.3)  # a fresh one cannot tell: hinge loss of logits near 0
    assert len(set(judged)) == 10


def test_too_few_pictures_for_the_codebook_are_named(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe.model = replace(recipe.model, codebook_size=20_000)
    with pytest.raises(BadInput, match="raise global_batch_size or lower"):
        fit_image(recipe)


def log_of(run: Path) -> list[dict[str, str]]:
    """Rows of a run's log that training wrote."""
    with open(run / "log" / "metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


def test_pictures_are_drawn_by_their_weight(tmp_path: Path) -> None:
    """A field of the records says how often; a picture without it counts once, a weight that is none is named."""
    recipe = image_recipe(tmp_path)
    for number, weight in ((0, 3), (1, 2.0)):
        record = json.dumps({"caption": "a square", "faces": weight})
        (tmp_path / "pictures" / f"{number}.json").write_text(record)
    recipe.weight_field, recipe.scale, recipe.shift, recipe.global_batch_size = "faces", (1.0, 1.0), 0.0, 100
    training = ImageBatchDataset(pictures_of(recipe), recipe)
    colours = {picture.numpy().tobytes(): name for name, picture in originals(recipe).items()}
    drawn = Counter(colours[picture.numpy().tobytes()] for step in range(30) for picture in training[step])
    expected = {f"{number}.png": {0: 3.0, 1: 2.0}.get(number, 1.0) for number in range(12)}
    total = sum(expected.values())
    chi_square = sum((drawn[name] - 3000 * w / total) ** 2 / (3000 * w / total) for name, w in expected.items())
    assert chi_square < 31.3  # 99.9% of 11 degrees of freedom
    (tmp_path / "pictures" / "2.json").write_text(json.dumps({"caption": "a square", "faces": -1}))
    with pytest.raises(BadInput, match=r"2\.png: faces is -1, expected a number above 0"):
        pictures_of(recipe)


def pictures_of(recipe: FitImageRecipe) -> PictureSet:
    sources = PictureSources(recipe.sources, weight_field=recipe.weight_field)
    folder = Path(recipe.run.out) / "pictures" / "training"
    sources.make_index(folder)
    return sources.open(folder)


def originals(recipe: FitImageRecipe) -> dict[str, torch.Tensor]:
    entries = list(pictures_of(recipe))
    pictures = [fit_square(load_picture(entry.source, entry.name), 16) for entry in entries]
    return {Path(entry.name).name: to_tensor([picture])[0] for entry, picture in zip(entries, pictures, strict=True)}


def test_the_average_of_the_weights_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = image_recipe(tmp_path)
    recipe.run.max_steps, recipe.ema_decay, recipe.validation = 6, 0.8, []
    seen: list[torch.Tensor] = []
    step = ImageTokenizerModule.training_step

    def watched(module: ImageTokenizerModule, pictures: torch.Tensor, index: int) -> None:
        step(module, pictures, index)
        seen.append(module.network.quant_conv.weight.detach().clone())

    monkeypatch.setattr(ImageTokenizerModule, "training_step", watched)
    tokenizer, _ = fit_image(recipe)
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(tokenizer.network.quant_conv.weight, expected)
    assert not torch.equal(expected, seen[-1])


def test_a_codebook_is_initialised_from_as_many_pictures_as_it_takes(tmp_path: Path) -> None:
    """Those of 16×16 pixels give 16 latents each; no batch is read beyond the one that completes 32 for each code."""
    recipe = image_recipe(tmp_path)
    module, read = ImageTokenizerModule(recipe), list[int]()

    def batches() -> Iterator[torch.Tensor]:
        for index in range(100):
            read.append(index)
            yield torch.rand(4, 3, 16, 16)

    module.init_codebook(batches())
    latents = recipe.model.codebook_size * 32
    per_picture = math.prod(module.network.config.grid)
    assert len(read) == math.ceil(latents / (4 * per_picture)) < 100


def test_a_codebook_that_collapses_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And revived codes are counted: those whose moving average of uses, taken here step by step, is too small."""
    monkeypatch.setattr("chameleon.train.image_tokenizer.USAGE_SETTLES_AFTER_STEPS", 5)
    uses, revived = np.ones(16), list[int]()
    update = MovingAverageCodebook.update

    def watched(quantizer: MovingAverageCodebook, latent: torch.Tensor, codes: torch.Tensor) -> None:
        nonlocal uses
        quantizer.decay, quantizer.revive_below = 0.5, 0.2
        counts, number = np.bincount(codes.numpy(), minlength=16), len(revived) + 1
        decay = min(0.5, (1 + number) / (10 + number))  # little of the untrained encoder's uses is kept
        uses = decay * uses + (1 - decay) * counts
        is_dead = uses < 0.2 * counts.mean()
        revived.append(int(is_dead.sum()))
        uses[is_dead] = counts.mean()
        update(quantizer, latent, codes)

    monkeypatch.setattr(MovingAverageCodebook, "update", watched)
    recipe = image_recipe(tmp_path)
    recipe.run.max_steps, recipe.min_codebook_usage = 12, 1.1  # so that any usage is too little
    fit_image(recipe)
    (reported,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(reported)["step"] == 6 and "the codebook collapses" in reported
    assert [int(float(row["train/revived_codes"])) for row in log_of(tmp_path / "run")] == revived
    assert sum(revived) > 0


def test_codes_that_tell_nothing_of_a_picture_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However evenly they are used: here those of a network that does not learn, at the first step that is looked at."""
    monkeypatch.setattr("chameleon.train.image_tokenizer.USAGE_SETTLES_AFTER_STEPS", 5)
    recipe = image_recipe(tmp_path)
    recipe.run.max_steps, recipe.min_codebook_usage, recipe.optimizer.lr = 8, 0.0, 0.0
    fit_image(recipe)
    (reported,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(reported)["step"] == 6 and "nearer than their mean" in reported
    assert all(float(row["train/psnr_gain"]) < 1 for row in log_of(tmp_path / "run"))


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_and_are_watched(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = recipe_file(tmp_path, tokenizer)
    results = []
    for compiled in ("false", "true"):
        changes = [f"compile={compiled}", "run.max_steps=12", "run.log_every_n_steps=3", f"run.out={tmp_path / compiled}"]
        train(read_recipe(PretrainRecipe, path, changes))
        names = ("train/loss", "train/output_norm", "monitor/attention_logit_0")
        results.append(torch.tensor([[float(row[name]) for name in names] for row in log_of(tmp_path / compiled)]))
    assert len(results[0]) == 4
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_initial_values_do_not_depend_on_the_default_device(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning makes the GPU the default device while the model is configured."""
    path = recipe_file(tmp_path, tokenizer, codebook_rows=True)
    settings = ["run.max_steps=2", "run.log_every_n_steps=1"]
    train(read_recipe(PretrainRecipe, path, [*settings, f"run.out={tmp_path}/plain"]))
    configure = LanguageModule.configure_model

    def configure_elsewhere(self: LanguageModule) -> None:
        with torch.device("meta"):  # stands for a GPU
            configure(self)

    monkeypatch.setattr(LanguageModule, "configure_model", configure_elsewhere)
    train(read_recipe(PretrainRecipe, path, [*settings, f"run.out={tmp_path}/elsewhere"]))
    plain, elsewhere = (log_of(tmp_path / name) for name in ("plain", "elsewhere"))
    assert [row["train/loss"] for row in plain] == [row["train/loss"] for row in elsewhere]
