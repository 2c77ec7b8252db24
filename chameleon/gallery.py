"""The gallery: one self-contained page that shows a model's output beside the reference."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as PILImage

from chameleon.data import emoji, labelled
from chameleon.data.questions import questions_about
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.run_view import plot_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
figure img { width: 64px; height: 64px; image-rendering: auto; }
figure .big { width: 128px; height: 128px; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
.answer { font-weight: 600; } .reference { color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { text-align: left; padding: 3px 20px 3px 0; }
th { color: var(--soft); font-weight: 500; } .plot { max-width: 100%; height: auto; }
"""
NUM_PICTURES = 24
NUM_RECONSTRUCTIONS = 12


# --- HTML ------------------------------------------------------------------------------------------------------------


def png_tag(data: bytes, css_class: str) -> str:
    return f'<img class="{css_class}" alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def picture_tag(picture: PILImage.Image, css_class: str = "") -> str:
    """Return an <img> element with the picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return png_tag(buffer.getvalue(), css_class)


def plot_tag(plot: Figure) -> str:
    """Return an <img> element with a matplotlib figure."""
    buffer = io.BytesIO()
    plot.savefig(buffer, dpi=90, format="png")
    return png_tag(buffer.getvalue(), "plot")


def figure(pictures: Iterable[str], lines: Iterable[str]) -> str:
    return f"<figure>{''.join(pictures)}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def grid(figures: Iterable[str], css_class: str = "") -> str:
    return f'<div class="grid {css_class}">{"".join(figures)}</div>'


def answer_lines(answer: str, reference: str) -> list[str]:
    """Return the model's answer, coloured by whether it is right, and the reference."""
    css_class = "right" if answer.lower() == reference.lower() else "wrong"
    shown = html.escape(answer) or "(nothing)"
    return [
        f'<span class="answer {css_class}">{shown}</span>',
        f'<span class="reference">{html.escape(reference)}</span>',
    ]


def page(sections: Sequence[str], title: str, note: str) -> str:
    """Return the complete page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{''.join(sections)}</main></body></html>"
    )


def metrics_table(metrics: dict[str, Any]) -> str:
    """Return the metrics of the suite as a table, each with the base rate beside it: that of guessing without looking."""
    rows = []

    def add(name: str, value: str, base_rate: float | None = None) -> None:
        base = "" if base_rate is None else f"{base_rate:.0%}"
        rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td><td>{base}</td></tr>")

    if drawings := metrics.get("drawings"):
        names = drawings["base_emoji"]
        add(f"drawings whose emoji is among the 10 nearest of {names}", f"{drawings['right_among_10']:.0%}", 10 / names)
        add("drawings whose emoji is the nearest", f"{drawings['right_nearest']:.0%}", 1 / names)
    if captions := metrics.get("captions"):
        add("captions: exact name", f"{captions['exact_name']:.0%}", captions.get("commonest_name"))
        add("captions: CIDEr-D", f"{captions['cider_d']:.2f}")
    for family, scores in metrics.get("questions", {}).items():
        add(f"question: {family}", f"{scores['right']:.0%}", scores["commonest_answer"])
    if reconstruction := metrics.get("reconstruction"):
        add("reconstruction: PSNR", f"{reconstruction['psnr_db']:.1f} dB")
        used = f"{reconstruction['codebook_used']:.0%} used, perplexity {reconstruction['codebook_perplexity']:.0f}"
        add("reconstruction: codes", used)
    for kind in ("text", "code"):
        if f"{kind}_bits_per_byte" in metrics:
            add(f"{'words' if kind == 'text' else kind}: bits per byte", f"{metrics[f'{kind}_bits_per_byte']:.2f}")
    return f"<table><tr><th></th><td>this model</td><td>base rate</td></tr>{''.join(rows)}</table>"


# --- sections --------------------------------------------------------------------------------------------------------


def curves_section(title: str, run: Path) -> str:
    """Return the curves of a run's log; nothing where it logged nothing."""
    try:
        return f"<h3>{html.escape(title)}</h3>{plot_tag(plot_curves(run))}"
    except BadInput:
        return ""


def codebook_plot(codes: torch.Tensor, codebook_size: int) -> str:
    """Return a plot of how often each code is used, most frequent first."""
    from matplotlib.figure import Figure

    counts = torch.bincount(codes.flatten(), minlength=codebook_size).sort(descending=True).values
    plot = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes = plot.add_subplot()
    axes.plot((counts + 1).tolist(), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_title(f"{int((counts > 0).sum())} of {codebook_size} codes used", fontsize=10)
    axes.set_xlabel("codes by frequency", fontsize=8)
    axes.set_ylabel("uses + 1", fontsize=8)
    axes.tick_params(labelsize=8)
    return plot_tag(plot)


def model_section(
    model: Chameleon, title: str, note: str, concepts: int | None, metrics: dict[str, Any], extra: str = "", seed: int = 0
) -> str:
    """Return what one model generates for held-out pictures and for prompts, with its metrics."""
    held_out = emoji.subset("validation", concepts)
    shown = labelled.representatives(held_out, seed)[:NUM_PICTURES]
    pictures = [entry.picture for entry in shown]
    tokenizer = model.tokenizer.image
    reconstructions = tokenizer.decode(tokenizer.encode(pictures))
    captions = model.caption_batch(pictures)
    questions = [(entry, choices[i % len(choices)]) for i, entry in enumerate(shown) if (choices := questions_about(entry))]
    answers = model.answer_batch([(entry.picture, question.question) for entry, question in questions])
    drawable = labelled.representatives([e for e in emoji.subset("train", concepts) if e.hexcode == e.base], seed + 1)
    prompts = [entry.caption for entry in drawable[:: max(1, len(drawable) // NUM_PICTURES)][:NUM_PICTURES]]
    drawings = model.draw_batch(prompts)
    all_codes = tokenizer.encode([entry.picture for entry in held_out])
    compared = list(zip(pictures, reconstructions, shown, strict=True))[:NUM_RECONSTRUCTIONS]
    parts = {
        "Drawings by prompt": grid(
            figure([picture_tag(drawing, "big")], [html.escape(prompt)])
            for prompt, drawing in zip(prompts, drawings, strict=True)
        ),
        "Captions": "<p>The model's caption, and the name. No picture was seen in this style during training.</p>"
        + grid(
            figure([picture_tag(entry.picture)], answer_lines(caption, entry.caption))
            for entry, caption in zip(shown, captions, strict=True)
        ),
        "Questions": grid(
            figure([picture_tag(entry.picture)], [html.escape(question.question), *answer_lines(answer, question.answer)])
            for (entry, question), answer in zip(questions, answers, strict=True)
        ),
        "Pictures and their reconstructions from codes": grid(
            (
                figure([picture_tag(original, "big"), " ", picture_tag(reconstruction, "big")], [html.escape(entry.name)])
                for original, reconstruction, entry in compared
            ),
            "wide",
        ),
        "Metrics on held-out styles": metrics_table(metrics),
        "Use of the codebook": codebook_plot(all_codes, tokenizer.config.codebook_size),
    }
    body = "".join(f"<h3>{heading}</h3>{content}" for heading, content in parts.items())
    return f'<section class="model"><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>{body}{extra}</section>'
