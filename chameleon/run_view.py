"""What a run is doing, from its folder: its state in figures, and its curves as a picture."""

from __future__ import annotations

import csv
import fnmatch
import math
from pathlib import Path
from typing import Any

from chameleon.errors import BadInput
from chameleon.files import EVENTS, RECORD, read_events, read_json

PANELS = {
    "losses": ("train/loss", "train/*_loss", "validation/*_loss"),
    "losses by source": ("source/*",),
    "PSNR": ("*/psnr",),
    "codebook: usage": ("*/usage",),
    "codebook: perplexity": ("*/perplexity",),
    "adversarial": ("train/adversarial", "train/adaptive_weight", "train/discriminator"),
    "gradient norm": ("train/gradient_norm",),
    "norm of the last block's output": ("train/output_norm",),
    "log Z": ("train/*log_z",),
    "largest attention logit of each layer": ("monitor/attention_logit_*",),
    "change of the weights in a step": ("monitor/update_share",),
    "learning rate": ("rate",),
    "tokens/s": ("speed/tokens_per_second",),
}
LOGARITHMIC = ("gradient norm", "norm of the last block's output", "change of the weights in a step")


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's log, what is a number in them."""
    path = run / "log" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value and key != "epoch"} for row in csv.DictReader(file)
        ]


def describe(run: Path) -> dict[str, Any]:
    """The state of a run. Raises `BadInput` where the folder is none."""
    record, rows, events = read_json(run / RECORD), rows_of(run), read_events(run / EVENTS)
    steps = record["recipe"]["run"]["steps"]
    latest: dict[str, float] = {}
    for row in rows:
        latest |= {name: value for name, value in row.items() if math.isfinite(value)}
    done = int(latest["step"]) + 1 if "step" in latest else 0
    result = run / "bundle" if record["kind"] != "fit_image" else run / "image_tokenizer.json"
    finished = result.exists() and result.stat().st_mtime >= (run / RECORD).stat().st_mtime
    described: dict[str, Any] = {
        "run": str(run),
        "kind": record["kind"].replace("_", "-"),
        "state": "finished" if finished else "not finished",
        "step": f"{done} of {steps}",
        "processes": record["processes"],
    }
    for name, value in sorted(latest.items()):
        if name.startswith(("train/", "validation/", "source/", "speed/", "stability/")) or name == "rate":
            described[name] = round(value, 6)
    described["checkpoints"] = [path.name for path in sorted((run / "checkpoints").glob("step-*"))]
    described["events"] = [f"step {event['step']}: {event['kind']}: {event['text']}" for event in events]
    if finished:
        described["result"] = str(result)
    return described


def draw_curves(run: Path, file: Path) -> None:
    """Draws the curves of a run's log, a panel for each kind of figure, alarms as lines. Raises `BadInput` for no log."""
    from matplotlib.figure import Figure

    rows, events = rows_of(run), read_events(run / EVENTS)
    names = sorted({name for row in rows for name in row} - {"step"})
    panels = []
    for title, patterns in PANELS.items():
        chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if chosen:
            panels.append((title, chosen))
    if not panels:
        raise BadInput("nothing is logged yet", where=run, remedy="wait for the first run.log_every steps")
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * height), layout="constrained")
    for number, (title, chosen) in enumerate(panels, 1):
        axes = figure.add_subplot(height, columns, number)
        for name in chosen:
            points = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
            label = name.removeprefix("monitor/attention_logit_").removeprefix("train/")
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 20 else "")
        for event in events:
            axes.axvline(event["step"], color="crimson", linewidth=0.6, alpha=0.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if title in LOGARITHMIC:
            axes.set_yscale("log")
        if len(chosen) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2 if len(chosen) > 6 else 1)
    figure.savefig(file, dpi=110)
