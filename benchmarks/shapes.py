"""Pictures of several shapes: how often a model of the recipe `shapes` draws in the shape that its prompt asks for, and how
its drawings compare with those of a model that draws squares, such as that of the recipe `demo`.

    python benchmarks/shapes.py runs/shapes/finetune/bundle --square runs/demo/finetune/bundle [--picture FILE]

Nothing is said of the size but by the prompt: the model writes the two size tokens itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image as PILImage

from chameleon.data import emoji
from chameleon.data.labelled import LabelledPicture, representatives
from chameleon.data.shape_tasks import BANNER, FLAG, OTHER_SHAPES, SIDE_BY_SIDE, SQUARE, Size
from chameleon.document_view import image_grid
from chameleon.evaluation.drawings import DrawingJudge
from chameleon.evaluation.pictures import EffNetLite0, nearest_names
from chameleon.generation.chameleon import Chameleon

PER_KIND = 60


def prompts(entries: Sequence[LabelledPicture], rng: random.Random) -> dict[str, list[tuple[str, Size, list[str]]]]:
    """Return by kind of prompt: (prompt, size that it asks for, names of what is to be seen)."""
    flags = [entry for entry in entries if entry.subgroup == "country-flag"]
    things = [entry for entry in entries if entry.subgroup != "country-flag"]
    sized = [(entry, rng.choice(OTHER_SHAPES)) for entry in rng.sample(things, PER_KIND)]
    pairs = [rng.sample(things, 2) for _ in range(2 * PER_KIND)]
    return {
        "single": [(entry.name, SQUARE, [entry.name]) for entry in rng.sample(things, PER_KIND)],
        "flag": [(entry.name, FLAG, [entry.name]) for entry in flags[:PER_KIND]],
        "size named": [(f"{entry.name}, {w}x{h}", (w, h), [entry.name]) for entry, (w, h) in sized],
        "side by side": [(f"{a.name} and {b.name}", SIDE_BY_SIDE, [a.name, b.name]) for a, b in pairs[:PER_KIND]],
        "above": [(f"{a.name} above {b.name}", BANNER, [a.name, b.name]) for a, b in pairs[PER_KIND:]],
    }


def parts(picture: PILImage.Image, count: int) -> list[PILImage.Image]:
    """Return the picture, or its halves."""
    width, height = picture.size
    if count == 1:
        return [picture]
    if width > height:
        return [picture.crop((0, 0, width // 2, height)), picture.crop((width // 2, 0, width, height))]
    return [picture.crop((0, 0, width, height // 2)), picture.crop((0, height // 2, width, height))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--square", help="bundle of a model that draws squares, for the same names")
    parser.add_argument("--concepts", type=int, default=160)
    parser.add_argument("--picture", help="file for a grid of drawings")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = Chameleon.load(arguments.bundle)
    training = emoji.subset("train", arguments.concepts)
    entries = [entry for entry in representatives(training) if not entry.is_variant]
    features, gallery = EffNetLite0(), [entry for entry in training if not entry.is_variant]
    gallery_features, names = features([entry.picture for entry in gallery]), [entry.name for entry in gallery]
    result: dict[str, dict[str, float]] = {}
    shown: list[PILImage.Image] = []
    for kind, asked in prompts(entries, random.Random(0)).items():
        drawings = model.draw_batch([prompt for prompt, _, _ in asked])
        shown += drawings[:6]
        pieces = [piece for (_, _, wanted), d in zip(asked, drawings, strict=True) for piece in parts(d, len(wanted))]
        near = nearest_names(features(pieces), gallery_features, names)
        wanted_names = [name for _, _, wanted in asked for name in wanted]
        result[kind] = {
            "prompts": len(asked),
            "right shape": sum(d.size == size for (_, size, _), d in zip(asked, drawings, strict=True)) / len(asked),
            "among 10": sum(n in found for n, found in zip(wanted_names, near, strict=True)) / len(near),
            "nearest": sum(n == found[0] for n, found in zip(wanted_names, near, strict=True)) / len(near),
        }
        sized = [model.draw(prompt.partition(",")[0], size=size) for prompt, size, _ in asked[:5]]
        assert [d.size for d in sized] == [size for _, size, _ in asked[:5]]
    if arguments.square:
        judge = DrawingJudge(training, emoji.subset("validation", arguments.concepts))
        drawable = judge.choose_names(PER_KIND)
        for label, path in (("square, this recipe", arguments.bundle), ("square, the other model", arguments.square)):
            result[label] = judge.judge(Chameleon.load(path).draw_batch(drawable), drawable)
    if arguments.picture:
        image_grid(shown).save(Path(arguments.picture))
    print(json.dumps({kind: {k: round(v, 3) for k, v in row.items()} for kind, row in result.items()}, indent=1))


if __name__ == "__main__":
    main()
