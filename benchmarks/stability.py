"""The paper's stability ablations as small proxies, on real multimodal tokens: which of their effects show at this size.

Each variant is trained at every learning rate of a sweep, by the recipe and the code that every run uses, spikes left in.
What counts is how much the final loss depends on the rate: learning-rate sensitivity in the sense of Wortsman et al. (2023,
arXiv 2309.14322), the mean over the rates of min(loss, loss at the start) minus the best loss. What a model without image
codes in its loss ends at cannot be compared with the others' loss, so the losses here are those of text ids alone.

Beside the sweep each variant is trained once with a rate that grows a thousandfold, without clipping, until it blows up:
at which rate it does, and how many steps before that the alarms are heard.

    chameleon tokenize "emoji:pairs?split=train&per_concept=4" --out SHARDS/pairs    # and so drawing and captioning
    chameleon tokenize "emoji:words?split=train" --out SHARDS/words
    python benchmarks/stability.py SHARDS --out runs/stability [--jobs 2]
    python benchmarks/stability.py SHARDS --out runs/stability --report benchmarks/stability
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0,)
STEPS = 200
EVERY = 4  # steps between two rows of the log
RAMP, RAMP_STEPS = "ramp", 300
LAST = 6
"""Rows of the log that a final loss is the mean of."""
SHAPE = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "ffn_width": 352, "context_length": 240}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the paper's 7b, no dropout": {},
    "without QK-norm": {"model.qk_norm": False},
    "without z-loss": {"z_loss": 0.0},
    "with dropout 0.1": {"model.dropout": 0.1},
    "without QK-norm, dropout 0.1": {"model.qk_norm": False, "model.dropout": 0.1},
    "Swin order": {"model.norm_order": "swin"},
    "Swin order without QK-norm": {"model.norm_order": "swin", "model.qk_norm": False},
    "no image codes in the loss": {"image_loss_weight": 0.0},
    "no image codes in the loss, without QK-norm": {"image_loss_weight": 0.0, "model.qk_norm": False},
}


def recipe(shards: Path, bundle: Path) -> dict[str, Any]:
    mixture = [("pairs", 0.4), ("drawing", 0.2), ("captioning", 0.3), ("words", 0.1)]
    return {
        "tokenizers": str(bundle),
        "size": "tiny",
        "model": SHAPE,
        "context_length": SHAPE["context_length"],
        "global_batch_size": 8,
        "run": {"max_steps": STEPS, "log_every_n_steps": EVERY, "progress": False, "save_every_n_minutes": 0, "devices": 1},
        "optimizer": {"warmup_steps": 30, "eps": 1.0e-8, "schedule": "cosine", "min_lr_ratio": 0.1},
        "mixture": [{"shards": str(shards / name), "weight": weight} for name, weight in mixture],
        "stability": {"max_grad_norm_ratio": 0.0, "max_consecutive_skips": 0},
        "num_samples": 0,
        "verify_shards": False,
    }


def folder(out: Path, variant: str, rate: float | str, seed: int) -> Path:
    return out / variant.replace(" ", "-").replace(",", "") / f"rate-{rate}-seed-{seed}"


def train(out: Path, config: Path, variant: str, rate: float | str, seed: int) -> None:
    """One run, in a process of its own with one thread; one that is there already is left."""
    place = folder(out, variant, rate, seed)
    if (place / "bundle").is_dir():
        return
    settings = {**VARIANTS[variant], "run.seed": seed, "run.out": str(place)}
    if rate == RAMP:
        growing = {
            "lr": 1e-3,
            "min_lr_ratio": 1000.0,
            "schedule": "exponential",
            "warmup_steps": 10,
            "eps": 1e-8,
            "max_grad_norm": 0.0,
        }
        settings |= {"optimizer": growing, "run.max_steps": RAMP_STEPS, "stability.window_steps": 20}
    else:
        settings["optimizer.lr"] = rate
    command = [sys.executable, "-m", "chameleon.cli", "pretrain", "--config", str(config)]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        raise SystemExit(f"{place}: {done.stderr[-2000:]}")
    print(place, file=sys.stderr, flush=True)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def series(place: Path, name: str) -> list[float]:
    """A figure of every step; NaN where there is none."""
    with open(place / "log" / "metrics.csv", encoding="utf-8") as file:
        return [float(row.get(name) or math.nan) for row in csv.DictReader(file) if row.get("train/loss")]


def figures(place: Path) -> dict[str, Any]:
    """What a run came to."""
    losses = [value if math.isfinite(value) else math.inf for value in series(place, "train/text_loss")]
    norms = [value for value in series(place, "train/output_norm") if math.isfinite(value)]
    logits = [
        max(values)
        for layer in range(SHAPE["layers"])
        if (values := [v for v in series(place, f"monitor/attention_logit_{layer}") if math.isfinite(v)])
    ]
    events = place / "events.jsonl"
    told = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()] if events.is_file() else []
    signs = [event for event in told if event["kind"] == "alarm"]
    smooth = [statistics.median(losses[max(0, row - 4) : row + 1]) for row in range(len(losses))]
    lowest, blown = math.inf, None
    for row, value in enumerate(smooth):  # blown up: a running median that has risen by a nat
        lowest = min(lowest, value)
        if value > lowest + 1.0:
            blown = EVERY * row
            break
    return {
        "start": losses[0],
        "final": statistics.fmean(losses[-LAST:]),
        "output_norm_growth": norms[-1] / norms[30 // EVERY],
        "max_attention_logit": max(logits, default=math.nan),
        "blown_at": blown,
        "alarm_at": min((event["step"] for event in signs), default=None),
        "output_norm_alarm_at": min((e["step"] for e in signs if e["text"].startswith("output norm")), default=None),
    }


def collect(out: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Variant → rate → figures of each seed; the ramp is a rate of its own."""
    return {
        variant: {str(rate): [figures(folder(out, variant, rate, seed)) for seed in SEEDS] for rate in (*RATES, RAMP)}
        for variant in VARIANTS
    }


def told(step: int | None) -> str:
    return "never" if step is None else str(step)


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def sensitivity(runs: dict[str, list[dict[str, Any]]]) -> tuple[float, float, float]:
    """(best loss, its rate, learning-rate sensitivity) of a variant, losses averaged over the seeds."""
    finals = {rate: statistics.fmean(min(run["final"], run["start"]) for run in seeds) for rate, seeds in runs.items()}
    best = min(finals, key=finals.__getitem__)
    return finals[best], float(best), statistics.fmean(value - finals[best] for value in finals.values())


def report(results: dict[str, Any], place: Path) -> str:
    """Draws the plots into `place`, and gives the tables."""
    from matplotlib import pyplot

    place.mkdir(parents=True, exist_ok=True)
    (place / "stability.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5.2))
    sweeps = {variant: {rate: runs[rate] for rate in map(str, RATES)} for variant, runs in results.items()}
    for place_of, (variant, runs) in enumerate(sweeps.items()):
        style = {
            "marker": "o",
            "markersize": 4,
            "linestyle": "--" if "without QK" in variant else "-",
            "color": f"C{place_of}",
        }
        rates = [float(rate) for rate in runs]
        finals = [statistics.fmean(min(run["final"], run["start"]) for run in seeds) for seeds in runs.values()]
        axes[0].plot(rates, finals, label=variant, **style)
        for axis, name in ((axes[1], "max_attention_logit"), (axes[2], "output_norm_growth")):
            axis.plot(rates, [mean(seeds, name) for seeds in runs.values()], **style)
    for axis, title in zip(
        axes, ("final loss of text ids", "largest attention logit", "output norm, last step ÷ step 30"), strict=True
    ):
        axis.set(xscale="log", xlabel="peak learning rate", title=title)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    figure.legend(loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(place / "stability.png", dpi=110)
    lines = ["| variant | " + " | ".join(f"{rate:g}" for rate in RATES) + " | best loss | at rate | sensitivity |"]
    lines.append("| --- " * (len(RATES) + 4) + "|")
    for variant, runs in sweeps.items():
        best, rate, spread = sensitivity(runs)
        cells = []
        for seeds in runs.values():
            rose = any(run["blown_at"] is not None for run in seeds)
            cells.append(f"{mean(seeds, 'final'):.2f}" + (" ↑" if rose else ""))
        lines.append(f"| {variant} | {' | '.join(cells)} | {best:.2f} | {rate:g} | {spread:.2f} |")
    lines += ["", "| variant, growing rate | loss blows up at step | at rate | alarm | ahead | of the output norm |"]
    lines.append("| --- " * 6 + "|")
    for variant, runs in results.items():
        (run,) = runs[RAMP]
        blown, alarm, norm = run["blown_at"], run["alarm_at"], run["output_norm_alarm_at"]
        rate = "" if blown is None else f"{1e-3 * 1000 ** ((blown - 10) / (RAMP_STEPS - 10)):.2g}"
        ahead = "" if None in (blown, alarm) else str(blown - alarm)
        lines.append(f"| {variant} | {told(blown)} | {rate} | {told(alarm)} | {ahead} | {told(norm)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument(
        "--bundle", type=Path, default=Path("chameleon/bundles/emoji"), help="whose tokenizers made the shards"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time")
    parser.add_argument("--report", type=Path, help="draw and print what is there instead of training")
    options = parser.parse_args()
    if options.report:
        print(report(collect(options.out), options.report))
        return
    import yaml

    options.out.mkdir(parents=True, exist_ok=True)
    config = options.out / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(options.shards, options.bundle)), encoding="utf-8")
    with ThreadPoolExecutor(options.jobs) as pool:  # the most telling variants first, every seed of them
        todo = [(variant, rate, seed) for seed in SEEDS for variant in VARIANTS for rate in (*RATES, RAMP)]
        for each in [pool.submit(train, options.out, config, *one) for one in todo]:
            each.result()


if __name__ == "__main__":
    main()
