"""Whether it costs anything that best-fit packing puts documents of one length into a row: training loss beside mixed rows.

    python benchmarks/mixed_rows.py [--steps 240] [--seeds 1 2]

Both sides train the size `tiny` on token shards of 160 concepts, made with the shipped tokenizers, with the same seeds and
sources; only which documents share a row differs. Mixed rows are filled by first fit from the items of a source in random
order. The losses are those of the final weights on all captions, answers and drawings, which packing does not change, since
attention does not cross documents.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from chameleon.bundle import SHIPPED, Bundle
from chameleon.data import index
from chameleon.data.mixture import SourceConfig
from chameleon.data.packing import ItemRun, RowGroup, pack
from chameleon.data.tokenize import tokenize
from chameleon.demo import set_folders
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train

TASKS = {
    "pairs": "emoji:pairs?concepts=160&per_concept=16&seed=1",
    "captioning": "emoji:captioning?concepts=160&per_concept=16&seed=1",
    "answering": "emoji:answering?concepts=160&per_concept=16&seed=1",
    "drawing": "emoji:drawing?concepts=160&per_concept=16&seed=3&view=plain",
    "words": "emoji:words",
    "code": "emoji:code?limit_bytes=300000",
}
OPEN_ROWS = 64


def pack_mixed(counts: np.ndarray, context_length: int) -> list[RowGroup]:
    """Rows filled by first fit from items in random order; each is a group of its own."""
    lengths = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    rows: list[Counter[int]] = []
    open_rows: list[tuple[int, Counter[int]]] = []
    for length in lengths:
        place = next((n for n, (space, _) in enumerate(open_rows) if space >= length), None)
        if place is None:
            open_rows = open_rows[-OPEN_ROWS:]
            rows.append(Counter())
            open_rows.append((context_length, rows[-1]))
            place = len(open_rows) - 1
        space, row = open_rows[place]
        row[length] += 1
        open_rows[place] = (space - length, row)
    used: Counter[int] = Counter()
    groups = []
    for row in rows:
        groups.append(RowGroup(tuple(ItemRun(length, each, used[length]) for length, each in row.items()), 1))
        used.update(row)
    return groups


def losses(side: str, shards: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """The validation losses after training, and the share of rows that hold one length."""
    index.pack = {"one length": pack, "mixed": pack_mixed}[side]  # type: ignore[attr-defined]
    overrides = [f"run.max_steps={steps}", f"run.seed={seed}", f"run.validate_every_n_steps={steps}", "run.progress=false"]
    recipe = read_recipe(PretrainRecipe, "demo-pretrain", [*overrides, "monitors=false", "optimizer.warmup_steps=30"])
    recipe.validation = [
        SourceConfig(str(shards / task), loss="answers") for task in ("captioning", "answering", "drawing")
    ]
    set_folders(recipe, out, shards)
    recipe.tokenizers = str(SHIPPED)
    train(recipe)
    with (out / "log" / "metrics.csv").open() as file:
        row = [row for row in csv.DictReader(file) if row.get("validation/text_loss")][-1]
    return {kind: float(row[f"validation/{kind}_loss"]) for kind in ("text", "image")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    tokenizer = Bundle.load().tokenizer
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        for task, source in TASKS.items():
            tokenize([source], tokenizer, shards / task)
        for seed in options.seeds:
            for side in ("one length", "mixed"):
                name = f"{side}, seed {seed}"
                results[name] = losses(side, shards, Path(folder) / name.replace(" ", "-"), options.steps, seed)
                print(name, results[name], file=sys.stderr, flush=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
