"""The whole road in one call: both tokenizers, token shards, pretraining, tuning, evaluation, and a gallery page."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from chameleon import gallery
from chameleon.bundle import SHIPPED
from chameleon.data.sources import texts_of
from chameleon.data.tokenize import tokenize
from chameleon.evaluation.emoji import evaluate
from chameleon.generation.chameleon import Chameleon
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.train.image_tokenizer import fit_image
from chameleon.train.recipe import FinetuneRecipe, FitImageRecipe, PretrainRecipe, RoadRecipe, TrainRecipe, read_recipe
from chameleon.train.run import train

LANGUAGE_CURVES = {
    "train/loss": "loss",
    "train/text_loss": "text loss",
    "train/image_loss": "image loss",
    "train/output_norm": "output norm of the last layer",
    "train/gradient_norm": "gradient norm",
    "speed/tokens_per_second": "tokens a second",
}
IMAGE_CURVES = {"train/loss": "loss", "train/psnr": "PSNR (dB)", "train/perplexity": "perplexity of the codes"}


def run_road(name: str, out: Path, say: Callable[[str], None] = print) -> Path:
    """Runs the road of recipe `name` in folder `out`; returns the path of the gallery page."""
    road = read_recipe(RoadRecipe, name)
    started = time.monotonic()

    def stage(text: str) -> None:
        say(f"[{time.monotonic() - started:5.0f} s] {text}")

    tokenizers, shards = out / "tokenizers", out / "shards"
    stage("fitting the text tokenizer")
    text = SentencePieceTokenizer.fit(texts_of(road.text_sources), road.text_pieces)
    text.save(tokenizers)

    stage("training the image tokenizer")
    image_recipe = read_recipe(FitImageRecipe, road.image)
    image_recipe.run.out, image_recipe.run.devices = str(tokenizers), 1
    image, _ = fit_image(image_recipe)

    stage("turning documents into token shards")
    shutil.rmtree(shards, ignore_errors=True)  # of an earlier run with other tokenizers
    tokenizer = MixedTokenizer(text, image)
    for task, source in road.shards.items():
        report = tokenize([source], tokenizer, shards / task)
        stage(f"  {task}: {report.documents_out} documents, {sum(report.tokens.values())} ids")

    stage("pretraining")
    pretrain = read_recipe(PretrainRecipe, road.pretrain)
    place(pretrain, out / "pretrain", shards)
    pretrain.tokenizers = str(tokenizers)
    train(pretrain)

    stage("tuning on conversations")
    finetune = read_recipe(FinetuneRecipe, road.finetune)
    place(finetune, out / "finetune", shards)
    finetune.bundle = str(out / "pretrain" / "bundle")
    train(finetune)

    stage("evaluating")
    own = Chameleon.load(out / "finetune" / "bundle")
    figures = evaluate(own, concepts=road.concepts, drawings=road.drawings)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    logs = "".join(
        f"<h3>{title}</h3>" + gallery.curves(folder / "log", wanted)
        for title, folder, wanted in (
            ("Image tokenizer", tokenizers, IMAGE_CURVES),
            ("Pretraining", out / "pretrain", LANGUAGE_CURVES),
            ("Tuning", out / "finetune", LANGUAGE_CURVES),
        )
    )
    minutes = (time.monotonic() - started) / 60
    sections = [
        gallery.model_section(
            own,
            "The model of this run",
            f"Trained here in {minutes:.0f} minutes by recipe {name}.",
            road.concepts,
            figures,
            logs,
        )
    ]
    if SHIPPED.is_dir():
        stage("the shipped model's results")
        shipped = Chameleon.load()
        # Its figures on everything are in its provenance; the pictures here are those of the run above.
        sections.append(
            gallery.model_section(
                shipped,
                "The shipped model",
                "Trained longer, on all of the set; the figures are those of its provenance.",
                road.concepts,
                shipped.bundle.provenance.get("evaluation", {}),
            )
        )
    page = out / "gallery.html"
    page.write_text(gallery.page(sections, "Open Chameleon: gallery", f"Recipe {name}, folder {out}."), encoding="utf-8")
    stage("done")
    return page


def place(recipe: TrainRecipe, out: Path, shards: Path) -> None:
    """Sets the recipe's folders to those of this run, on one device; shard folders keep their last name.

    Further devices would be processes that each begin the road anew.
    """
    recipe.run.out, recipe.run.devices = str(out), 1
    for source in (*recipe.mixture, *recipe.validation):
        source.shards = str(shards / Path(source.shards).name)
