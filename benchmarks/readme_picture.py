"""Draws the README's picture from the shipped model: held-out pictures with what it says of them, and its drawings.

    python benchmarks/readme_picture.py

Which pictures and prompts are shown is fixed by their order, not by how they came out.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from chameleon import Chameleon
from chameleon.data import emoji, labelled

QUESTION = "what kind of thing is it?"
COLUMNS, WIDTH, SIDE = 8, 150, 64
INK, SOFT = (28, 36, 48), (102, 112, 133)


def main() -> None:
    model = Chameleon.load()
    plain = [entry for entry in labelled.representatives(emoji.load("validation")) if entry.colour]
    shown = plain[:: len(plain) // COLUMNS][:COLUMNS]
    pictures = [entry.picture for entry in shown]
    rebuilt = model.tokenizer.image.decode(model.tokenizer.image.encode(pictures))
    captions = model.caption_batch(pictures)
    answers = model.answer_batch([(picture, QUESTION) for picture in pictures])
    base = labelled.representatives([entry for entry in emoji.load("train") if entry.hexcode == entry.base])
    prompts = [entry.caption for entry in base[:: len(base) // COLUMNS][:COLUMNS]]
    drawings = model.draw_batch(prompts)
    sheet = Image.new("RGB", (20 + WIDTH * COLUMNS, 250), "white")
    pen = ImageDraw.Draw(sheet)
    for number in range(COLUMNS):
        left = 15 + WIDTH * number
        sheet.paste(pictures[number], (left, 10))
        sheet.paste(rebuilt[number], (left + SIDE + 4, 10))
        pen.multiline_text((left, 80), lines(captions[number]), fill=INK)
        pen.text((left, 108), answers[number], fill=SOFT)
        sheet.paste(drawings[number], (left, 144))
        pen.multiline_text((left, 214), lines(prompts[number]), fill=INK)
    sheet.save(Path(__file__).parent / "readme.png")


def lines(text: str) -> str:
    """At most two lines that fit a column."""
    return "\n".join(textwrap.wrap(text, 22)[:2])


if __name__ == "__main__":
    main()
