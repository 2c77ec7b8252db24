"""Drawings in the folders that the scorers of GenEval, DPG-Bench and T2I-CompBench read, from their files of prompts.

| benchmark | prompts | what is written, under `out` |
| --- | --- | --- |
| GenEval (arXiv 2310.11513) | `evaluation_metadata.jsonl` | `00000/metadata.jsonl`, `00000/samples/00000.png` … |
| DPG-Bench (arXiv 2403.05135) | folder of `ID.txt` | `ID.png`, four drawings in a square |
| T2I-CompBench (arXiv 2307.06350) | `color_val.txt`, a prompt a line | `samples/PROMPT_000000.png` … |

Scores come from the benchmarks' own programs, so they can be compared with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage

from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores
from chameleon.evaluation.suite import existing_file, existing_folder, fingerprint_of
from chameleon.files import atomic_file
from chameleon.generation.chameleon import GUIDANCE_SCALE
from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling
from chameleon.tokenizers.image import load_picture

Benchmark = Literal["geneval", "dpg-bench", "t2i-compbench"]
IMAGES_PER_PROMPT = {"geneval": 4, "dpg-bench": 4, "t2i-compbench": 10}
"""As published."""


@dataclass
class PromptFolderSuite:
    """Settings of drawings for another benchmark's scorer."""

    benchmark: Benchmark
    prompts: str
    """The benchmark's file or folder of prompts."""
    out: str
    """Folder that the scorer is given."""
    per_prompt: int = 0
    """Drawings of a prompt; 0 is as many as published."""
    guidance_scale: float = GUIDANCE_SCALE
    temperature: float = IMAGE_SAMPLING.temperature
    top_p: float = IMAGE_SAMPLING.top_p
    seed: int = 0
    batch_size: int = 64

    def build_parts(self) -> list[Part]:
        check_seed(self.seed)
        if self.benchmark == "dpg-bench" and self.per_prompt not in (0, 1, 4):
            raise BadInput(
                f"per_prompt is {self.per_prompt}", where="dpg-bench", remedy="use 1 or 4, which its scorer reads"
            )
        return [PromptFolder(self)]

    def fingerprints(self) -> dict[str, str]:
        folder = Path(self.prompts)
        paths = sorted(folder.glob("*.txt")) if folder.is_dir() else [existing_file(self.prompts, "prompts")]
        return {"prompts": fingerprint_of(paths)}


def read_entries(benchmark: Benchmark, prompts: str) -> list[dict[str, Any]]:
    """Return for each prompt its `prompt`, and what the benchmark has beside it. Raise `BadInput` for another form."""
    if benchmark == "dpg-bench":
        paths = sorted(existing_folder(prompts, "DPG-Bench's folder of prompts").glob("*.txt"))
        entries = [{"prompt": path.read_text(encoding="utf-8").strip(), "id": path.stem} for path in paths]
    else:
        lines = existing_file(prompts, "the benchmark's file of prompts").read_text(encoding="utf-8").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        try:
            entries = [json.loads(line) if benchmark == "geneval" else {"prompt": line.rstrip(".")} for line in lines]
        except json.JSONDecodeError as error:
            raise BadInput(f"not GenEval's metadata ({error})", where=prompts, remedy="a JSON object a line") from None
    if not entries or any(not isinstance(entry, dict) or "prompt" not in entry for entry in entries):
        raise BadInput("no prompts", where=prompts)
    return entries


class PromptFolder:
    """The drawings, and the folder once all are made."""

    def __init__(self, suite: PromptFolderSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.name: str = suite.benchmark
        self.count = suite.per_prompt or IMAGES_PER_PROMPT[suite.benchmark]
        self.entries = read_entries(suite.benchmark, suite.prompts)
        self.method = {"per_prompt": self.count}

    def items(self) -> list[Item]:
        return [
            Item(f"{index}-{copy}", entry["prompt"], data=entry)
            for index, entry in enumerate(self.entries)
            for copy in range(self.count)
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        start = self.suite.seed + first
        return model.draw_batch(
            [item.prompt for item in items],
            seeds=range(start, start + len(items)),
            guidance_scale=self.suite.guidance_scale,
            sampling=Sampling(self.suite.temperature, self.suite.top_p),
        )

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        """Write the folder. It has no figures: they are the scorer's."""
        folder = Path(self.suite.out)
        for index, entry in enumerate(self.entries):
            drawings = [load_picture(output) for output in outputs[index * self.count : (index + 1) * self.count]]
            if self.suite.benchmark == "geneval":
                write_geneval(folder / f"{index:05}", entry, drawings)
            elif self.suite.benchmark == "dpg-bench":
                save(square(drawings), folder / f"{entry['id']}.png")
            else:
                for copy, drawing in enumerate(drawings):
                    name = entry["prompt"].replace("/", " ").replace("_", " ")
                    save(drawing, folder / "samples" / f"{name}_{index * self.count + copy:06}.png")
        return Scores([{} for _ in items], {})


def write_geneval(folder: Path, entry: dict[str, Any], drawings: Sequence[PILImage.Image]) -> None:
    for copy, drawing in enumerate(drawings):
        save(drawing, folder / "samples" / f"{copy:05}.png")
    with atomic_file(folder / "metadata.jsonl") as partial:
        partial.write_text(json.dumps(entry), encoding="utf-8")


def save(picture: PILImage.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        picture.save(partial, "PNG")


def square(pictures: Sequence[PILImage.Image]) -> PILImage.Image:
    """Return four pictures in two rows, or one as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    page = PILImage.new("RGB", (2 * width, 2 * height))
    for index, picture in enumerate(pictures):
        page.paste(picture, ((index % 2) * width, (index // 2) * height))
    return page
