"""What runs on a GPU equals what runs on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_VQGAN, random_model, recipe_file

from chameleon.data import emoji, labelled
from chameleon.data.mixture import PackedBatch
from chameleon.document import Document, Image, Text
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.sampling import Sampling
from chameleon.model.loss import chunked_cross_entropy, cut_cross_entropy
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.quantizer import build_quantizer
from chameleon.tokenizers.vqgan import VQGAN
from chameleon.train.image_tokenizer import fit_image
from chameleon.train.objective import Objective
from chameleon.train.recipe import FitImageRecipe, PretrainRecipe, read_recipe
from chameleon.train.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Products and convolutions in float32 without TF32, so that they can be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def packed_batch(rows: int = 3, length: int = 256, vocabulary: int = 200) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    document_ids = (torch.rand(rows, length, generator=generator) < 0.02).cumsum(1)
    starts = torch.zeros_like(document_ids)
    for column in range(1, length):
        is_new = document_ids[:, column] != document_ids[:, column - 1]
        starts[:, column] = torch.where(is_new, column, starts[:, column - 1])
    positions = torch.arange(length) - starts
    return PackedBatch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length), document_ids, positions)


def loss_and_gradients(batch: PackedBatch, device: str, attention: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = random_model(200, heads=4, kv_heads=4, width=64, context_length=256).requires_grad_(True).to(device)
    objective = Objective(model, z_loss=1e-4, attention=attention)  # type: ignore[arg-type]
    moved = PackedBatch(*(column.to(device) for column in batch))
    loss = objective(moved, moved.loss_weights / moved.loss_weights.sum()).loss
    loss.backward()
    return float(loss), {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}


def test_flex_attention_trains_as_the_dense_mask_on_the_cpu() -> None:
    batch = packed_batch()
    expected, expected_grads = loss_and_gradients(batch, "cpu", "dense")
    for attention in ("dense", "flex"):
        got, grads = loss_and_gradients(batch, "cuda", attention)
        assert got == pytest.approx(expected, rel=1e-5), attention
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, atol=2e-5, rtol=2e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_cut_cross_entropy_equals_the_chunked_one() -> None:
    pytest.importorskip("cut_cross_entropy")
    torch.manual_seed(0)
    values = []
    hidden, head = torch.randn(500, 128, device="cuda"), torch.randn(1000, 128, device="cuda") * 0.1
    targets, weights = torch.randint(0, 1000, (500,), device="cuda"), torch.rand(500, device="cuda")
    for function in (chunked_cross_entropy, cut_cross_entropy):
        x, w = hidden.bfloat16().requires_grad_(True), head.bfloat16().requires_grad_(True)
        result = function(x, w, targets, weights, z_loss=1e-3)
        result.loss.backward()
        values.append((result.loss.detach(), x.grad, w.grad))
    for chunked, cut in zip(*values, strict=True):
        torch.testing.assert_close(cut.float(), chunked.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["plain", "moving_average", "linear", "index_backprop", "additive", "levels"])
def test_image_tokenizer_gives_the_same_codes(kind: str) -> None:
    torch.manual_seed(0)
    shape = (16, 2, (4, 4)) if kind == "levels" else (16, 4)
    quantizer = build_quantizer(kind, *shape).eval()  # type: ignore[arg-type]
    latent = torch.randn(4, shape[1], 8, 8)
    expected = quantizer(latent).codes
    assert (quantizer.cuda()(latent.cuda()).codes.cpu() == expected).float().mean() > 0.999
    network = VQGAN(SMALL_VQGAN).eval()
    pictures = torch.rand(8, 3, 16, 16) * 2 - 1
    latents = network.latent(pictures), network.cuda().latent(pictures.cuda()).cpu()
    torch.testing.assert_close(latents[1], latents[0], atol=1e-4, rtol=1e-3)


def answers(model: Chameleon) -> tuple[list[str], list[str], torch.Tensor]:
    """Captions, answers and the codes of drawings of the shipped model, all greedy or seeded."""
    shown = labelled.representatives(emoji.load("validation"))[:6]
    captions = model.caption_batch([entry.picture for entry in shown])
    replies = model.answer_batch([(entry.picture, "what kind of thing is it?") for entry in shown])
    prompts = ["orange heart", "green apple", "dog"]
    drawn = model.draw_batch(prompts, seeds=[1, 2, 3], guidance_scale=1.5, sampling=Sampling(0.7, 0.9))
    return captions, replies, model.tokenizer.image.encode(drawn)


def test_generation_equals_that_of_the_cpu() -> None:
    expected = answers(Chameleon.load(dtype="float32", weight_format="plain"))
    for compile in (False, True):
        got = answers(Chameleon.load(device="cuda", dtype="float32", weight_format="plain", compile=compile))
        assert got[0] == expected[0] and got[1] == expected[1], f"compile={compile}"
        assert (got[2] == expected[2]).float().mean() > 0.9, f"compile={compile}"


def test_generation_in_bfloat16_with_cuda_graphs_equals_that_without() -> None:
    plain, compiled = (answers(Chameleon.load(device="cuda", compile=compile)) for compile in (False, True))
    assert sum(a == b for a, b in zip(plain[0] + plain[1], compiled[0] + compiled[1], strict=True)) >= 11


def test_generation_in_int8() -> None:
    pytest.importorskip("torchao")
    captions, _, codes = answers(Chameleon.load(device="cuda", weight_format="int8"))
    assert all(captions) and codes.shape[0] == 3


def test_documents_of_text_and_pictures() -> None:
    model = Chameleon.load(device="cuda")
    document = model.generate(Document((Text("red heart"),)), format=("text", "image"), seed=0)
    assert [type(part) for part in document.parts] == [Text, Image]


def losses(folder: Path) -> list[float]:
    with open(folder / "log" / "metrics.csv", encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["optimizer.kind=muon", "codebook_rows=true"],
        ["attention=dense"],
        ["compile=true"],
        ["activation_checkpointing=full", "micro_batch_size=2"],
        ["activation_checkpointing=selective", "compile=true"],
    ],
    ids=" ".join,
)
def test_training_equals_that_on_the_cpu(tmp_path: Path, tokenizer: MixedTokenizer, settings: list[str]) -> None:
    # FlexAttention wants heads of at least 16 features.
    shape = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 2, "ffn_width": 64}
    path = recipe_file(tmp_path, tokenizer, model=shape)
    common = ["run.max_steps=6", "run.log_every_n_steps=1", "run.devices=1", *settings]
    on_cpu = [name for name in common if "compile" not in name]
    train(read_recipe(PretrainRecipe, path, [*on_cpu, "run.accelerator=cpu", f"run.out={tmp_path}/cpu"]))
    train(read_recipe(PretrainRecipe, path, [*common, f"run.out={tmp_path}/gpu"]))
    # Muon orthogonalises in bfloat16 on GPUs.
    tolerance = 2e-2 if "optimizer.kind=muon" in settings else 1e-3
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


def test_training_in_bfloat16_resumes_to_the_bit(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    shape = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 2, "ffn_width": 64}
    path = recipe_file(tmp_path, tokenizer, model=shape)
    common = ["run.log_every_n_steps=1", "run.devices=1", "run.precision=bf16-mixed", "run.save_every_n_steps=3"]
    common += ["optimizer.schedule=constant", "attention=dense"]
    train(read_recipe(PretrainRecipe, path, [*common, "run.max_steps=6", f"run.out={tmp_path}/whole"]))
    train(read_recipe(PretrainRecipe, path, [*common, "run.max_steps=3", f"run.out={tmp_path}/parts"]))
    resumed = [*common, "run.max_steps=6", "run.resume=true", f"run.out={tmp_path}/parts"]
    train(read_recipe(PretrainRecipe, path, resumed))
    assert losses(tmp_path / "parts")[-3:] == losses(tmp_path / "whole")[-3:]


@pytest.mark.parametrize("codebook", ["moving_average", "index_backprop", "levels"])
def test_fitting_an_image_tokenizer(tmp_path: Path, codebook: str) -> None:
    settings = [f"codebook={codebook}", "run.max_steps=4", "run.log_every_n_steps=1", f"run.out={tmp_path}", "restyle=0.5"]
    settings += ["loss.adversarial=0.1", "run.progress=false", "run.validate_every_n_steps=0"]
    if codebook == "levels":
        settings += ["model.levels=[8,5,5,5]", "model.codebook_size=1000", "model.codebook_width=4"]
    tokenizer, metrics = fit_image(read_recipe(FitImageRecipe, "demo-image", settings))
    assert metrics["validation/psnr"] > 5
    assert tokenizer.device.type in ("cpu", "cuda")
