"""Views of a training run from its folder: its state as values, and the curves of its log as a figure."""

from __future__ import annotations

import csv
import fnmatch
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon.errors import BadInput
from chameleon.files import EVENTS_FILE, RUN_FILE, read_events, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "losses": ("train/loss", "train/*_loss", "validation/*_loss"),
    "losses by source": ("source/*",),
    "PSNR": ("*/psnr",),
    "codebook usage": ("*/codebook_usage",),
    "codebook perplexity": ("*/codebook_perplexity",),
    "adversarial": ("train/adversarial", "train/adaptive_weight", "train/discriminator"),
    "gradient norm": ("train/grad_norm",),
    "output norm of the last block": ("train/output_norm",),
    "log Z": ("train/*log_z",),
    "largest attention logit of each layer": ("monitor/attention_logit_*",),
    "update ratio": ("monitor/update_ratio",),
    "learning rate": ("lr",),
    "tokens/s": ("speed/tokens_per_second",),
}
"""Title of a panel → patterns of its metrics."""
LOG_SCALE = ("gradient norm", "output norm of the last block", "update ratio")


def read_log(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run's log, as numbers."""
    path = run / "log" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def describe(run: Path) -> dict[str, Any]:
    """Return the state of a run. Raise `BadInput` where the folder is not that of a run."""
    record, rows, events = read_json(run / RUN_FILE), read_log(run), read_events(run / EVENTS_FILE)
    latest: dict[str, float] = {}
    for row in rows:
        latest |= {name: value for name, value in row.items() if math.isfinite(value)}
    completed_steps = int(latest.get("step", 0))
    result = run / "bundle" if record["kind"] != "fit_image" else run / "image_tokenizer.json"
    is_finished = result.exists() and result.stat().st_mtime >= (run / RUN_FILE).stat().st_mtime
    description: dict[str, Any] = {
        "run": str(run),
        "kind": record["kind"].replace("_", "-"),
        "state": "finished" if is_finished else "not finished",
        "step": f"{completed_steps} of {record['recipe']['run']['max_steps']}",
        "processes": record["processes"],
    }
    for name, value in sorted(latest.items()):
        if name.startswith(("train/", "validation/", "source/", "speed/", "stability/")) or name == "lr":
            description[name] = round(value, 6)
    description["checkpoints"] = [path.name for path in sorted((run / "checkpoints").glob("step-*"))]
    description["events"] = [f"step {event['step']}: {event['kind']}: {event['text']}" for event in events]
    if is_finished:
        description["result"] = str(result)
    return description


def plot_curves(run: Path) -> Figure:
    """Return a figure of a run's log, a panel for each kind of metric, with events as vertical lines.

    Raises `BadInput` where nothing is logged yet.
    """
    from matplotlib.figure import Figure

    rows, events = read_log(run), read_events(run / EVENTS_FILE)
    names = sorted({name for row in rows for name in row} - {"step"})
    panels = []
    for title, patterns in PANELS.items():
        metrics = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if metrics:
            panels.append((title, metrics))
    if not panels:
        raise BadInput("nothing is logged yet", where=run, remedy="wait for the first run.log_every_n_steps steps")
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(5.2 * num_columns, 3.4 * num_rows), layout="constrained")
    for index, (title, metrics) in enumerate(panels, 1):
        axes = figure.add_subplot(num_rows, num_columns, index)
        for name in metrics:
            points = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
            label = name.removeprefix("monitor/attention_logit_").removeprefix("train/")
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 20 else "")
        for event in events:
            axes.axvline(event["step"], color="crimson", linewidth=0.6, alpha=0.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if title in LOG_SCALE:
            axes.set_yscale("log")
        if len(metrics) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2 if len(metrics) > 6 else 1)
    return figure
