"""Studies with people: which of two answers is better, and does each do what was asked (arXiv 2405.09818, section 4).

A study is a folder, made from the scorecards of two or more models on the same prompts:

    study.json            the models, the prompts, and all answers
    media/                their pictures
    judgements.jsonl      one line for each judgement, written when it is made

People see pairs of answers without the models' names; which one stands left is balanced. Strengths are those of Bradley and
Terry (Biometrika 39, 1952), a tie half a win for each (Hunter, Annals of Statistics 32, 2004).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from chameleon.errors import BadInput
from chameleon.evaluation.scorecard import Scorecard
from chameleon.evaluation.statistics import Array, Figure, Metric, figure_of, percentiles
from chameleon.files import atomic_folder, read_events, read_json, write_json

STUDY_FILE, JUDGEMENTS_FILE, MEDIA = "study.json", "judgements.jsonl", "media"
CHOICES = ("left", "right", "same")
FULFILMENT = ("not", "partly", "fully")
NUM_RESAMPLES = 1000
MAX_ITERATIONS, TOLERANCE = 10_000, 1e-10
PRIOR = 0.5
"""Wins against each other that each pair of models is given before: one that always wins has a finite strength."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as one judge sees them."""

    index: int
    """Of the pair in the study."""
    prompt: int
    models: tuple[str, str]
    """Left and right."""


class Study:
    """A study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_json(folder / STUDY_FILE)
        self.models: list[str] = content["models"]
        self.prompts: list[dict[str, Any]] = content["prompts"]
        self.seed: int = content["seed"]

    @classmethod
    def create(cls, folder: Path, cards: dict[str, Path], seed: int = 0) -> Study:
        """Make a study from scorecards: name of a model → folder of its scorecard. Raise `BadInput` where it cannot be."""
        check_new(folder, list(cards))
        samples = {name: samples_of(path) for name, path in cards.items()}
        folders = {name: path if path.is_dir() else path.parent for name, path in cards.items()}
        shared = [key for key in next(iter(samples.values())) if all(key in of for of in samples.values())]
        if not shared:
            raise BadInput("the scorecards share no samples", where="study", remedy="evaluate the models on one suite")
        for key in shared:
            if len({json.dumps(of[key]["prompt"], sort_keys=True) for of in samples.values()}) > 1:
                raise BadInput(
                    f"the prompts of sample {key} differ", where="study", remedy="evaluate the models on one suite"
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            (partial / MEDIA).mkdir()
            prompts = []
            for key in shared:
                first = next(iter(samples.values()))[key]
                source = next(iter(folders.values()))
                prompts.append(
                    {
                        "key": key,
                        "category": first.get("category", ""),
                        "prompt": shown(first["prompt"], source, partial),
                        "answers": {
                            name: shown(samples[name][key]["output"], path, partial) for name, path in folders.items()
                        },
                    }
                )
            write_json(partial / STUDY_FILE, {"models": list(cards), "seed": seed, "prompts": prompts})
        return cls(folder)

    @cached_property
    def pairs(self) -> list[tuple[int, str, str]]:
        """All pairs of answers: (prompt, model, other model)."""
        return [(prompt, *pair) for prompt in range(len(self.prompts)) for pair in combinations(self.models, 2)]

    def order(self, judge: str) -> list[Pair]:
        """Return all pairs in a judge's order. Each model of a pair stands left in half of the prompts, for each judge."""
        rng = random.Random(f"{self.seed} {judge}")
        result = []
        for models in combinations(self.models, 2):
            indices = [index for index, (_, *pair) in enumerate(self.pairs) if tuple(pair) == models]
            rng.shuffle(indices)
            first = rng.randrange(2)
            for position, index in enumerate(indices):
                is_swapped = (position + first) % 2 == 1
                sides = (models[1], models[0]) if is_swapped else models
                result.append(Pair(index, self.pairs[index][0], sides))
        rng.shuffle(result)
        return result

    # --- judgements ---

    def judgements(self) -> list[dict[str, Any]]:
        """Return the judgements, of each judge and pair the last one."""
        latest = {(entry["judge"], entry["pair"]): entry for entry in read_events(self.folder / JUDGEMENTS_FILE)}
        return list(latest.values())

    def next_pair(self, judge: str) -> tuple[Pair | None, int]:
        """Return the first pair that a judge has not judged, None after the last, and how many they have."""
        done = {entry["pair"] for entry in self.judgements() if entry["judge"] == judge}
        return next((pair for pair in self.order(judge) if pair.index not in done), None), len(done)

    def judge(self, judge: str, index: int, better: str, fulfilled: Sequence[str]) -> None:
        """Add a judgement of pair `index`: which side is better, and whether left and right do what was asked.

        Raises `BadInput` for what the page does not send.
        """
        pair = next((pair for pair in self.order(judge) if pair.index == index), None)
        if pair is None or better not in CHOICES or len(fulfilled) != 2 or not set(fulfilled) <= set(FULFILMENT):
            raise BadInput("not a judgement of this study", where=f"pair {index}")
        winner = {"left": pair.models[0], "right": pair.models[1], "same": None}[better]
        entry = {
            "judge": judge,
            "pair": index,
            "key": self.prompts[pair.prompt]["key"],
            "left": pair.models[0],
            "right": pair.models[1],
            "better": winner,
            "fulfilled": dict(zip(pair.models, fulfilled, strict=True)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path = self.folder / JUDGEMENTS_FILE
        is_cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with open(path, "ab") as file:
            file.write((("\n" if is_cut_off else "") + json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()

    # --- results ---

    def report(self) -> dict[str, Any]:
        """Return strengths, wins, fulfilment and agreement, in all and by category. Raise `BadInput` if nobody judged."""
        judgements = self.judgements()
        if not judgements:
            raise BadInput("no judgements yet", where=self.folder)
        category_of = {prompt["key"]: prompt["category"] for prompt in self.prompts}
        categories = sorted({category_of[entry["key"]] for entry in judgements} - {""})
        result = {
            "judgements": len(judgements),
            "judges": len({entry["judge"] for entry in judgements}),
            "agreement": agreement(judgements),
            "left_chosen": left_share(judgements),
            "all": self.results_of(judgements),
        }
        by_category = {
            category: self.results_of([entry for entry in judgements if category_of[entry["key"]] == category])
            for category in categories
        }
        return result | {"by_category": by_category}

    def results_of(self, judgements: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return wins of each pair of models, Bradley–Terry strengths, and how often each model did what was asked."""
        pairs = {}
        for first, second in combinations(self.models, 2):
            of_pair = [entry for entry in judgements if {entry["left"], entry["right"]} == {first, second}]
            winners = [entry["better"] for entry in of_pair]
            pairs[f"{first} : {second}"] = {
                "first": winners.count(first),
                "same": winners.count(None),
                "second": winners.count(second),
            }
        fulfilled = {}
        for model in self.models:
            chosen = [entry for entry in judgements if model in entry["fulfilled"]]
            groups = [entry["key"] for entry in chosen]
            fulfilled[model] = {
                level: figure_of(
                    Metric(), [float(entry["fulfilled"][model] == level) for entry in chosen], groups
                ).to_json()
                for level in FULFILMENT
                if chosen
            }
        return {
            "pairs": pairs,
            "strengths": {model: of.to_json() for model, of in strengths(judgements, self.models, self.seed).items()},
            "fulfilled": fulfilled,
        }


def check_new(folder: Path, models: Sequence[str]) -> None:
    """Raise `BadInput` where a study of these models cannot be made in a folder."""
    if folder.exists():
        raise BadInput("exists", where=folder, remedy="leave the scorecards out to go on with it, or give another folder")
    if len(models) < 2:
        raise BadInput("a study needs two models or more", where="study")


def samples_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the samples of a scorecard by "suite / part / key"; the key alone where there is one part."""
    parts = list(Scorecard.read(path).parts())
    if len(parts) == 1:
        return {sample["key"]: sample for sample in parts[0][2]["samples"]}
    return {f"{suite} / {part} / {sample['key']}": sample for suite, part, of in parts for sample in of["samples"]}


def shown(value: Any, source: Path, folder: Path) -> list[dict[str, str]]:
    """Return a prompt or output as a list of texts and pictures, which are copied to the study's folder."""
    if isinstance(value, list):
        return [part for element in value for part in shown(element, source, folder)]
    if isinstance(value, dict):
        if "image" in value or "file" in value:
            path = source / (value.get("image") or value["file"])
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            name = f"{digest}{path.suffix.lower()}"  # says nothing of the model
            shutil.copyfile(path, folder / MEDIA / name)
            return [{"image": name}]
        if "parts" in value:
            return shown(value["parts"], source, folder)
        return [{"text": value["text"]}] if value.get("text") else []
    return [{"text": str(value)}] if value not in (None, "") else []


def left_share(judgements: Sequence[dict[str, Any]]) -> float | None:
    """Return how often the left answer was found better, of judgements that are no ties: about half without a bias."""
    decided = [entry["better"] == entry["left"] for entry in judgements if entry["better"] is not None]
    return sum(decided) / len(decided) if decided else None


def agreement(judgements: Sequence[dict[str, Any]]) -> float | None:
    """Return Krippendorff's alpha of which answer is better, nominal.

    None where it is not defined: no pair has two judges, or all judged alike; and without the package krippendorff.
    """
    if importlib.util.find_spec("krippendorff") is None:
        return None
    import krippendorff

    judges = sorted({entry["judge"] for entry in judgements})
    pairs = sorted({entry["pair"] for entry in judgements})
    values = np.full((len(judges), len(pairs)), np.nan)
    for entry in judgements:
        first = min(entry["left"], entry["right"])
        value = 0 if entry["better"] is None else 1 if entry["better"] == first else 2
        values[judges.index(entry["judge"]), pairs.index(entry["pair"])] = value
    has_two = (~np.isnan(values)).sum(0) >= 2
    if not has_two.any() or len(set(values[:, has_two][~np.isnan(values[:, has_two])])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=values, level_of_measurement="nominal"))


def bradley_terry(wins: Array) -> Array:
    """Return log strengths [M], their mean 0, from wins [M, M]: how often row beat column, ties half (Hunter's MM)."""
    games = wins + wins.T
    strength = np.ones(len(wins))
    for _ in range(MAX_ITERATIONS):
        denominators = (games / (strength[:, None] + strength[None])).sum(1)
        updated = wins.sum(1) / denominators
        updated /= math.exp(float(np.log(updated).mean()))
        if np.abs(np.log(updated / strength)).max() < TOLERANCE:
            return np.log(updated)
        strength = updated
    return np.log(strength)


def strengths(judgements: Sequence[dict[str, Any]], models: Sequence[str], seed: int) -> dict[str, Figure]:
    """Return the log strength of each model with its interval over resampled prompts.

    The odds that a model's answer is preferred to another's are exp of the difference of their strengths.
    """
    size = len(models)
    keys = sorted({entry["key"] for entry in judgements})
    wins = np.zeros((len(keys), size, size))
    for entry in judgements:
        left, right = models.index(entry["left"]), models.index(entry["right"])
        row = keys.index(entry["key"])
        if entry["better"] is None:
            wins[row, left, right] += 0.5
            wins[row, right, left] += 0.5
        else:
            winner = models.index(entry["better"])
            wins[row, winner, left + right - winner] += 1
    prior = PRIOR * (1 - np.eye(size))
    values = bradley_terry(wins.sum(0) + prior)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=NUM_RESAMPLES)
    resampled = np.stack([bradley_terry(np.tensordot(row, wins, 1) + prior) for row in counts.astype(np.float64)])
    return {
        model: Figure(float(values[index]), *percentiles(resampled[:, index]), count=len(judgements))
        for index, model in enumerate(models)
    }
