"""Verbs that evaluate: evaluate."""

from __future__ import annotations

import argparse

from chameleon.cli.options import Verbs, add_model_options, load_model
from chameleon.cli.output import is_first_process, metrics_table, print_result
from chameleon.errors import BadInput


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("evaluate", evaluate, "Evaluate a model on the held-out styles of the embedded set.")
    parser.add_argument(
        "--parts",
        nargs="*",
        default=[],
        help="reconstruction, captions, questions, drawings, likelihood (these by default), recognition, languages, "
        "unseen, colours, variety, mixed; or all",
    )
    parser.add_argument("--concepts", type=int, help="a subset of this many concepts")
    parser.add_argument("--drawings", type=int, default=200, help="number of drawings (default: 200)")
    add_model_options(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    from chameleon.evaluation.emoji import PARTS, QUICK_PARTS
    from chameleon.evaluation.emoji import evaluate as evaluate_model
    from chameleon.progress import StatusLine

    unknown = set(arguments.parts) - {*PARTS, "all"}
    if unknown:
        raise BadInput(f"no part {sorted(unknown)[0]!r}", where="--parts", remedy=f"use {', '.join(PARTS)} or all")
    with StatusLine(enabled=is_first_process()) as status_line:
        metrics = evaluate_model(
            load_model(arguments),
            concepts=arguments.concepts,
            drawings=arguments.drawings,
            seed=arguments.seed,
            parts=tuple(PARTS) if arguments.parts == ["all"] else arguments.parts or QUICK_PARTS,
            progress=lambda part, num_done, total: status_line.update(f"{part}: {num_done} of {total}"),
        )
    print_result(arguments, metrics, metrics_table(metrics))
