"""Makes a trained bundle the shipped one: evaluates it, keeps the figures in its provenance, and writes its model card.

    python benchmarks/ship.py runs/emoji-gpu/finetune/bundle [--device cpu] [--training "…"]

The figures are those of `chameleon evaluate emoji parts=[all]`, seed 0, or of a scorecard. `--card` writes the card anew
from the figures there are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from chameleon.bundle import SHIPPED
from chameleon.evaluation.emoji import NAMED_LANGUAGES, PARTS, evaluate
from chameleon.evaluation.scorecard import Scorecard
from chameleon.evaluation.statistics import Figure
from chameleon.files import write_json
from chameleon.generation.chameleon import GUIDANCE_SCALE, Chameleon
from chameleon.generation.sampling import IMAGE_SAMPLING

CARD = """# The emoji model
A small unified model of text and pictures: it captions, answers, draws, and writes documents in which text and pictures
alternate. It is for tests and demonstrations, and was trained on emoji and clip art alone.

| | |
| --- | --- |
| Transformer | {layers} layers of width {width}, {parameters:.1f} million parameters, {context_length} tokens of context |
| image tokenizer | {resolution}×{resolution} pixels as {grid}×{grid} codes of {codebook_size} |
| text tokenizer | byte-pair encoding with {text_pieces} pieces, byte fallback |
| training | {training} |

## Data and licences
| data | licence |
| --- | --- |
| Noto Emoji (Google) | Apache-2.0 |
| Twemoji (Twitter and contributors) | CC-BY-4.0 |
| Fluent Emoji (Microsoft) | MIT |
| names and keywords in twelve languages: emojibase-data (Miles Johnson) | MIT |
| clip art: Open Clip Art Library | public domain |
| code: Python's standard library | PSF-2.0 |

The weights are under Apache-2.0. For 15% of the concepts one style is held out: reconstructions, captions, names and
questions are measured on those pictures. Drawings of names, colours and mixed documents are of concepts that training saw;
prompts of mixed documents were held out. Unseen pairs of colour and thing are those that no emoji of the training
set shows and no clip art is called by; pictures to be captioned were also shown in other colours.

## Figures
With 95% intervals (bootstrap) and what guessing reaches; `chameleon evaluate emoji parts=[all]` made them. Drawings:
guidance {guidance:g}, temperature {temperature:g}, top-p {top_p:g}.

| figure | value | base rate | of |
| --- | --- | --- | --- |
{rows}

A drawing is recognised by its nearest emoji in the features of EfficientNet-Lite0. The judge of styles is right for
{style_ceiling:.0%} of real pictures, and the right emoji is among the 10 nearest for {recognised:.0%} of reconstructions:
both bound what a drawing can reach.

## Limits
It knows 64-pixel drawings on white and the words of its data; photographs and free conversation are outside of it. People
are drawn as emoji draw them. Flags are those of the sources. It has no filter of its own.
"""


LABELS = {
    "recognition / right_among_10": "reconstruction: right emoji among the 10 nearest",
    "captions / exact_name": "caption: exact name",
    **{f"languages / {code}": f"name in {code}" for code in NAMED_LANGUAGES},
    "questions / ": "question: ",
    "drawings / right_among_10": "drawing of a name: right among the 10 nearest",
    "drawings / right_nearest": "drawing of a name: right is the nearest",
    "unseen / right_among_10": "unseen pair of concept and style: right among the 10 nearest",
    "unseen / right_style": "unseen pair of concept and style: style",
    "colours / seen_right_colour": "“COLOUR THING”: colour",
    "colours / unseen_right_both": "unseen pair of colour and thing: both",
    "counts / right_number": "“three THINGS”: number",
    "mixed / right_form": "mixed document: form",
    "mixed / right_texts": "mixed document: texts",
    "mixed / right_pictures": "mixed document: pictures",
}
"""Shares among the figures and how the card calls them; a name that ends with a slash stands for all of its part."""
QUANTITIES = {
    "reconstruction / psnr_db": ("reconstruction: PSNR in dB", ".2f"),
    "reconstruction / st_lpips": ("reconstruction: ST-LPIPS", ".3f"),
    "variety / differing_codes": ("codes that differ between drawings of one prompt", ".0%"),
    "likelihood / text_bits_per_byte": ("bits per byte: words", ".2f"),
    "likelihood / code_bits_per_byte": ("bits per byte: code", ".2f"),
}
"""Other figures: what the card calls them, and their format."""


def figure_rows(figures: dict[str, Any]) -> list[str]:
    """Return the rows of the table of figures, in Markdown."""
    chosen: dict[str, tuple[str, str]] = {}
    for prefix, label in LABELS.items():
        if prefix.endswith("/ "):
            chosen |= {name: (label + name.removeprefix(prefix), ".1%") for name in figures if name.startswith(prefix)}
        else:
            chosen[prefix] = label, ".1%"
    rows = []
    for name, (label, form) in {**chosen, **QUANTITIES}.items():
        figure = Figure.from_json(figures[name])
        short = ".0%" if form == ".1%" else form
        bounds = f" ({figure.low:{short}} to {figure.high:{short}})" if figure.low is not None else ""
        base_rate = "" if figure.base_rate is None else f"{figure.base_rate:.1%}"
        rows.append(f"| {label} | {figure.value:{form}}{bounds} | {base_rate} | {figure.count} |")
    return rows


def card(model: Chameleon, figures: dict[str, Any], training: str) -> str:
    """Return the model card of a bundle with its figures."""
    config, image = model.model.config, model.tokenizer.image.config
    return CARD.format(
        layers=config.layers,
        width=config.width,
        parameters=config.parameters / 1e6,
        context_length=config.context_length,
        resolution=image.resolution,
        grid=image.grid[0],
        codebook_size=image.codebook_size,
        text_pieces=len(model.tokenizer.text),
        training=training,
        guidance=GUIDANCE_SCALE,
        temperature=IMAGE_SAMPLING.temperature,
        top_p=IMAGE_SAMPLING.top_p,
        rows="\n".join(figure_rows(figures)),
        style_ceiling=figures["unseen / right_style_of_real_pictures"]["value"],
        recognised=figures["recognition / right_among_10"]["value"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--training", help="a sentence on how long it was trained, on what")
    parser.add_argument("--card", action="store_true", help="only write the card")
    parser.add_argument("--scorecard", type=Path, help="take the figures of this scorecard of the suite emoji")
    options = parser.parse_args()
    provenance_file = options.bundle / "provenance.json"
    provenance = json.loads(provenance_file.read_text(encoding="utf-8"))
    provenance["trained"] = options.training or provenance.get("trained")
    if not provenance["trained"]:
        parser.error(f"{options.bundle} does not say how it was trained; give --training")
    model = Chameleon.load(options.bundle, device=options.device)
    if options.scorecard:
        figures = Scorecard.read(options.scorecard).figures()
        provenance["evaluation"] = {name.removeprefix("emoji / "): of.to_json() for name, of in figures.items()}
    elif not options.card:
        provenance["evaluation"] = evaluate(
            model, parts=tuple(PARTS), progress=lambda part, done, total: print(part, done, total, flush=True)
        )
    write_json(provenance_file, provenance)
    text = card(model, provenance["evaluation"], provenance["trained"])
    (options.bundle / "README.md").write_text(text, encoding="utf-8")
    if options.bundle.resolve() != SHIPPED.resolve():
        names = [*provenance["sha256"], "provenance.json", "README.md"]
        for path in SHIPPED.iterdir():
            path.unlink()
        for name in names:
            shutil.copy(options.bundle / name, SHIPPED / name)
    print(text)


if __name__ == "__main__":
    main()
