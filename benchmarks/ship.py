"""Makes a trained bundle the shipped one: evaluates it, keeps the figures in its provenance, and writes its model card.

    python benchmarks/ship.py runs/emoji-gpu/finetune/bundle [--device cpu] [--training "…"]

The figures are those of `chameleon evaluate --parts all`, seed 0. `--card` writes the card anew from the figures there are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from chameleon.bundle import SHIPPED
from chameleon.evaluation.emoji import PARTS, evaluate, interval
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
prompts of mixed documents were held out.

## Figures
With 95% intervals (Wilson); `python benchmarks/ship.py` made them. Drawings: guidance {guidance:g}, temperature
{temperature:g}, top-p {top_p:g}.

| figure | value | of |
| --- | --- | --- |
{rows}

A drawing is recognised by its nearest emoji in the features of EfficientNet-Lite0. The judge of styles is right for
{style_ceiling:.0%} of real pictures, and the right emoji is among the 10 nearest for {recognised:.0%} of reconstructions:
both bound what a drawing can reach.

## Limits
It knows 64-pixel drawings on white and the words of its data; photographs and free conversation are outside of it. People
are drawn as emoji draw them. Flags are those of the sources. It has no filter of its own.
"""


def share_rows(figures: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Return (name, share, number of trials) of all shares among the figures."""
    captions, drawings, mixed = figures["captions"], figures["drawings"], figures["mixed"]
    unseen, colours = figures["unseen"], figures["colours"]
    recognition = figures["recognition"]
    rows = [("reconstruction: right emoji among the 10 nearest", recognition["right_among_10"], recognition["drawings"])]
    rows += [("caption: exact name", captions["exact_name"], captions["pictures"])]
    rows += [(f"name in {code}", of["exact_name"], of["asked"]) for code, of in figures["languages"].items()]
    rows += [(f"question: {family}", of["right"], of["asked"]) for family, of in figures["questions"].items()]
    rows += [
        ("drawing of a name: right among the 10 nearest", drawings["right_among_10"], drawings["drawings"]),
        ("drawing of a name: right is the nearest", drawings["right_nearest"], drawings["drawings"]),
        ("unseen pair of concept and style: right among the 10 nearest", unseen["right_among_10"], unseen["drawings"]),
        ("unseen pair of concept and style: style", unseen["right_style"], unseen["drawings"]),
        ("“COLOUR THING”: colour", colours["seen"]["right_colour"], colours["seen"]["drawings"]),
        ("unseen pair of colour and thing: both", colours["unseen"]["right_both"], colours["unseen"]["drawings"]),
        ("mixed document: form", mixed["right_form"], mixed["prompts"]),
        ("mixed document: texts", mixed["right_texts"], mixed["num_texts"]),
        ("mixed document: pictures", mixed["right_pictures"], mixed["num_pictures"]),
    ]
    return rows


def figure_rows(figures: dict[str, Any]) -> list[str]:
    """Return the rows of the table of figures, in Markdown."""
    rows = []
    for name, share, count in share_rows(figures):
        low, high = interval(share, count)
        rows.append(f"| {name} | {share:.1%} ({low:.0%} to {high:.0%}) | {count} |")
    quality = figures["reconstruction"]
    for name, value in (
        ("reconstruction: PSNR, ST-LPIPS", f"{quality['psnr_db']:.2f} dB, {quality['st_lpips']:.3f}"),
        ("codes that differ between drawings of one prompt", f"{figures['variety']['differing_codes']:.0%}"),
        ("bits per byte: words, code", f"{figures['text_bits_per_byte']:.2f}, {figures['code_bits_per_byte']:.2f}"),
    ):
        rows.append(f"| {name} | {value} | |")
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
        style_ceiling=figures["unseen"]["right_style_of_real_pictures"],
        recognised=figures["recognition"]["right_among_10"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--training", help="a sentence on how long it was trained, on what")
    parser.add_argument("--card", action="store_true", help="only write the card")
    options = parser.parse_args()
    model = Chameleon.load(options.bundle, device=options.device)
    provenance_file = options.bundle / "provenance.json"
    provenance = json.loads(provenance_file.read_text(encoding="utf-8"))
    provenance["trained"] = options.training or provenance.get("trained", "")
    if not options.card:
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
