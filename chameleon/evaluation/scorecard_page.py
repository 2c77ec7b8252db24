"""A scorecard as one self-contained HTML page: all figures, and for each part its best and worst samples."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chameleon.errors import BadInput
from chameleon.evaluation.scorecard import Scorecard
from chameleon.files import atomic_file
from chameleon.html_page import figure, grid, page, picture_tag
from chameleon.tokenizers.image import load_picture

FILE = "index.html"
NUM_SAMPLES = 12
"""Best, and as many worst samples."""
MAX_TEXT = 300
THUMBNAIL = 256
"""Pictures are shown at most this large."""


def write_page(card: Scorecard, folder: Path) -> None:
    """Write the page of a scorecard beside it."""
    content = card.content
    sections = [figures_section(card)]
    for suite, part, of_part in card.parts():
        sections.append(samples_section(f"{suite} / {part}", of_part, folder))
    note = f"{content['command']} · {content['date']} · " + ", ".join(f"{k} {v}" for k, v in content["model"].items())
    with atomic_file(folder / FILE) as partial:
        partial.write_text(page(sections, "Scorecard", note), encoding="utf-8", errors="backslashreplace")


def figures_section(card: Scorecard) -> str:
    """Return the table of all figures."""
    rows = []
    for name, value in card.figures().items():
        interval = "" if value.low is None or value.high is None else f"{value.low:.4g} to {value.high:.4g}"
        base_rate = "" if value.base_rate is None else f"{value.base_rate:.4g}"
        cells = (f"{value.value:.4g}", interval, base_rate, str(value.count or ""))
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th></th><td>value</td><td>95% interval</td><td>base rate</td><td>samples</td></tr>"
    return f'<section class="model"><h2>Figures</h2><table>{head}{"".join(rows)}</table></section>'


def samples_section(title: str, part: dict[str, Any], folder: Path) -> str:
    """Return the best and worst samples of a part by the first of its metrics that is a mean over samples."""
    samples = [sample for sample in part["samples"] if sample["scores"]]
    metric = next(
        (
            name
            for name, of in part["metrics"].items()
            if of["statistic"] == "mean" and len({str(sample["scores"].get(name)) for sample in samples}) > 1
        ),
        None,
    )
    if metric is None:
        shown = {"Samples": part["samples"][:NUM_SAMPLES]}
    else:
        sign = -1 if part["metrics"][metric]["higher_is_better"] else 1
        scored = sorted(
            (sample for sample in samples if metric in sample["scores"]),
            key=lambda sample: sign * mean_of(sample["scores"][metric]),
        )
        count = min(NUM_SAMPLES, len(scored) // 2)
        shown = {f"Best by {metric}": scored[:count], f"Worst by {metric}": scored[::-1][:count]}
    blocks = [
        f"<h3>{html.escape(heading)}</h3>" + grid(sample_figure(sample, metric, folder) for sample in of_heading)
        for heading, of_heading in shown.items()
    ]
    return f'<section class="model"><h2>{html.escape(title)}</h2>{"".join(blocks)}</section>'


def mean_of(terms: Any) -> float:
    """Return a sample's value of a mean: the value itself, or the first of its two terms by the second."""
    if isinstance(terms, (list, tuple)):
        return float(terms[0]) / float(terms[1]) if terms[1] else 0.0
    return float(terms)


def sample_figure(sample: dict[str, Any], metric: str | None, folder: Path) -> str:
    """Return one sample: what was shown and asked, the answer, what was expected, and the score."""
    lines = [f'<span class="reference">{line}</span>' for line in texts_in(sample["prompt"])]
    lines += [f'<span class="answer">{line}</span>' for line in texts_in(sample["output"])]
    expected = texts_in(sample["expected"])
    if expected:
        lines.append(f'<span class="reference">expected: {" | ".join(expected)}</span>')
    if metric is not None:
        lines.append(f"{html.escape(metric)} {mean_of(sample['scores'][metric]):.3g}")
    pictures = [*pictures_in(sample["prompt"], folder), *pictures_in(sample["output"], folder)]
    return figure(pictures, lines or [html.escape(sample["key"])])


def leaves(value: Any) -> Iterator[Any]:
    """Yield the texts and the paths of pictures in a prompt or output of a scorecard."""
    if isinstance(value, list):
        for element in value:
            yield from leaves(element)
    elif isinstance(value, dict):
        if "image" in value or "file" in value:
            yield Path(value.get("image") or value["file"])
        else:
            yield from leaves(value["parts"] if "parts" in value else [v for k, v in value.items() if k != "type"])
    elif isinstance(value, str) and value:
        yield value


def texts_in(value: Any) -> list[str]:
    return [html.escape(leaf[:MAX_TEXT]) for leaf in leaves(value) if isinstance(leaf, str)]


def pictures_in(value: Any, folder: Path) -> list[str]:
    """Return <img> elements; a picture that is no longer there is left out."""
    tags = []
    for leaf in leaves(value):
        if isinstance(leaf, Path):
            try:
                picture = load_picture(folder / leaf)
            except BadInput:
                continue
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            tags.append(picture_tag(picture))
    return tags
