"""The gallery: one self-contained page that shows what a model does, beside the truth."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage

from chameleon.data import emoji
from chameleon.generation.chameleon import Chameleon

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
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px; background: white; }
figure img { width: 64px; height: 64px; image-rendering: auto; }
figure .big { width: 96px; height: 96px; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
.said { font-weight: 600; } .truth { color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { text-align: left; padding: 3px 20px 3px 0; }
th { color: var(--soft); font-weight: 500; } svg { max-width: 100%; height: auto; } .curves { display: flex; flex-wrap: wrap; gap: 20px; }
"""


def picture_tag(picture: PILImage.Image, kind: str = "") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{kind}" alt="" src="data:image/png;base64,{data}">'


def figure(pictures: Iterable[str], lines: Iterable[str]) -> str:
    return f"<figure>{''.join(pictures)}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def said(text: str, truth: str) -> str:
    kind = "right" if text.lower() == truth.lower() else "wrong"
    return f'<span class="said {kind}">{html.escape(text) or "(nothing)"}</span>'


def short(value: float) -> str:
    """A number as an axis has room for it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def curve(
    title: str, points: Sequence[tuple[float, float]], size: tuple[int, int] = (320, 180), across_name: str = "step"
) -> str:
    """A line through points as SVG, with the ends of both axes named."""
    points = [(x, y) for x, y in points if y == y]
    if len(points) < 2:
        return ""
    width, height = size
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    across, up = max(xs) - min(xs) or 1, high - low or 1
    line = " ".join(
        f"{45 + (x - min(xs)) / across * (width - 60):.1f},{height - 25 - (y - low) / up * (height - 55):.1f}"
        for x, y in points
    )
    label = 'font-size="11" fill="#667085"'
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="45" y="16" font-size="13" fill="#1c2430">{html.escape(title)}</text>'
        f'<text x="40" y="34" text-anchor="end" {label}>{short(high)}</text>'
        f'<text x="40" y="{height - 22}" text-anchor="end" {label}>{short(low)}</text>'
        f'<text x="45" y="{height - 6}" {label}>{across_name} {min(xs):.0f}</text>'
        f'<text x="{width - 12}" y="{height - 6}" text-anchor="end" {label}>{max(xs):.0f}</text>'
        f'<polyline points="{line}" fill="none" stroke="#3b5bdb" stroke-width="1.6"/></svg>'
    )


def curves(log: Path, wanted: dict[str, str]) -> str:
    """Curves of the named columns of a run's metrics.csv."""
    path = log / "metrics.csv"
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    for column, title in wanted.items():
        points = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
        drawn.append(curve(title, points))
    return f'<div class="curves">{"".join(drawn)}</div>'


def usage(codes: torch.Tensor, size: int) -> str:
    """How often each code is used, commonest first, as a curve of log10 counts."""
    counts = torch.bincount(codes.flatten(), minlength=size).sort(descending=True).values
    points = [(float(rank), float(count)) for rank, count in enumerate((counts + 1).double().log10().tolist())]
    used = int((counts > 0).sum())
    return curve(f"codebook: {used} of {size} codes used; log10(uses + 1) by rank", points, (460, 200), "rank")


def model_section(
    model: Chameleon, title: str, note: str, concepts: int | None, figures: dict[str, Any], extra: str = "", seed: int = 0
) -> str:
    """What one model makes of held-out pictures and of prompts."""
    shown = emoji.representatives(emoji.subset("validation", concepts), seed)[:24]
    pictures = [entry.picture for entry in shown]
    codes = model.tokenizer.image.encode(pictures)
    rebuilt = model.tokenizer.image.decode(codes)
    parts = [f'<section class="model"><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>']
    parts.append("<h3>Figures on held-out styles</h3>" + figure_table(figures))
    parts.append("<h3>Pictures and their reconstructions from codes</h3>")
    parts.append(
        grid(
            figure([picture_tag(a), " ", picture_tag(b)], [html.escape(entry.name)])
            for a, b, entry in list(zip(pictures, rebuilt, shown, strict=True))[:12]
        )
    )
    all_codes = model.tokenizer.image.encode([entry.picture for entry in emoji.subset("validation", concepts)])
    parts.append("<h3>Use of the codebook</h3>" + usage(all_codes, model.tokenizer.image.config.codebook_size))
    captions = model.caption_batch(pictures)
    parts.append("<h3>Captions</h3><p>What the model says, and the name. No picture was seen in this style.</p>")
    parts.append(
        grid(
            figure(
                [picture_tag(entry.picture)],
                [said(text, entry.caption), f'<span class="truth">{html.escape(entry.caption)}</span>'],
            )
            for entry, text in zip(shown, captions, strict=True)
        )
    )
    asked = []
    for number, entry in enumerate(shown):
        choices = emoji.questions(entry)
        asked.append((entry, choices[number % len(choices)]))
    answers = model.answer_batch([(entry.picture, question.question) for entry, question in asked])
    parts.append("<h3>Questions</h3>")
    parts.append(
        grid(
            figure(
                [picture_tag(entry.picture)],
                [
                    html.escape(question.question),
                    said(text, question.answer),
                    f'<span class="truth">{html.escape(question.answer)}</span>',
                ],
            )
            for (entry, question), text in zip(asked, answers, strict=True)
        )
    )
    known = emoji.representatives([e for e in emoji.subset("train", concepts) if e.hexcode == e.base], seed + 1)
    step = max(1, len(known) // 24)
    prompts = [entry.caption for entry in known[::step][:24]]
    parts.append("<h3>Drawings by prompt</h3>")
    parts.append(
        grid(
            figure([picture_tag(picture, "big")], [html.escape(prompt)])
            for prompt, picture in zip(prompts, model.draw_batch(prompts), strict=True)
        )
    )
    parts.append(extra + "</section>")
    return "".join(parts)


def figure_table(figures: dict[str, Any]) -> str:
    rows = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name} / {key}" if name else key, inner)
        else:
            rows.append(f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{value:.4g}</td></tr>")

    walk("", figures)
    return f"<table>{''.join(rows)}</table>"


def page(sections: Sequence[str], title: str, note: str) -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{''.join(sections)}</main></body></html>"
    )
