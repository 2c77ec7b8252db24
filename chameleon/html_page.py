"""Pieces of a self-contained HTML page: pictures as data URLs, figures in a grid, the page around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image as PILImage

# ruff: noqa: E501 (style sheet)
STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --good: #16794c; --bad: #b42318; --accent: #3b5bdb; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f7f8fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 44px 0 4px; } h3 { font-size: 16px; margin: 24px 0 8px; }
p { color: var(--soft); margin: 0 0 12px; max-width: 75ch; }
section.model { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 8px 24px 24px; margin-top: 24px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px; background: white; }
figure img { width: 64px; height: 64px; object-fit: contain; image-rendering: auto; }
figure .big { width: 128px; height: 128px; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
.answer { font-weight: 600; } .reference { color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { text-align: left; padding: 3px 20px 3px 0; }
th { color: var(--soft); font-weight: 500; } .plot { max-width: 100%; height: auto; }
"""


def png_tag(data: bytes, css_class: str) -> str:
    return f'<img class="{css_class}" alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def picture_tag(picture: PILImage.Image, css_class: str = "") -> str:
    """Return an <img> element with the picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return png_tag(buffer.getvalue(), css_class)


def figure(pictures: Iterable[str], lines: Iterable[str]) -> str:
    return f"<figure>{''.join(pictures)}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def grid(figures: Iterable[str], css_class: str = "") -> str:
    return f'<div class="grid {css_class}">{"".join(figures)}</div>'


def page(sections: Sequence[str], title: str, note: str) -> str:
    """Return the complete page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{''.join(sections)}</main></body></html>"
    )
