"""Views of generated documents: on a terminal as they are generated, and as Markdown or HTML pages with image files."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.live import Live

from chameleon.document import Image, Part, Text
from chameleon.generation.streaming import PartialImage

STYLE = "body{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:2rem auto;padding:0 1rem;white-space:pre-wrap}"
IMAGE_COLUMNS = 32
"""Width of an image on a terminal."""


class TerminalView:
    """Shows parts as they are generated; images in their place where the terminal can show them, else by name."""

    def __init__(
        self, console: Console | None = None, renderable_of: Callable[[PILImage.Image], Any] | None = None
    ) -> None:
        """renderable_of: returns what rich shows for an image; by default what fits the terminal, None without one."""
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.renderable_of = renderable_of or (terminal_image_renderer() if self.console.is_terminal else None)
        self.live: Live | None = None

    def show(self, part: Part | PartialImage) -> None:
        """Show a part, or the upper part of an image, which the next one replaces."""
        if isinstance(part, Text):
            self.write(part.text)
        elif self.renderable_of is None or not isinstance(part.image, PILImage.Image):
            if isinstance(part, Image):
                name = "" if isinstance(part.image, (PILImage.Image, bytes)) else f" {part.image}"
                self.write(f"[image{name}]")
        else:
            if self.live is None:
                self.write("\n")
                self.live = Live(console=self.console, auto_refresh=False)
                self.live.start()
            self.live.update(self.renderable_of(part.image), refresh=True)
            if isinstance(part, Image):
                self.close()

    def write(self, text: str) -> None:
        """Write text unchanged: tabs are not expanded, and nothing is interpreted as markup."""
        self.console.file.write(text)
        self.console.file.flush()

    def close(self) -> None:
        """Leave the last image where it is."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def terminal_image_renderer() -> Callable[[PILImage.Image], Any]:
    """Return how this terminal shows images: by sixels, Kitty's protocol, or coloured half blocks."""
    from textual_image.renderable import Image as Renderable  # asks the terminal what it supports

    return lambda image: Renderable(image, width=IMAGE_COLUMNS)


def as_markdown(parts: Sequence[Part], file_names: Sequence[str]) -> str:
    """Return a Markdown page; `file_names` are those of the images, in order."""
    files = iter(file_names)
    pieces = [part.text if isinstance(part, Text) else f"\n\n![image]({next(files)})\n\n" for part in parts]
    return "".join(pieces).strip() + "\n"


def as_html(parts: Sequence[Part], file_names: Sequence[str]) -> str:
    """Return an HTML page; `file_names` are those of the images, in order."""
    files = iter(file_names)
    pieces = [
        html.escape(part.text) if isinstance(part, Text) else f'<p><img src="{html.escape(next(files))}" alt="image"></p>'
        for part in parts
    ]
    return f'<!doctype html><meta charset="utf-8"><title>document</title><style>{STYLE}</style>\n{"".join(pieces)}\n'


PAGES: dict[str, tuple[str, Callable[[Sequence[Part], Sequence[str]], str]]] = {
    "markdown": ("document.md", as_markdown),
    "html": ("document.html", as_html),
}
"""Format of a page → (file name, function that renders it)."""


def write_page(folder: Path, parts: Sequence[Part], page_format: str) -> tuple[str, list[str]]:
    """Write a page and its images to a folder; return the names of their files."""
    images = [part.image for part in parts if isinstance(part, Image)]
    image_names = [f"image-{index}.png" for index in range(len(images))]
    for name, image in zip(image_names, images, strict=True):
        assert isinstance(image, PILImage.Image)
        image.save(folder / name)
    page_name, render = PAGES[page_format]
    (folder / page_name).write_text(render(parts, image_names), encoding="utf-8")
    return page_name, image_names


def image_grid(images: Sequence[PILImage.Image]) -> PILImage.Image:
    """Return images as an approximately square grid, smaller ones on white; a single one unchanged."""
    if len(images) == 1:
        return images[0]
    size = max(image.width for image in images), max(image.height for image in images)
    cells = [PILImage.new("RGB", size, "white") for _ in images]
    for cell, image in zip(cells, images, strict=True):
        cell.paste(image.convert("RGB"), ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image  # here, since they take long to import
    from torchvision.utils import make_grid

    num_columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    tensors = torch.stack([pil_to_tensor(cell) for cell in cells])
    return to_pil_image(make_grid(tensors, nrow=num_columns, padding=2, pad_value=255))
