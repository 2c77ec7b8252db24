"""Builds the embedded clip art from Debian's package openclipart-svg, the same bytes every time.

    apt-get download openclipart-svg && dpkg -x openclipart-svg_*.deb openclipart
    pip install resvg-py==0.5.0 defusedxml
    python -m chameleon.data.build_clipart --svg openclipart/usr/share/openclipart/svg --out chameleon/data/embedded

`clipart.tsv` names the drawings that are taken: path, name, kind, keywords, author. They were chosen by rules and by eye
from the 7,458 of the package: readable at 64 pixels, not text, not a near-duplicate, not offensive. A drawing is rendered
by resvg on white, cropped to what is not background, centred with a margin of 4%, reduced to 64×64 by Lanczos, and stored
as WebP.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from chameleon.data.build_emoji import SIZE, write_shards
from chameleon.data.colours import dominant_colour
from chameleon.data.labelled import hashed_share
from chameleon.errors import BadInput

TABLE = Path(__file__).parent / "clipart.tsv"
WEBP_QUALITY = 90
SHARDS = 4
HELD_OUT_SHARE = 0.05
MARGIN = 0.04
RENDERED_SIDE, MIN_CONTENT, MAX_SIDE = 256, 160, 2048
"""Pixels at which a drawing is rendered first; what its content must fill, or it is rendered larger, up to the last."""
DOTS_PER_INCH = 90
BACKGROUND = 247
"""Least value of all components of a background pixel."""
COLOURFUL, LINE_ART_SHARE = 40, 0.02
"""A pixel whose components differ by more is coloured; a drawing with a smaller share of such pixels is line art."""
KINDS = {
    "animal": ("animals-nature", "animal-clipart"),
    "plant": ("animals-nature", "plant-clipart"),
    "food": ("food-drink", "food-clipart"),
    "vehicle": ("travel-places", "vehicle"),
    "building": ("travel-places", "building"),
    "nature": ("travel-places", "nature"),
    "person": ("people-body", "person-clipart"),
    "game": ("activities", "game"),
    "object": ("objects", "object"),
    "clothing": ("objects", "clothing"),
    "computer": ("objects", "computer"),
    "music": ("objects", "music"),
    "symbol": ("symbols", "symbol"),
    "flag": ("flags", "flag-clipart"),
}
"""Kind in the table → group and subgroup, as the emoji have them."""


class Row(NamedTuple):
    """A row of the table."""

    path: str
    name: str
    kind: str
    keywords: str
    author: str


def read_table() -> Iterator[Row]:
    with open(TABLE, encoding="utf-8", newline="") as file:
        for values in csv.reader(file, delimiter="\t"):
            yield Row(*values)


def svg_source(path: Path) -> str:
    """Return the text of an SVG without external references; entities that Illustrator writes are expanded."""
    data = path.read_bytes()
    entities = dict(re.findall(rb'<!ENTITY\s+(\w+)\s+"([^"]{0,300})"\s*>', data))
    if entities:
        data = re.sub(rb"<!DOCTYPE[^\[>]*\[.*?\]\s*>", b"", data, count=1, flags=re.DOTALL)
        for _ in range(2):
            data = re.sub(rb"&(\w+);", lambda match: entities.get(match[1], match[0]), data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    text = re.sub(r"(<\?xml[^>]*?)\s+encoding=([\"']).*?\2", r"\1", text, count=1)
    return re.sub(r"(xlink:href=)([\"'])(?!#|data:)[^\"']*\2", r"\1\2#none\2", text)


def size_of(source: str) -> tuple[float, float]:
    """Return width and height of an SVG, from its attributes or its view box; (1, 1) where it has neither."""
    root = importlib.import_module("defusedxml.ElementTree").fromstring(source)
    units = {"px": 1.0, "pt": 1.25, "mm": 3.543, "cm": 35.43, "in": 90.0, "pc": 15.0, "em": 16.0}
    sides = []
    for name in ("width", "height"):
        match = re.match(r"\s*([-+.\deE]+)\s*(px|pt|mm|cm|in|pc|em|%)?", root.get(name) or "")
        sides.append(float(match[1]) * units.get(match[2] or "px", 0.0) if match else 0.0)
    box = [float(value) for value in re.findall(r"[-+.\deE]+", root.get("viewBox") or "")[:4]]
    if min(sides) <= 0 and len(box) == 4:
        sides = box[2:]
    return (sides[0], sides[1]) if min(sides) > 0 else (1.0, 1.0)


def render(source: str, keep_white: bool) -> Image.Image:
    """Return the content of an SVG as RGBA, cropped. keep_white: white at the sides is content, as in flags."""
    resvg = importlib.import_module("resvg_py")
    width, height = size_of(source)
    side = RENDERED_SIDE
    while True:
        scale = side / max(width, height)
        size = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
        drawn = resvg.svg_to_bytes(svg_string=source, skip_system_fonts=True, dpi=DOTS_PER_INCH, **size)
        rgba = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
        box = content_box(rgba, keep_white)
        content = max(box[2] - box[0], box[3] - box[1])
        if content >= MIN_CONTENT or side >= MAX_SIDE:
            return rgba.crop(box)
        side = min(MAX_SIDE, int(side * RENDERED_SIDE / content) + 1)


def content_box(rgba: Image.Image, keep_white: bool) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of what is not background. Raise `BadInput` where there is nothing."""
    box = None
    if keep_white:
        box = rgba.getchannel("A").point(lambda value: 255 * (value > 8)).getbbox()
    else:
        is_content = np.asarray(on_white(rgba)).min(2) < BACKGROUND
        box = Image.fromarray(is_content.astype(np.uint8) * 255).getbbox()
    if box is None:
        raise BadInput("nothing is drawn", where="build_clipart")
    return box


def on_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def squared(content: Image.Image) -> Image.Image:
    """Return RGBA content centred in a transparent square with a margin, at 64×64."""
    side = round(max(content.size) / (1 - 2 * MARGIN))
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(content, ((side - content.width) // 2, (side - content.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def is_line_art(picture: Image.Image) -> bool:
    pixels = np.asarray(picture).astype(int)
    return bool(((pixels.max(2) - pixels.min(2)) > COLOURFUL).mean() < LINE_ART_SHARE)


def samples(svg: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (key, WebP bytes, sidecar) of every drawing of the table."""
    for index, row in enumerate(read_table()):
        path = svg / row.path
        if not path.is_file():
            raise BadInput("no such drawing", where=path, remedy="see the module's docstring")
        group, subgroup = KINDS[row.kind]
        rgba = squared(render(svg_source(path), keep_white=row.kind == "flag"))
        picture, buffer = on_white(rgba), io.BytesIO()
        picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
        yield (
            f"clipart-{index:05d}",
            buffer.getvalue(),
            {
                "concept": f"clipart {row.name}",
                "name": row.name,
                "tags": row.keywords.split(",") if row.keywords else [],
                "group": group,
                "subgroup": subgroup,
                "style": "line art" if is_line_art(picture) else "clip art",
                "colour": dominant_colour(rgba),
                "split": "validation" if hashed_share("clip art split", row.name) < HELD_OUT_SHARE else "train",
                "author": row.author,
            },
        )


def build(svg: Path, out: Path) -> dict[str, int]:
    """Write the shards to `out`; return how many drawings each style has."""
    all_samples = list(samples(svg))
    out.mkdir(parents=True, exist_ok=True)
    write_shards(all_samples, out, "clipart", SHARDS)
    return Counter(sidecar["style"] for _, _, sidecar in all_samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, required=True, help="folder `svg` of the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the shards")
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.svg, arguments.out)))


if __name__ == "__main__":
    main()
