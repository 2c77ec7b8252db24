"""Painting: what ranking continuations and further rounds gain over drawing once, on pictures of the embedded set.

    python benchmarks/painting.py [--model BUNDLE] [--pictures 40] [--picture FILE]

Two masks are drawn anew from the picture's own caption: the middle (codes 2 … 5 of rows 2 … 5 of 8), and the upper half,
which a model that writes from the top has to draw without any look at what is kept. Measured over the painted pixels: how
near they are to the original (PSNR), whether the picture is recognised, the seam (mean step of colour across the mask's
border over that inside of the original), and the log-likelihood of the codes that follow.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np
import torch
from PIL import Image as PILImage

from chameleon.data import emoji
from chameleon.data.labelled import representatives
from chameleon.document_view import image_grid
from chameleon.evaluation.drawings import DrawingJudge
from chameleon.generation.chameleon import Chameleon

MASKS = {"middle": (16, 16, 48, 48), "upper half": (0, 0, 64, 32)}
WAYS = {
    "once": {},
    "best of 4": {"candidates": 4},
    "best of 8": {"candidates": 8},
    "best of 4, 2 rounds": {"candidates": 4, "rounds": 2},
    "best of 4, 3 rounds": {"candidates": 4, "rounds": 3},
}


def seam(picture: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Return the mean absolute step of colour across the border of a box, where that lies inside the picture."""
    left, top, right, bottom = box
    steps = [np.abs(picture[bottom, left:right] - picture[bottom - 1, left:right])] if bottom < 64 else []
    if top > 0:
        steps.append(np.abs(picture[top, left:right] - picture[top - 1, left:right]))
    if left > 0:
        steps.append(np.abs(picture[top:bottom, left] - picture[top:bottom, left - 1]))
    if right < 64:
        steps.append(np.abs(picture[top:bottom, right] - picture[top:bottom, right - 1]))
    return float(np.concatenate(steps).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--picture", help="file for a grid of results")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = Chameleon.load(arguments.model)
    training, held_out = emoji.load("train"), emoji.load("validation")
    judge = DrawingJudge(training, held_out)
    entries = [entry for entry in representatives(held_out) if entry.hexcode == entry.base]
    entries = random.Random(0).sample(entries, arguments.pictures)
    result: dict[str, dict[str, float]] = {}
    shown: list[PILImage.Image] = []
    for mask_name, box in MASKS.items():
        mask = PILImage.new("L", (64, 64))
        mask.paste(255, box)
        for way, options in WAYS.items():
            start, painted = time.perf_counter(), []
            for number, entry in enumerate(entries):
                painted += model.paint(entry.picture, mask, entry.caption, seed=1000 * number, **options)
            seconds = time.perf_counter() - start
            arrays = [np.asarray(picture).astype(float) for picture in painted]
            originals = [np.asarray(entry.picture).astype(float) for entry in entries]
            left, top, right, bottom = box
            errors = [((a - b)[top:bottom, left:right] ** 2).mean() for a, b in zip(arrays, originals, strict=True)]
            hits = judge.judge(painted, [entry.caption for entry in entries])
            result[f"{mask_name}, {way}"] = {
                "psnr_db": float(np.mean([10 * np.log10(255**2 / max(error, 1e-6)) for error in errors])),
                "seam": float(np.mean([seam(a, box) for a in arrays]) / np.mean([seam(o, box) for o in originals])),
                "right_among_10": hits["right_among_10"],
                "right_nearest": hits["right_nearest"],
                "seconds_a_picture": seconds / len(entries),
            }
            shown += painted[:8]
            print(f"{mask_name}, {way}", {k: round(v, 3) for k, v in result[f"{mask_name}, {way}"].items()}, flush=True)
    if arguments.picture:
        image_grid(shown).save(arguments.picture)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
