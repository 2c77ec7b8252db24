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
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores, draw_items
from chameleon.evaluation.suite import existing_file, existing_folder, fingerprint_of, parse_json_line, read_lines
from chameleon.files import atomic_file
from chameleon.generation.chameleon import GUIDANCE_SCALE
from chameleon.generation.sampling import IMAGE_SAMPLING
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
        part = PromptFolder(self)
        part.check_folder()
        return [part]

    def fingerprints(self) -> dict[str, str]:
        folder = Path(self.prompts)
        paths = sorted(folder.glob("*.txt")) if folder.is_dir() else [existing_file(self.prompts, "prompts")]
        return {"prompts": fingerprint_of(paths)}


def read_entries(benchmark: Benchmark, prompts: str) -> list[dict[str, Any]]:
    """Return for each prompt its `prompt`, and what the benchmark has beside it. Raise `BadInput` for another form."""
    if benchmark == "dpg-bench":
        paths = sorted(existing_folder(prompts, "DPG-Bench's folder of prompts").glob("*.txt"))
        texts = {path.stem: read_lines(str(path), "a prompt") for path in paths}
        entries = [{"prompt": " ".join(line for _, line in lines), "id": stem} for stem, lines in texts.items()]
    elif benchmark == "geneval":
        entries = [parse_json_line(line, where) for where, line in read_lines(prompts, "GenEval's metadata")]
    else:
        entries = [{"prompt": line.rstrip(".")} for _, line in read_lines(prompts, "T2I-CompBench's prompts")]
    if not entries or any(not isinstance(entry.get("prompt"), str) for entry in entries):
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
        return draw_items(model, items, first, self.suite)

    def paths(self, index: int) -> list[str]:
        """Return the names of the pictures of a prompt, in the folder."""
        entry, suite = self.entries[index], self.suite
        if suite.benchmark == "geneval":
            return [f"{index:05}/samples/{copy:05}.png" for copy in range(self.count)]
        if suite.benchmark == "dpg-bench":
            return [f"{entry['id']}.png"]
        name = entry["prompt"].replace("/", " ").replace("_", " ")
        return [f"samples/{name}_{index * self.count + copy:06}.png" for copy in range(self.count)]

    def check_folder(self) -> None:
        """Raise `BadInput` where the folder holds other files, which the scorer would read too."""
        folder = Path(self.suite.out)
        known = {name for index in range(len(self.entries)) for name in self.paths(index)}
        known |= {f"{index:05}/metadata.jsonl" for index in range(len(self.entries))}
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file() and path.relative_to(folder).as_posix() not in known:
                raise BadInput("is no file of this suite", where=path, remedy="give an empty folder as out")

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        """Write the folder. It has no figures: they are the scorer's."""
        self.check_folder()
        folder = Path(self.suite.out)
        for index, entry in enumerate(self.entries):
            drawings = [load_picture(output) for output in outputs[index * self.count : (index + 1) * self.count]]
            pictures = [square(drawings)] if self.suite.benchmark == "dpg-bench" else drawings
            for name, picture in zip(self.paths(index), pictures, strict=True):
                save(picture, folder / name)
            if self.suite.benchmark == "geneval":
                with atomic_file(folder / f"{index:05}" / "metadata.jsonl") as partial:
                    partial.write_text(json.dumps(entry), encoding="utf-8")
        return Scores([{} for _ in items], {})


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
