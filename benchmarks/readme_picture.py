"""Draws the README's picture from the shipped model: held-out pictures, their reconstructions from 64 codes, and answers.

python benchmarks/readme_picture.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from chameleon import Chameleon
from chameleon.data import emoji

QUESTIONS = ("what kind of thing is it?", "which colour is it?")


def main() -> None:
    model = Chameleon.load()
    shown = [entry for entry in emoji.representatives(emoji.load("validation")) if entry.colour][:24:3]
    pictures = [entry.picture for entry in shown]
    rebuilt = model.tokenizer.image.decode(model.tokenizer.image.encode(pictures))
    rows = [model.answer_batch([(picture, question) for picture in pictures]) for question in QUESTIONS]
    sheet = Image.new("RGB", (20 + 150 * len(shown), 130), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (before, after, *answers) in enumerate(zip(pictures, rebuilt, *rows, strict=True)):
        left = 15 + 150 * number
        sheet.paste(before, (left, 10))
        sheet.paste(after, (left + 66, 10))
        for line, answer in enumerate(answers):
            pen.text((left, 82 + 18 * line), answer, fill=(28, 36, 48))
    sheet.save(Path(__file__).parent / "readme.png")


if __name__ == "__main__":
    main()
