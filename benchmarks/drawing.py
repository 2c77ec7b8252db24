"""How the settings of sampling change drawings: right among the 10 nearest, over 200 training names chosen by another seed
than those of `chameleon evaluate`. First, what the tokenizer's own reconstructions of such names reach.

    python benchmarks/drawing.py [BUNDLE]
"""

from __future__ import annotations

import sys

from chameleon import Chameleon
from chameleon.data import emoji
from chameleon.evaluation.drawings import DrawingJudge, DrawingSettings, drawing_accuracy
from chameleon.generation.sampling import Sampling

SEED, COUNT = 1, 200
SETTINGS = (
    (5, 0.7, 0.9),
    (3, 0.7, 0.9),
    (2, 0.7, 0.9),
    (1, 0.7, 0.9),
    (3, 0.0, 1.0),
    (2, 0.4, 0.9),
    (1, 0.4, 0.9),
    (1.5, 0.4, 0.9),
    (1.5, 0.0, 1.0),
    (1.7, 0.3, 0.5),
    (1.2, 0.3, 0.5),
    (1.5, 0.3, 0.5),
    (1.5, 0.5, 0.5),
)


def main() -> None:
    model = Chameleon.load(*sys.argv[1:])
    judge = DrawingJudge(emoji.load("train"), emoji.load("validation"))
    names = judge.choose_names(COUNT, SEED)
    pictures = {entry.caption: entry.picture for entry in judge.drawable}
    codes = model.tokenizer.image.encode([pictures[name] for name in names])
    show("reconstructions", judge.judge(model.tokenizer.image.decode(codes), names))
    for guidance, temperature, top_p in SETTINGS:
        settings = DrawingSettings(SEED, guidance, Sampling(temperature, top_p))
        figures = drawing_accuracy(model, judge, COUNT, settings, SEED)
        show(f"| {guidance} | {temperature} | {top_p} |", figures)


def show(what: str, figures: dict[str, float]) -> None:
    print(what, f"{100 * figures['right_among_10']:.1f}% ({100 * figures['right_nearest']:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
