"""The complete pipeline in one call: both tokenizers, token shards, pretraining, fine-tuning, evaluation, gallery."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from chameleon import gallery
from chameleon.bundle import SHIPPED
from chameleon.config_reader import read_config
from chameleon.data.sources import texts_of
from chameleon.data.tokenize import tokenize
from chameleon.evaluation.emoji import evaluate
from chameleon.generation.chameleon import Chameleon
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.train.image_tokenizer import fit_image
from chameleon.train.recipe import (
    FinetuneRecipe,
    FitImageRecipe,
    PipelineRecipe,
    PretrainRecipe,
    TrainRecipe,
    find_recipe,
    read_recipe,
)
from chameleon.train.run import train


def run_pipeline(name: str, out: Path, say: Callable[[str], None] = print) -> Path:
    """Run the pipeline of recipe `name` in folder `out`; return the path of the gallery page."""
    pipeline = read_config(PipelineRecipe, find_recipe(name))
    start_time = time.monotonic()

    def begin_stage(title: str) -> None:
        say(f"[{time.monotonic() - start_time:5.0f} s] {title}")

    tokenizers_folder, shards_folder = out / "tokenizers", out / "shards"
    begin_stage("training the text tokenizer")
    text = SentencePieceTokenizer.fit(texts_of(pipeline.text_sources), pipeline.text_pieces)
    text.save(tokenizers_folder)

    begin_stage("training the image tokenizer")
    image_recipe = read_recipe(FitImageRecipe, pipeline.image)
    image_recipe.run.out, image_recipe.run.devices = str(tokenizers_folder), 1
    image, _ = fit_image(image_recipe)

    begin_stage("tokenizing documents to token shards")
    shutil.rmtree(shards_folder, ignore_errors=True)  # of an earlier run with other tokenizers
    tokenizer = MixedTokenizer(text, image)
    for task, source in pipeline.shards.items():
        report = tokenize([source], tokenizer, shards_folder / task)
        begin_stage(f"  {task}: {report.documents_out} documents, {sum(report.tokens.values())} tokens")

    begin_stage("pretraining")
    pretrain = read_recipe(PretrainRecipe, pipeline.pretrain)
    set_folders(pretrain, out / "pretrain", shards_folder)
    pretrain.tokenizers = str(tokenizers_folder)
    train(pretrain)

    begin_stage("fine-tuning on conversations")
    finetune = read_recipe(FinetuneRecipe, pipeline.finetune)
    set_folders(finetune, out / "finetune", shards_folder)
    finetune.bundle = str(out / "pretrain" / "bundle")
    train(finetune)

    begin_stage("evaluating")
    model = Chameleon.load(out / "finetune" / "bundle")
    figures = evaluate(model, concepts=pipeline.concepts, drawings=pipeline.drawings)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    runs = {"Image tokenizer": tokenizers_folder, "Pretraining": out / "pretrain", "Fine-tuning": out / "finetune"}
    curves = "".join(gallery.curves_section(title, folder) for title, folder in runs.items())
    minutes = (time.monotonic() - start_time) / 60
    note = f"Trained here in {minutes:.0f} minutes by recipe {name}."
    sections = [gallery.model_section(model, "The model of this run", note, pipeline.concepts, figures, curves)]
    if SHIPPED.is_dir():
        begin_stage("the shipped model's results")
        shipped = Chameleon.load()
        sections.append(
            gallery.model_section(
                shipped,
                "The shipped model",
                "Trained longer, on the complete set. The pictures are those above; the figures are on the complete set.",
                pipeline.concepts,
                shipped.bundle.provenance.get("evaluation", {}),
            )
        )
    page = out / "gallery.html"
    page.write_text(gallery.page(sections, "Open Chameleon: gallery", f"Recipe {name}, folder {out}."), encoding="utf-8")
    begin_stage("done")
    return page


def set_folders(recipe: TrainRecipe, out: Path, shards_folder: Path) -> None:
    """Set the recipe's folders to those of this run, on one device; shard folders keep their last name.

    Further devices would be processes that each start the pipeline.
    """
    recipe.run.out, recipe.run.devices = str(out), 1
    for source in (*recipe.mixture, *recipe.validation):
        source.shards = str(shards_folder / Path(source.shards).name)
