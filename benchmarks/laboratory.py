"""The laboratory of image tokenizers: what a codebook costs in quality of pictures, and how well a small Transformer draws
with its codes.

Each variant is fitted on the embedded emoji by the same recipe for the same number of steps. Held-out pictures then give
PSNR, ST-LPIPS, the perplexity of the codes, and how often the right emoji is among the 10 nearest of the reconstruction
(EffNet-Lite0). A Transformer of one size is trained on as many tokens for each, and draws 400 names.

    python benchmarks/laboratory.py [VARIANT …] [--steps 1500] [--tokens 6000000] [--out runs/laboratory] [--device cpu]
        [--judge | --table]

Results are written to OUT/VARIANT.json, pictures to OUT/VARIANT.png; variants that have a result are not run again, but
with `--judge` their Transformers draw again.
`--table` prints the results and writes the reconstructions side by side to OUT/compared.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw

from chameleon.data import emoji, labelled
from chameleon.data.sources import texts_of
from chameleon.data.tokenize import tokenize
from chameleon.device import fast_bfloat16
from chameleon.evaluation.drawings import DrawingJudge, DrawingSettings
from chameleon.evaluation.pictures import reconstruction
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.sampling import Sampling
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.train.image_tokenizer import fit_image
from chameleon.train.recipe import FitImageRecipe, PretrainRecipe, read_recipe
from chameleon.train.run import train

PERCEPTUAL = "loss.perceptual=0.1"
LARGE = ["model.codebook_size=4096"]
VARIANTS: dict[str, list[str]] = {
    "average-1024": [PERCEPTUAL],
    "average-1024-no-perceptual": [],
    "average-1024-sharp": ["loss.perceptual=0.3"],
    "average-256": [PERCEPTUAL, "model.codebook_size=256"],
    "average-4096": [PERCEPTUAL, *LARGE],
    "plain-1024": [PERCEPTUAL, "codebook=plain"],
    "linear-1024": [PERCEPTUAL, "codebook=linear"],
    "index-backprop-1024": [PERCEPTUAL, "codebook=index_backprop"],
    "index-backprop-4096": [PERCEPTUAL, *LARGE, "codebook=index_backprop"],
    "additive-1024": [PERCEPTUAL, "codebook=additive"],
    "additive-4096": [PERCEPTUAL, *LARGE, "codebook=additive"],
    "levels-1000": [
        PERCEPTUAL,
        "codebook=levels",
        "model.codebook_size=1000",
        "model.levels=[8,5,5,5]",
        "model.codebook_width=4",
    ],
    "levels-4096": [PERCEPTUAL, *LARGE, "codebook=levels", "model.levels=[8,8,8,8]", "model.codebook_width=4"],
    "binary-1024": [
        PERCEPTUAL,
        "codebook=levels",
        "model.levels=[2,2,2,2,2,2,2,2,2,2]",
        "model.codebook_width=10",
    ],
    "binary-4096": [
        PERCEPTUAL,
        *LARGE,
        "codebook=levels",
        "model.levels=[2,2,2,2,2,2,2,2,2,2,2,2]",
        "model.codebook_width=12",
    ],
    "average-4096-6x6": [PERCEPTUAL, *LARGE, "model.resolution=48"],
    "average-1024-10x10": [PERCEPTUAL, "model.resolution=80"],
}
TEXT_PIECES = 900
CONTEXT_LENGTH = 256
ROWS = 32
DRAWINGS = 400
GUIDANCE_SCALES = (1.0, 2.0)
SAMPLING = Sampling(0.7, 0.9)
SHOWN = 16
"""Pictures of each row of a result's sheet."""


def fit_variant(name: str, steps: int, out: Path, device: str) -> tuple[ImageTokenizer, float]:
    """Fit the image tokenizer of a variant; return it and the seconds that took."""
    settings = [
        *VARIANTS[name],
        f"run.max_steps={steps}",
        f"run.out={out}",
        "run.progress=false",
        "run.validate_every_n_steps=0",
        f"run.accelerator={device}",
        "run.devices=1",
        f"num_workers={2 if device == 'cuda' else 0}",
    ]
    start = time.monotonic()
    tokenizer, _ = fit_image(read_recipe(FitImageRecipe, "laboratory-image", settings))
    return ImageTokenizer(tokenizer.network.to(device)), time.monotonic() - start


def train_variant(tokenizer: MixedTokenizer, tokens: int, out: Path, device: str) -> tuple[dict[str, Any], float]:
    """Train the Transformer of a variant on drawings; return the metrics of validation and the seconds that took."""
    for split, per_concept in (("train", 12), ("validation", 2)):
        source = f"emoji:drawing?per_concept={per_concept}&seed=3&view=near&split={split}"
        tokenize([source], tokenizer, out / split)
    tokenizer.text.save(out / "tokenizers")
    tokenizer.image.save(out / "tokenizers")
    settings = [
        f"tokenizers={out}/tokenizers",
        "size=tiny",
        f"context_length={CONTEXT_LENGTH}",
        f"global_batch_size={ROWS}",
        f"mixture=[{{shards: {out}/train, loss: answers}}]",
        f"validation=[{{shards: {out}/validation, loss: answers}}]",
        f"run.out={out}/model",
        f"run.max_steps={tokens // (ROWS * CONTEXT_LENGTH)}",
        "run.progress=false",
        f"run.accelerator={device}",
        "run.devices=1",
        "codebook_rows=true",
        "optimizer.kind=muon",
        "optimizer.lr=2.0e-3",
        "optimizer.eps=1.0e-8",
        "optimizer.warmup_steps=50",
        "optimizer.min_lr_ratio=0.05",
        "num_samples=0",
        "attention=dense",
    ]
    start = time.monotonic()
    _, metrics = train(read_recipe(PretrainRecipe, None, settings))
    return metrics, time.monotonic() - start


def run(name: str, steps: int, tokens: int, out: Path, device: str, judge: DrawingJudge) -> dict[str, Any]:
    """Run one variant and write its result."""
    folder = out / name
    image, fit_seconds = fit_variant(name, steps, folder / "image", device)
    held_out = emoji.load("validation")
    pictures = [entry.picture for entry in labelled.representatives(held_out)]
    names = [entry.caption for entry in labelled.representatives(held_out)]
    reconstructed = image.decode(image.encode(pictures))
    result: dict[str, Any] = {"variant": name, "settings": VARIANTS[name], "steps": steps, "tokens": tokens}
    result |= {"parameters": sum(p.numel() for p in image.network.parameters()), "fit_seconds": fit_seconds}
    result |= {"reconstruction": reconstruction(image, pictures), "recognised": judge.judge(reconstructed, names)}
    text = SentencePieceTokenizer.fit(texts_of(["emoji:captioning?per_concept=1"]), TEXT_PIECES)
    metrics, train_seconds = train_variant(MixedTokenizer(text, image), tokens, folder, device)
    codes = image.config.grid[0] * image.config.grid[1]
    result |= {"train_seconds": train_seconds, "nats_per_picture": metrics["validation/image_loss"] * codes}
    result |= {"grid": image.config.grid, "codebook_size": image.config.codebook_size}
    model = transformer(folder, device)
    result["drawings"] = judge_drawings(model, judge)
    drawn = model.draw_batch(judge.choose_names(SHOWN, 1), seeds=range(SHOWN), guidance_scale=2.0, sampling=SAMPLING)
    sheet(pictures[:SHOWN], reconstructed[:SHOWN], drawn).save(out / f"{name}.png")
    write_result(result, out)
    return result


def transformer(folder: Path, device: str) -> Chameleon:
    """Return the model that was trained with a variant's codes."""
    dtype = "bfloat16" if fast_bfloat16(device) else "float32"
    return Chameleon.load(folder / "model" / "bundle", device=device, dtype=dtype, weight_format="plain")


def judge_drawings(model: Chameleon, judge: DrawingJudge) -> dict[str, dict[str, float]]:
    """Draw names of training concepts and return for each guidance scale how far the drawings are right.

    Hardly trained models draw blots, which are rarely among the 10 nearest. The place of the right name among all names,
    by the nearest picture of each, tells blots apart. The table has its geometric mean.
    """
    names = judge.choose_names(DRAWINGS, 1)
    figures = {}
    for guidance in GUIDANCE_SCALES:
        drawn = DrawingSettings(1, guidance, SAMPLING).draw(model, names)
        places = places_of(drawn, names, judge)
        figures[f"{guidance:g}"] = {
            "right_among_10": float((places <= 10).mean()),
            "mean_log2_place": float(np.log2(places).mean()),
            "error_of_log2": float(np.log2(places).std() / len(places) ** 0.5),
        }
    return figures


def places_of(pictures: list[PILImage.Image], names: list[str], judge: DrawingJudge) -> np.ndarray:
    """Return for each picture the place of its name among all names, 1 if it is the nearest: int64 [N]."""
    number_of = {name: number for number, name in enumerate(sorted(set(judge.gallery_names)))}
    cosines = judge.features(pictures) @ judge.gallery_features.t()
    columns = torch.tensor([number_of[name] for name in judge.gallery_names], device=cosines.device)
    nearest = torch.full((len(pictures), len(number_of)), -1.0, device=cosines.device)
    nearest.scatter_reduce_(1, columns.expand(len(pictures), -1), cosines, "amax")
    expected = torch.tensor([number_of[name] for name in names], device=cosines.device)
    return (1 + (nearest > nearest.gather(1, expected[:, None])).sum(1)).cpu().numpy()


def write_result(result: dict[str, Any], out: Path) -> None:
    (out / f"{result['variant']}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_results(names: list[str], out: Path) -> list[dict[str, Any]]:
    """Return the results that there are."""
    paths = [out / f"{name}.json" for name in names]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def sheet(*rows: list[PILImage.Image]) -> PILImage.Image:
    """Return pictures in rows, each 64 pixels high."""
    arrays = [np.concatenate([np.asarray(picture.resize((64, 64))) for picture in row], axis=1) for row in rows]
    return PILImage.fromarray(np.concatenate(arrays))


def compare(names: list[str], out: Path) -> PILImage.Image:
    """Return the held-out pictures, and below them what each variant made of them, from its sheet in `out`."""
    sheets = {name: PILImage.open(out / f"{name}.png").convert("RGB") for name in names}
    rows = [("held out", next(iter(sheets.values())).crop((0, 0, 64 * SHOWN, 64)))]
    rows += [(name, sheet.crop((0, 64, 64 * SHOWN, 128))) for name, sheet in sheets.items()]
    picture = PILImage.new("RGB", (180 + 64 * SHOWN, 64 * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, row) in enumerate(rows):
        draw.text((4, 64 * index + 24), name, fill="black", font_size=15)
        picture.paste(row, (180, 64 * index))
    return picture


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| codebook | codes | dB | ST-LPIPS | perplexity | recognised | nats a picture | drawn: among 10 | place |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        quality, drawn = result["reconstruction"], result["drawings"]["2"]
        cells = [
            result["variant"],
            f"{result['grid'][0]}×{result['grid'][1]} of {result['codebook_size']}",
            f"{quality['psnr_db']:.2f}",
            f"{quality['st_lpips']:.3f}",
            f"{quality['codebook_perplexity']:.0f}",
            f"{result['recognised']['right_among_10']:.1%}",
            f"{result['nats_per_picture']:.0f}",
            f"{drawn['right_among_10']:.1%}",
            f"{2 ** drawn['mean_log2_place']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; all by default")
    parser.add_argument("--steps", type=int, default=1500, help="steps of each image tokenizer")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="tokens that each Transformer is trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/laboratory"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--judge", action="store_true", help="judge the drawings of the variants that have results again")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.variants or list(VARIANTS)
    if options.table:
        results = read_results(names, options.out)
        print(table(results))
        compare([result["variant"] for result in results], options.out).save(options.out / "compared.png")
        return
    torch.set_float32_matmul_precision("high")
    judge = DrawingJudge(emoji.load("train"), emoji.load("validation"), options.device)
    if options.judge:
        for result in read_results(names, options.out):
            result["drawings"] = judge_drawings(transformer(options.out / result["variant"], options.device), judge)
            write_result(result, options.out)
        return
    for name in names:
        if not (options.out / f"{name}.json").is_file():
            result = run(name, options.steps, options.tokens, options.out, options.device, judge)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
