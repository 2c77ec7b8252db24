"""Results that changes of the code must keep: what the shipped model generates for a seed, and 20 steps of training.

The expected values in `golden.json` were made by release 0.1.0 in float64 (the shipped model) and float32 (training). A
change that is meant to alter them writes them anew and says so in CHANGELOG.md.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_file

from chameleon.data import emoji, labelled
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.engine import Engine
from chameleon.generation.image_requests import Drawing, generated_image_codes, image_request
from chameleon.generation.sampling import IMAGE_SAMPLING
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped() -> Chameleon:
    return Chameleon.load(dtype="float64")


def test_greedy_captions(shipped: Chameleon) -> None:
    entries = labelled.representatives(emoji.subset("validation", 40))[:6]
    assert [entry.key for entry in entries] == GOLDEN["pictures"]
    assert shipped.caption_batch([entry.picture for entry in entries]) == GOLDEN["captions"]


@pytest.mark.parametrize("draft_length", [1, 4])
def test_codes_of_drawings(shipped: Chameleon, draft_length: int) -> None:
    engine = Engine(shipped.model, shipped.vocabulary, draft_length=draft_length)
    drawing = Drawing(shipped.vocabulary.grid)
    requests = [
        image_request(shipped.prompts, prompt, drawing, seed=seed, guidance_scale=1.5, sampling=IMAGE_SAMPLING)
        for seed, prompt in enumerate(GOLDEN["prompts"])
    ]
    outputs = engine.generate(requests)
    codes = [
        generated_image_codes(request, output, shipped.vocabulary).flatten().tolist()
        for request, output in zip(requests, outputs, strict=True)
    ]
    assert codes == GOLDEN["drawing_codes"]


def test_losses_and_gradient_norms_of_training(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    changes = {"codebook_rows": True, "image_loss_weight": 0.5, "micro_batch_size": 2}
    path = recipe_file(tmp_path, tokenizer, **changes)
    train(read_recipe(PretrainRecipe, path, ["run.max_steps=20", "run.log_every_n_steps=1", "model.qk_norm_shards=2"]))
    with (tmp_path / "run" / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    norms = [float(row["train/grad_norm"]) for row in rows if row.get("train/grad_norm")]
    assert losses[:3] == pytest.approx(GOLDEN["training_losses"][:3], rel=1e-6)
    # Processors round differently, and the difference grows from step to step.
    assert losses == pytest.approx(GOLDEN["training_losses"], rel=1e-4)
    assert norms == pytest.approx(GOLDEN["gradient_norms"], rel=1e-3)
