"""Generated images against real ones: those of a folder, or drawings of a bundle from a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.distances import frechet_figure, kernel_figure, manifolds
from chameleon.evaluation.extractors import Clip, check_extractor, folder_images, make_extractor, weights_fingerprint
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores, draw_items
from chameleon.evaluation.statistics import Figure, Metric, Term, figure_of
from chameleon.evaluation.suite import (
    existing_file,
    fingerprint_of,
    listing_fingerprint,
    parse_json_line,
    read_lines,
)
from chameleon.generation.chameleon import GUIDANCE_SCALE
from chameleon.generation.sampling import IMAGE_SAMPLING

MIN_IMAGES = 10


@dataclass
class ImageSuite:
    """Settings of a comparison of two sets of images."""

    real: str
    """Folder of real images."""
    generated: str = ""
    """Folder of generated images; or give prompts."""
    prompts: str = ""
    """File of prompts that the model draws: a text a line, or JSON lines with `prompt`."""
    per_prompt: int = 1
    extractor: str = "effnet-lite0"
    """effnet-lite0 (from its package), inception (FID and KID, from torch-fidelity's weights) or clip."""
    weights: str = ""
    """File or folder of the extractor's weights."""
    clip: str = ""
    """Folder of a CLIP model, for CLIPScore of drawings and their prompts."""
    guidance_scale: float = GUIDANCE_SCALE
    temperature: float = IMAGE_SAMPLING.temperature
    top_p: float = IMAGE_SAMPLING.top_p
    seed: int = 0
    batch_size: int = 64

    def build_parts(self) -> list[Part]:
        check_seed(self.seed)
        if bool(self.generated) == bool(self.prompts):
            raise BadInput("give generated=FOLDER or prompts=FILE", where="images")
        if self.clip and not self.prompts:
            raise BadInput("clip needs prompts", where="images", remedy="give prompts=FILE, or leave clip out")
        part = Images(self)
        for what, count in (("real", len(part.real)), ("generated", len(part.items()))):
            if count < MIN_IMAGES:
                raise BadInput(f"{count} {what} images", where="images", remedy=f"use {MIN_IMAGES} or more")
        check_extractor(self.extractor, self.weights)
        if self.clip:
            check_extractor("clip", self.clip)
        return [part]

    def fingerprints(self) -> dict[str, str]:
        result = {"real": listing_fingerprint(folder_images(self.real))}
        if self.generated:
            result["generated"] = listing_fingerprint(folder_images(self.generated))
        result |= weights_fingerprint({"weights": self.weights, "clip": self.clip})
        if self.prompts:
            result["prompts"] = fingerprint_of([existing_file(self.prompts, "a file of prompts")])
        return result


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file: a text a line, or JSON lines with `prompt`."""
    prompts = []
    for where, line in read_lines(path, "a file of prompts"):
        prompt = parse_json_line(line, where).get("prompt") if line.startswith("{") else line
        if not isinstance(prompt, str):
            raise BadInput("no prompt", where=where, remedy='a text a line, or {"prompt": "…"}')
        prompts.append(prompt)
    return prompts


class Images:
    """All figures of the set; each image's part in precision and density stands with its sample."""

    name = "images"

    def __init__(self, suite: ImageSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.real = folder_images(suite.real)
        self.method = {"extractor": suite.extractor, "real_images": len(self.real)}

    def items(self) -> list[Item]:
        if self.suite.generated:
            root = Path(self.suite.generated)
            return [Item(str(path.relative_to(root)), data=path) for path in folder_images(self.suite.generated)]
        return [
            Item(f"{index}-{copy}", prompt, group=str(index))
            for index, prompt in enumerate(read_prompts(self.suite.prompts))
            for copy in range(self.suite.per_prompt)
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        if self.suite.generated:
            return [{"file": str(item.data.resolve())} for item in items]
        return draw_items(model, items, first, self.suite)

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        suite, device = self.suite, "cuda" if torch.cuda.is_available() else "cpu"
        extract = make_extractor(suite.extractor, suite.weights, device)
        real, generated = extract(self.real), extract([Path(o["file"]) if isinstance(o, dict) else o for o in outputs])
        overlap = manifolds(real, generated)
        rows: list[dict[str, Term]] = [
            {"precision": float(is_precise), "density": float(density)}
            for is_precise, density in zip(overlap.precision, overlap.density, strict=True)
        ]
        metrics = {"precision": Metric(), "density": Metric(is_share=False)}
        names = {"inception": ("fid", "kid")}.get(
            suite.extractor, (f"{suite.extractor}_frechet_distance", f"{suite.extractor}_kernel_distance")
        )
        figures: dict[str, Figure] = {
            names[0]: frechet_figure(real, generated),
            names[1]: kernel_figure(real, generated, suite.seed),
            "recall": figure_of(Metric(), overlap.recall.double().tolist()),
            "coverage": figure_of(Metric(), overlap.coverage.double().tolist()),
        }
        if suite.clip and suite.prompts:
            metrics["clip_score"] = Metric(is_share=False)
            values = Clip(suite.clip, device).scores(list(outputs), [item.prompt for item in items])
            for row, value in zip(rows, values, strict=True):
                row["clip_score"] = value
        return Scores(rows, metrics, figures)
