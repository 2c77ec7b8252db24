"""The complete pipeline in one call: both tokenizers, token shards, pretraining, fine-tuning, evaluation, gallery."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from chameleon import gallery
from chameleon.bundle import SHIPPED, read_header
from chameleon.config_reader import read_config
from chameleon.data.sources import expand_braces, texts_of
from chameleon.data.tokenize import Report, tokenize
from chameleon.device import fast_bfloat16, matmul_peak
from chameleon.evaluation.emoji import evaluate
from chameleon.generation.chameleon import Chameleon
from chameleon.html_page import page
from chameleon.model.config import ModelConfig
from chameleon.plan import flops_per_token
from chameleon.tokenizers.image import ImageTokenizer
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

MIN_SHARE_OF_PEAK = 0.01
"""A stage of training or tokenisation below this share of the peak is reported as slow."""


class StageLog:
    """Prints stages with their times, and how their arithmetic compares with the peak of matrix products measured here.

    A stage far below the others is one that runs in a slow kernel, such as bfloat16 where the processor has none.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.start_time = say, time.monotonic()
        self.stage_start = self.start_time
        dtypes = [torch.float32, *([torch.bfloat16] if fast_bfloat16() else [])]
        self.peak = max(matmul_peak(dtype=dtype) for dtype in dtypes)
        say(f"peak of matrix products here: {self.peak / 1e12:.2f} TFLOP/s")

    def begin(self, title: str) -> None:
        self.stage_start = time.monotonic()
        self.note(title)

    def note(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self.start_time:5.0f} s] {text}")

    def end(self, operations: float) -> None:
        """operations: floating-point operations of the stage."""
        seconds = time.monotonic() - self.stage_start
        share = operations / seconds / self.peak
        slow = " (slow: is a kernel missing for its dtype, or is the machine busy?)" if share < MIN_SHARE_OF_PEAK else ""
        self.note(f"  {seconds:.0f} s at {share:.1%} of the peak{slow}")


def picture_operations(tokenizer: ImageTokenizer) -> tuple[float, float]:
    """Return the floating-point operations of encoding and of decoding one picture."""
    network, resolution = tokenizer.network, tokenizer.config.resolution
    counts = []
    with FlopCounterMode(display=False) as counter:
        codes = network.encode(torch.zeros(1, 3, resolution, resolution))
        counts.append(float(counter.get_total_flops()))
        network.decode(codes)
        counts.append(float(counter.get_total_flops()) - counts[0])
    return counts[0], counts[1]


def training_operations(recipe: TrainRecipe, config: ModelConfig) -> float:
    """Return the floating-point operations of a training run."""
    context_length = recipe.context_length or config.context_length
    tokens = recipe.run.max_steps * recipe.global_batch_size * context_length
    return tokens * flops_per_token(config, context_length)


def run_pipeline(name: str, out: Path, say: Callable[[str], None] = print) -> Path:
    """Run the pipeline of recipe `name` in folder `out`; return the path of the gallery page."""
    pipeline = read_config(PipelineRecipe, find_recipe(name))
    pipeline.validate()
    log = StageLog(say)
    shards_folder = out / "shards"
    if pipeline.bundle is None:
        tokenizers_folder, base = out / "tokenizers", out / "pretrain" / "bundle"
        train_tokenizers(pipeline, tokenizers_folder, log)
    else:
        tokenizers_folder = base = Path(pipeline.bundle)

    encoding, _ = picture_operations(ImageTokenizer.load(tokenizers_folder))

    log.begin("tokenizing documents to token shards")
    shutil.rmtree(shards_folder, ignore_errors=True)  # of an earlier run with other tokenizers
    num_pictures = 0
    for task, report in tokenize_tasks(pipeline, tokenizers_folder, shards_folder):
        num_pictures += report.pictures
        log.note(f"  {task}: {report.documents_out} documents, {sum(report.tokens.values())} tokens")
    log.end(encoding * num_pictures)  # at most: pictures that tasks share are encoded once

    if pipeline.pretrain is not None:
        log.begin("pretraining")
        pretrain = read_recipe(PretrainRecipe, pipeline.pretrain)
        pretrain.tokenizers = str(tokenizers_folder)
        train_stage(pretrain, out / "pretrain", shards_folder, log)

    log.begin("fine-tuning on conversations")
    finetune = read_recipe(FinetuneRecipe, pipeline.finetune)
    finetune.bundle = str(base)
    train_stage(finetune, out / "finetune", shards_folder, log)

    log.begin("evaluating")
    model = Chameleon.load(out / "finetune" / "bundle")
    figures = evaluate(model, concepts=pipeline.concepts, drawings=pipeline.drawings)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    runs = {"Image tokenizer": out / "tokenizers", "Pretraining": out / "pretrain", "Fine-tuning": out / "finetune"}
    curves = "".join(gallery.curves_section(title, folder) for title, folder in runs.items())
    minutes = (time.monotonic() - log.start_time) / 60
    note = f"Trained here in {minutes:.0f} minutes by recipe {name}."
    sections = [gallery.model_section(model, "The model of this run", note, pipeline.concepts, figures, curves)]
    if SHIPPED.is_dir():
        log.begin("the shipped model's results")
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
    path = out / "gallery.html"
    path.write_text(page(sections, "Open Chameleon: gallery", f"Recipe {name}, folder {out}."), encoding="utf-8")
    log.begin("done")
    return path


def train_tokenizers(pipeline: PipelineRecipe, folder: Path, log: StageLog) -> None:
    """Train the text and the image tokenizer of a pipeline into a folder."""
    log.begin("training the text tokenizer")
    text = SentencePieceTokenizer.fit(texts_of(pipeline.text_sources), pipeline.text_pieces)
    text.save(folder)

    log.begin("training the image tokenizer")
    image_recipe = read_recipe(FitImageRecipe, pipeline.image)
    image_recipe.run.out, image_recipe.run.devices = str(folder), 1
    image, _ = fit_image(image_recipe)
    log.end(3 * sum(picture_operations(image)) * image_recipe.global_batch_size * image_recipe.run.max_steps)


def tokenize_tasks(pipeline: PipelineRecipe, tokenizers: Path, shards: Path) -> Iterator[tuple[str, Report]]:
    """Tokenize the sources of a pipeline, in its order or by several processes; yield (name, report) of each."""
    sources = {task: list(expand_braces(source)) for task, source in pipeline.shards.items()}
    if pipeline.processes == 1:
        for task, expanded in sources.items():
            yield task, tokenize_with(tokenizers, expanded, shards / task)
        return
    with ProcessPoolExecutor(pipeline.processes, get_context("spawn")) as pool:
        futures = {
            task: [pool.submit(tokenize_with, tokenizers, [source], shards / task) for source in expanded]
            for task, expanded in sources.items()
        }
        for task, of_task in futures.items():
            total = Report()
            for future in of_task:
                total.add(future.result())
            yield task, total


def tokenize_with(tokenizers: Path, sources: Sequence[str], out: Path) -> Report:
    """Tokenize sources with the tokenizers of a folder, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenize(sources, MixedTokenizer.load(tokenizers, device=device), out)


def train_stage(recipe: TrainRecipe, out: Path, shards_folder: Path, log: StageLog) -> None:
    """Train a recipe on the run's token shards into a folder."""
    set_folders(recipe, out, shards_folder)
    train(recipe)
    log.end(training_operations(recipe, read_header(out / "bundle").model))


def set_folders(recipe: TrainRecipe, out: Path, shards_folder: Path) -> None:
    """Set the recipe's folders to those of this run, on one device; shard folders keep their last name.

    Further devices would be processes that each start the pipeline.
    """
    recipe.run.out, recipe.run.devices = str(out), 1
    for source in (*recipe.mixture, *recipe.validation):
        source.shards = str(shards_folder / Path(source.shards).name)
