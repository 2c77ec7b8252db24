"""The gallery: one self-contained page that shows a model's output beside the reference."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chameleon.data import emoji, labelled
from chameleon.data.questions import questions_about
from chameleon.errors import BadInput
from chameleon.evaluation.statistics import Figure
from chameleon.generation.chameleon import Chameleon
from chameleon.html_page import figure, grid, picture_tag, png_tag
from chameleon.run_view import plot_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

NUM_PICTURES = 24
NUM_RECONSTRUCTIONS = 12


def plot_tag(plot: Plot) -> str:
    """Return an <img> element with a matplotlib figure."""
    buffer = io.BytesIO()
    plot.savefig(buffer, dpi=90, format="png")
    return png_tag(buffer.getvalue(), "plot")


def answer_lines(answer: str, reference: str) -> list[str]:
    """Return the model's answer, coloured by whether it is right, and the reference."""
    css_class = "right" if answer.lower() == reference.lower() else "wrong"
    shown = html.escape(answer) or "(nothing)"
    return [
        f'<span class="answer {css_class}">{shown}</span>',
        f'<span class="reference">{html.escape(reference)}</span>',
    ]


LABELS = {
    "drawings / right_among_10": "drawings whose emoji is among the 10 nearest",
    "drawings / right_nearest": "drawings whose emoji is the nearest",
    "captions / exact_name": "captions: exact name",
    "captions / cider_d": "captions: CIDEr-D",
    "reconstruction / psnr_db": "reconstruction: PSNR in dB",
    "reconstruction / codebook_used": "reconstruction: share of the codebook used",
    "likelihood / text_bits_per_byte": "words: bits per byte",
    "likelihood / code_bits_per_byte": "code: bits per byte",
}
"""Figures of the gallery, in this order, and how they are called there; questions follow."""


def metrics_table(figures: dict[str, dict[str, Any]]) -> str:
    """Return figures of the suite as a table, each with its interval and base rate, that of guessing without looking."""
    questions = {name: f"question: {name.partition(' / ')[2]}" for name in figures if name.startswith("questions / ")}
    rows = []
    for name, label in {**LABELS, **questions}.items():
        if name not in figures:
            continue
        figure = Figure.from_json(figures[name])
        is_share = figure.base_rate is not None or name.endswith("codebook_used")
        cells = [f"{figure.value:.0%}" if is_share else f"{figure.value:.2f}", "", ""]
        if figure.low is not None and figure.high is not None:
            cells[1] = " to ".join(f"{bound:.0%}" if is_share else f"{bound:.2f}" for bound in (figure.low, figure.high))
        if figure.base_rate is not None:
            cells[2] = f"{figure.base_rate:.0%}"
        rows.append(f"<tr><th>{html.escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr><th></th><td>this model</td><td>95%</td><td>base rate</td></tr>{''.join(rows)}</table>"


# --- sections --------------------------------------------------------------------------------------------------------


def curves_section(title: str, run: Path) -> str:
    """Return the curves of a run's log; nothing where it logged nothing."""
    try:
        return f"<h3>{html.escape(title)}</h3>{plot_tag(plot_curves(run))}"
    except BadInput:
        return ""


def codebook_plot(codes: torch.Tensor, codebook_size: int) -> str:
    """Return a plot of how often each code is used, most frequent first."""
    from matplotlib.figure import Figure as Plot

    counts = torch.bincount(codes.flatten(), minlength=codebook_size).sort(descending=True).values
    plot = Plot(figsize=(5.2, 2.4), layout="constrained")
    axes = plot.add_subplot()
    axes.plot((counts + 1).tolist(), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_title(f"{int((counts > 0).sum())} of {codebook_size} codes used", fontsize=10)
    axes.set_xlabel("codes by frequency", fontsize=8)
    axes.set_ylabel("uses + 1", fontsize=8)
    axes.tick_params(labelsize=8)
    return plot_tag(plot)


def model_section(
    model: Chameleon,
    title: str,
    note: str,
    concepts: int | None,
    metrics: dict[str, dict[str, Any]],
    extra: str = "",
    seed: int = 0,
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
