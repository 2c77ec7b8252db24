"""Scaling study: the loss of the shipped model's kind as a function of parameters and tokens.

Four sizes are trained from scratch on three budgets of tokens each, with a learning rate that falls to nothing within the
budget, on the shipped tokenizers' codes of the embedded pictures. A law

    L(N, D) = E + A / N^α + B / D^β

is fitted to the held-out losses of image codes and of texts, by the Huber loss of log L (arXiv 2203.15556, appendix D.3). N
counts parameters without the input embedding, D the tokens of training. The law is checked twice: fitted without the
largest size it predicts that size's losses; fitted to all it predicts those of a bundle trained much longer.

    python benchmarks/scaling_law.py [--out runs/scaling] [--threads 2]          # about 2 hours on one core, AVX-512
    python benchmarks/scaling_law.py --fit [--bundle BUNDLE --tokens 180000000]  # fit, plot, and compare with a bundle

Runs that have a result in OUT are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from chameleon.bundle import Bundle
from chameleon.data.mixture import PackedBatch, PackedSource, SourceConfig
from chameleon.data.tokenize import tokenize
from chameleon.train.language_metrics import MODALITIES
from chameleon.train.objective import Objective
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train

SIZES = {"1.8M": (4, 128, 2, 320), "3.3M": (4, 192, 3, 512), "6.8M": (6, 256, 4, 704), "17M": (8, 384, 6, 1024)}
"""Name → layers, width, heads, width of the feed-forward layer."""
BUDGETS = (750_000, 1_500_000, 3_000_000)
"""Tokens of a run: all positions of its rows."""
SOURCES = {
    "drawing-plain": ("emoji:drawing?per_concept=18&seed=23&view=plain", 0.3),
    "drawing-near": ("emoji:drawing?per_concept=6&seed=24&view=near", 0.15),
    "styling": ("embedded:styling?per_concept=4&seed=20&view=plain", 0.1),
    "colouring": ("embedded:colouring?per_concept=10&seed=20&view=near", 0.1),
    "captioning": ("emoji:captioning?per_concept=8&seed=20&view=wide", 0.15),
    "answering": ("emoji:answering?per_concept=5&seed=20&view=augmented", 0.15),
    "words": ("emoji:words", 0.05),
}
"""Name of a set of token shards → what it is made of, and its weight."""
VALIDATION = [
    "emoji:drawing?per_concept=2&seed=3&view=plain&split=validation",
    "emoji:captioning?per_concept=2&seed=3&view=plain&split=validation",
]
CONTEXT_LENGTH = 512
ROWS = 8
HUBER = 1e-3
KINDS = ("image", "text")


def prepare(bundle: Bundle, out: Path) -> None:
    """Write the tokenizers and the token shards that are not there yet."""
    for part in (bundle.tokenizer.text, bundle.tokenizer.image):
        part.save(out / "tokenizers")
    for name, (source, _) in SOURCES.items():
        if not (out / "shards" / name).is_dir():
            tokenize([source], bundle.tokenizer, out / "shards" / name)
    if not (out / "shards" / "validation").is_dir():
        tokenize(VALIDATION, bundle.tokenizer, out / "shards" / "validation")


def run(size: str, tokens: int, out: Path) -> dict[str, Any]:
    """Train one model and return its size and its held-out losses."""
    layers, width, heads, ffn_width = SIZES[size]
    shards = out / "shards"
    mixture = ", ".join(
        f"{{shards: {shards / name}, weight: {weight}{'' if name == 'words' else ', loss: answers'}}}"
        for name, (_, weight) in SOURCES.items()
    )
    settings = [
        f"tokenizers={out / 'tokenizers'}",
        "size=tiny",
        f"model={{layers: {layers}, width: {width}, heads: {heads}, kv_heads: {heads}, ffn_width: {ffn_width},"
        f" context_length: {CONTEXT_LENGTH}}}",
        "codebook_rows=true",
        f"context_length={CONTEXT_LENGTH}",
        f"global_batch_size={ROWS}",
        f"mixture=[{mixture}]",
        f"validation=[{{shards: {shards / 'validation'}, loss: answers}}]",
        f"run.out={out / f'{size}-{tokens}'}",
        f"run.max_steps={tokens // (ROWS * CONTEXT_LENGTH)}",
        "run.progress=false",
        "run.accelerator=cpu",
        "run.devices=1",
        "optimizer={kind: muon, lr: 2.0e-3, eps: 1.0e-8, warmup_steps: 20, schedule: cosine, min_lr_ratio: 0.0}",
        "image_loss_weight=0.25",
        "num_samples=0",
        "monitors=false",
    ]
    start = time.monotonic()
    bundle, metrics = train(read_recipe(PretrainRecipe, None, settings))
    assert bundle is not None
    result: dict[str, Any] = {"size": size, "tokens": tokens, "parameters": counted_parameters(bundle)}
    result |= {kind: metrics[f"validation/{kind}_loss"] for kind in KINDS}
    return result | {"seconds": time.monotonic() - start}


def counted_parameters(bundle: Bundle) -> int:
    """Return the number of parameters without the input embedding."""
    return sum(parameter.numel() for name, parameter in bundle.model.named_parameters() if name != "embed.weight")


@torch.no_grad()
def held_out_losses(bundle: Bundle, shards: Path) -> dict[str, float]:
    """Return the held-out losses of a bundle, as validation computes them."""
    vocabulary = bundle.vocabulary
    source = PackedSource(SourceConfig(str(shards), loss="answers"), CONTEXT_LENGTH, vocabulary, None)
    objective = Objective(bundle.model, z_loss=0.0)
    totals = dict.fromkeys(MODALITIES, (0.0, 0))
    for first in range(0, len(source), ROWS):
        rows = [source.row(row, 0, 0) for row in range(first, min(first + ROWS, len(source)))]
        batch = PackedBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))
        nll = objective(batch, batch.loss_weights).nll
        modality = vocabulary.modality(batch.targets).flatten()
        for kind, (total, count) in totals.items():
            counted = nll[(batch.loss_weights.flatten() > 0) & (modality == kind)]
            totals[kind] = total + float(counted.double().sum()), count + len(counted)
    return {kind.name.lower(): total / count for kind, (total, count) in totals.items()}


def predicted(law: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return L(N, D) of a law (log E, log A, α, log B, β)."""
    e, a, alpha, b, beta = law
    return np.exp(e) + np.exp(a - alpha * np.log(parameters)) + np.exp(b - beta * np.log(tokens))


def fit(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the law with the least Huber loss of log L, from a grid of starting points."""

    def objective(law: np.ndarray) -> float:
        residual = np.abs(np.log(predicted(law, parameters, tokens)) - np.log(losses))
        return float(np.where(residual < HUBER, residual**2 / 2, HUBER * (residual - HUBER / 2)).sum() / HUBER**2)

    starts = itertools.product((-1.0, 0.5, 1.5), (0.0, 5.0), (0.2, 0.6), (0.0, 5.0), (0.2, 0.6))
    bounds = [(-5.0, 2.0), (-5.0, 25.0), (0.02, 2.0), (-5.0, 25.0), (0.02, 2.0)]
    fits = [minimize(objective, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    return np.asarray(min(fits, key=lambda result: float(result.fun)).x)


def law_text(law: np.ndarray) -> str:
    e, a, alpha, b, beta = law
    return f"{np.exp(e):.3f} + {np.exp(a):.4g} / N^{alpha:.3f} + {np.exp(b):.4g} / D^{beta:.3f}"


def report(results: list[dict[str, Any]], out: Path, bundle: Bundle | None, bundle_tokens: float) -> None:
    """Print the laws and what they predict, and draw OUT/scaling_law.png."""
    from matplotlib import pyplot

    parameters, tokens = (np.array([result[key] for result in results], float) for key in ("parameters", "tokens"))
    is_largest = parameters == parameters.max()
    longer = held_out_losses(bundle, out / "shards" / "validation") if bundle is not None else {}
    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(11, 4.2), layout="constrained")
    for kind, axis in zip(KINDS, axes, strict=True):
        losses = np.array([result[kind] for result in results])
        law = fit(parameters, tokens, losses)
        smaller = fit(parameters[~is_largest], tokens[~is_largest], losses[~is_largest])
        print(f"{kind}: L(N, D) = {law_text(law)}")
        error = np.sqrt(np.mean(np.log(predicted(law, parameters, tokens) / losses) ** 2))
        print(f"  root mean square error of log L: {error:.4f}")
        print(f"  fitted without the largest size: {law_text(smaller)}")
        for budget, loss, guess in zip(
            tokens[is_largest],
            losses[is_largest],
            predicted(smaller, parameters[is_largest], tokens[is_largest]),
            strict=True,
        ):
            print(f"  the largest size at {budget:,.0f} tokens: predicted {guess:.3f}, measured {loss:.3f}")
        for size in SIZES:
            is_of_size = np.array([result["size"] == size for result in results])
            points = axis.plot(6 * parameters[is_of_size] * tokens[is_of_size], losses[is_of_size], "o", label=size)
            budgets = np.geomspace(tokens.min() / 1.2, max(tokens.max() * 1.2, bundle_tokens), 100)
            size_parameters = parameters[is_of_size][0]
            axis.plot(
                6 * size_parameters * budgets, predicted(law, size_parameters, budgets), color=points[0].get_color(), lw=1
            )
        if bundle is not None:
            count = counted_parameters(bundle)
            guess = float(predicted(law, np.array(count), np.array(bundle_tokens)))
            print(
                f"  {count:,} parameters at {bundle_tokens:,.0f} tokens: predicted {guess:.3f}, measured {longer[kind]:.3f}"
            )
            _, a, alpha, b, beta = law  # the size with the least loss for as many operations: dL/dN = 0 on N · D = const
            ratio = np.exp((np.log(alpha) + a - np.log(beta) - b) / (alpha + beta))
            best = ratio * (count * bundle_tokens) ** (beta / (alpha + beta))
            print(f"  best size for as many operations: {best:,.0f}, with {count * bundle_tokens / best:,.0f} tokens")
            axis.plot(6 * count * bundle_tokens, longer[kind], "k*", ms=12, label="shipped")
        axis.set(xscale="log", xlabel="operations of training, 6 N D", ylabel=f"held-out loss of {kind}, nats a token")
        axis.legend(title="parameters")
    figure.savefig(out / "scaling_law.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="fit the results there are")
    parser.add_argument("--bundle", type=Path, help="a model trained longer to compare with")
    parser.add_argument("--tokens", type=float, default=0.0, help="tokens that it was trained on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fit:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("*.json"))]
        bundle = Bundle.load(options.bundle, dtype=torch.float32) if options.bundle else None
        report(results, options.out, bundle, options.tokens)
        return
    prepare(Bundle.load(), options.out)
    for tokens, size in itertools.product(BUDGETS, SIZES):
        path = options.out / f"{size}-{tokens}.json"
        if not path.is_file():
            result = run(size, tokens, options.out)
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
