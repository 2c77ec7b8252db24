"""Verbs that train: demo, fit-text, fit-image, pretrain, finetune."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon.cli.options import Verbs, add_recipe_options, apply_recipe_options
from chameleon.cli.output import is_first_process, metrics_table, print_progress, print_result
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.data.tokenize import Report


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("demo", demo, "Run the complete pipeline on the embedded set, and write a gallery page.")
    parser.add_argument("--recipe", default="demo", help="demo (minutes) or emoji (the shipped model, hours)")
    parser.add_argument("--out", default="runs/demo", help="folder of the run (default: runs/demo)")

    parser = verbs.add("fit-text", fit_text, "Train the text tokenizer.")
    parser.add_argument("source", nargs="+", help="sources of text")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vocab-size", type=int, help="token ids in all: image codes, special tokens and text pieces")
    size.add_argument("--num-pieces", type=int, help="text pieces, the 256 bytes included")
    parser.add_argument("--image-codes", type=int, help="image codes that --vocab-size includes (default: 8192)")
    parser.add_argument("--out", required=True, help="folder for text_tokenizer.model")
    parser.add_argument("--sample-mb", type=int, default=64, help="text to train on, in MiB at most (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")

    parser = verbs.add("fit-image", fit_image, "Train the image tokenizer.")
    add_recipe_options(parser)
    parser.add_argument("--allow-paths", action="store_true", help="let records name images outside their folder")

    for name, description in (("pretrain", "Pretrain a model on documents."), ("finetune", "Fine-tune on conversations.")):
        add_recipe_options(verbs.add(name, pretrain_or_finetune, description))


def demo(arguments: argparse.Namespace) -> None:
    from chameleon.demo import run_pipeline

    page = run_pipeline(arguments.recipe, Path(arguments.out), say=print_progress)
    bundle = page.parent / "finetune" / "bundle"
    text = f"{page}\nTo talk to it: .venv/bin/chameleon serve --model {bundle}    (without --model: the shipped one)"
    print_result(arguments, {"page": str(page), "bundle": str(bundle)}, text)


def fit_text(arguments: argparse.Namespace) -> None:
    from chameleon.data.sources import texts_of
    from chameleon.data.tokenize import Report
    from chameleon.errors import check_seed
    from chameleon.tokenizers.text import SentencePieceTokenizer
    from chameleon.vocabulary import SPECIALS

    num_pieces = arguments.num_pieces
    if arguments.vocab_size is None and arguments.image_codes is not None:
        raise BadInput("only with --vocab-size", where="--image-codes")
    if arguments.vocab_size is not None:
        image_codes = 8192 if arguments.image_codes is None else arguments.image_codes
        num_pieces = arguments.vocab_size - image_codes - len(SPECIALS)
        if num_pieces < 1:
            raise BadInput(
                f"{image_codes} image codes and {len(SPECIALS)} special tokens leave no room for text",
                where=f"--vocab-size {arguments.vocab_size}",
                remedy="ask for more",
            )
    report = Report()
    tokenizer = SentencePieceTokenizer.fit(
        texts_of(arguments.source, report.skip),
        num_pieces,
        sample_bytes=arguments.sample_mb << 20,
        seed=check_seed(arguments.seed),
    )
    out = Path(arguments.out)
    tokenizer.save(out)
    print_skipped(report)
    path = out / tokenizer.FILE
    print_result(arguments, {"out": str(path), "pieces": len(tokenizer)}, f"{path}: {len(tokenizer)} pieces")


def fit_image(arguments: argparse.Namespace) -> None:
    from chameleon.data.tokenize import Report
    from chameleon.train.image_tokenizer import fit_image
    from chameleon.train.recipe import FitImageRecipe, read_recipe

    recipe = read_recipe(FitImageRecipe, arguments.config, arguments.override)
    apply_recipe_options(arguments, recipe.run)
    recipe.allow_paths |= arguments.allow_paths
    report = Report()
    _, metrics = fit_image(recipe, report.skip)
    print_skipped(report)
    print_run_result(arguments, recipe.run.out, metrics)


def pretrain_or_finetune(arguments: argparse.Namespace) -> None:
    from chameleon.train.recipe import FinetuneRecipe, PretrainRecipe, TrainRecipe, read_recipe
    from chameleon.train.run import train

    kind: type[TrainRecipe] = PretrainRecipe if arguments.verb == "pretrain" else FinetuneRecipe
    recipe = read_recipe(kind, arguments.config, arguments.override)
    apply_recipe_options(arguments, recipe.run)
    _, metrics = train(recipe)
    print_run_result(arguments, f"{recipe.run.out}/bundle", metrics)


def print_run_result(arguments: argparse.Namespace, out: str, metrics: dict[str, Any]) -> None:
    """Print the result of a training run, which all of its processes have, once."""
    if is_first_process():
        print_result(arguments, {"out": out, **metrics}, f"{out}\n{metrics_table(metrics)}")


def print_skipped(report: Report) -> None:
    """Name the first samples that were skipped, and say how many there were."""
    for line in report.examples:
        print_progress(f"skipped: {line}")
    if report.skipped:
        print_progress(f"skipped {sum(report.skipped.values())} in all")
