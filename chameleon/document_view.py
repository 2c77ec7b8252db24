"""Documents for people: as they come on a terminal, and as Markdown or HTML pages with their pictures beside them."""

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
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from chameleon.document import Image, Part, Text
from chameleon.generation.streaming import Forming

STYLE = "body{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:2rem auto;padding:0 1rem;white-space:pre-wrap}"
PICTURE_WIDTH = 32  # columns


class TerminalView:
    """Shows parts as they come; pictures in their place where the terminal can, as they form, else by name."""

    def __init__(self, console: Console | None = None, draws: Callable[[PILImage.Image], Any] | None = None) -> None:
        """draws: makes a picture that rich can show; by default what fits the terminal, nothing where there is none."""
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.draws = draws or (terminal_pictures() if self.console.is_terminal else None)
        self.live: Live | None = None

    def show(self, part: Part | Forming) -> None:
        """A part, or the upper part of a picture that the next one replaces."""
        if isinstance(part, Text):
            self.write(part.text)
        elif self.draws is None or not isinstance(part.image, PILImage.Image):
            if isinstance(part, Image):
                name = "" if isinstance(part.image, PILImage.Image) else f" {part.image}"
                self.write(f"[picture{name}]")
        else:
            if self.live is None:
                self.write("\n")
                self.live = Live(console=self.console, auto_refresh=False)
                self.live.start()
            self.live.update(self.draws(part.image), refresh=True)
            if isinstance(part, Image):
                self.close()

    def write(self, text: str) -> None:
        """As it is: no tab is widened, nothing is taken for markup."""
        self.console.file.write(text)
        self.console.file.flush()

    def close(self) -> None:
        """Leaves the last picture where it is."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def terminal_pictures() -> Callable[[PILImage.Image], Any]:
    """How this terminal shows pictures: sixel, Kitty's protocol, or half blocks of colour."""
    from textual_image.renderable import Image as Picture  # asks the terminal what it can

    return lambda picture: Picture(picture, width=PICTURE_WIDTH)


def as_markdown(parts: Sequence[Part], names: Sequence[str]) -> str:
    """A page in Markdown; `names` are the files of the pictures, in order."""
    files = iter(names)
    pieces = [part.text if isinstance(part, Text) else f"\n\n![picture]({next(files)})\n\n" for part in parts]
    return "".join(pieces).strip() + "\n"


def as_html(parts: Sequence[Part], names: Sequence[str]) -> str:
    """The same in HTML."""
    files = iter(names)
    pieces = [
        html.escape(part.text) if isinstance(part, Text) else f'<p><img src="{html.escape(next(files))}" alt="picture"></p>'
        for part in parts
    ]
    return f'<!doctype html><meta charset="utf-8"><title>document</title><style>{STYLE}</style>\n{"".join(pieces)}\n'


PAGES: dict[str, tuple[str, Callable[[Sequence[Part], Sequence[str]], str]]] = {
    "markdown": ("document.md", as_markdown),
    "html": ("document.html", as_html),
}


def write_page(folder: Path, parts: Sequence[Part], kind: str) -> tuple[str, list[str]]:
    """Writes the page and its pictures into a folder; the names of their files."""
    pictures = [part.image for part in parts if isinstance(part, Image)]
    names = [f"picture-{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        assert isinstance(picture, PILImage.Image)
        picture.save(folder / name)
    file, render = PAGES[kind]
    (folder / file).write_text(render(parts, names), encoding="utf-8")
    return file, names


def as_grid(pictures: Sequence[PILImage.Image]) -> PILImage.Image:
    """The pictures side by side, in as many rows as columns or one fewer; one picture is itself."""
    if len(pictures) == 1:
        return pictures[0]
    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    tensors = torch.stack([pil_to_tensor(picture.convert("RGB")) for picture in pictures])
    return to_pil_image(make_grid(tensors, nrow=columns, padding=2, pad_value=255))
