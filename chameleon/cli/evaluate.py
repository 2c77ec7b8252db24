"""Verbs that evaluate: evaluate, compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon.cli.options import Parser, Verbs, add_model_options, load_model
from chameleon.cli.output import is_first_process, print_progress, print_result
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.evaluation.part import EvaluatedModel
    from chameleon.evaluation.scorecard import Scorecard
    from chameleon.evaluation.suite import NamedSuite

EXIT_DIFFERENT = 1
DEFAULT_OUT = "runs/evaluation"
MODEL_OPTIONS = ("device", "dtype", "weight_format", "exact", "draft_length")
"""Options of the model that a scorecard keeps for `--again`."""


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("evaluate", evaluate, "Evaluate a model with suites, and write a scorecard.")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE | key=value",
        help="suites of this package, YAML files, and their settings (default: emoji; --list names them)",
    )
    parser.add_argument("--list", action="store_true", help="list the suites of this package with their settings")
    parser.add_argument("--out", help=f"folder of the scorecard (default: {DEFAULT_OUT}/…); an interrupted one goes on")
    parser.add_argument("--server", metavar="URL", help="evaluate the model behind `chameleon serve` at this address")
    parser.add_argument("--again", metavar="SCORECARD", help="repeat an evaluation, and say which figures differ and why")
    add_model_options(parser)
    parser = verbs.add("compare", compare, "Compare the figures of two scorecards by paired tests.")
    parser.add_argument("first", metavar="A", help="scorecard.json, or its folder")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the tests (default: 0)")


def evaluate(arguments: argparse.Namespace) -> None:
    from chameleon.evaluation.run import evaluate_suites
    from chameleon.evaluation.scorecard import FILE, Scorecard
    from chameleon.evaluation.suite import read_suites
    from chameleon.progress import StatusLine

    if arguments.list:
        print_suites(arguments)
        return
    earlier = Scorecard.read(arguments.again) if arguments.again else None
    if earlier is not None and arguments.suites:
        raise BadInput("--again repeats the suites of a scorecard", where="command line", remedy="leave the suites out")
    suites = suites_of(earlier) if earlier is not None else read_suites(arguments.suites or ["emoji"], arguments.seed)
    if earlier is not None:
        take_model_options(arguments, earlier)
    out = Path(arguments.out or f"{DEFAULT_OUT}/{'-'.join(suite.name for suite in suites)}{'-again' if earlier else ''}")
    if earlier is not None and (out / FILE).exists():
        raise BadInput("holds an evaluation already", where=out, remedy="give another --out, so that it is really repeated")
    if arguments.server and any(getattr(suite.settings, "views", 1) != 1 for suite in suites):
        raise BadInput("a server reads each picture once", where="views", remedy="leave out --server, or the views")
    model, source = open_model(arguments)
    with StatusLine(enabled=is_first_process()) as status_line:
        card = evaluate_suites(
            suites, model, out, source=source, options=model_options(arguments), status=status_line.update
        )
    if card is None:
        return
    print_progress(f"scorecard, page and outputs are in {out}")
    figures = {name: figure.to_json() for name, figure in card.figures().items()}
    if earlier is None:
        print_result(arguments, figures, figures_table(card))
        return
    report_differences(arguments, earlier, card)


def print_suites(arguments: argparse.Namespace) -> None:
    """Print the suites of this package: kind, description and settings of each."""
    import dataclasses

    from chameleon.config_reader import load_yaml
    from chameleon.evaluation.suite import SHIPPED, shipped_suites, suite_class

    described: dict[str, Any] = {}
    for name in shipped_suites():
        values = load_yaml(SHIPPED / f"{name}.yaml")
        fields = [field.name for field in dataclasses.fields(suite_class(values["kind"], name))]
        described[name] = {"kind": values["kind"], "description": values["description"].strip(), "settings": fields}
    lines = [f"{name}\n  {of['description']}\n  settings: {', '.join(of['settings'])}" for name, of in described.items()]
    print_result(arguments, described, "\n".join(lines))


def open_model(arguments: argparse.Namespace) -> tuple[EvaluatedModel, str]:
    """Return the model and where it is from: a bundle on this process's device, or a server."""
    import os

    import torch

    from chameleon.bundle import SHIPPED
    from chameleon.evaluation.part import LocalModel
    from chameleon.evaluation.server_model import ServerModel

    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    device = arguments.device
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{int(local_rank) % max(1, torch.cuda.device_count())}"
    with_device = argparse.Namespace(**{**vars(arguments), "device": device})
    if arguments.server:
        tokenizer_model = load_model(with_device) if arguments.model else None
        return ServerModel(arguments.server, tokenizer_model), arguments.server
    return LocalModel(load_model(with_device)), str(arguments.model or SHIPPED)


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the model is loaded with, for the scorecard."""
    return {"model": arguments.model, "server": arguments.server} | {
        name: getattr(arguments, name) for name in MODEL_OPTIONS
    }


def take_model_options(arguments: argparse.Namespace, earlier: Scorecard) -> None:
    """Load the model as the scorecard says, but for what the command line gives."""
    options = earlier.content["options"]
    defaults = Parser()
    add_model_options(defaults)
    plain = defaults.parse_args([])
    for name in MODEL_OPTIONS:
        if getattr(arguments, name) == getattr(plain, name) and name in options:
            setattr(arguments, name, options[name])
    if not arguments.model and not arguments.server:
        arguments.model, arguments.server = options.get("model"), options.get("server")


def suites_of(earlier: Scorecard) -> list[NamedSuite]:
    """Return the suites of a scorecard, with its settings."""
    from chameleon.evaluation.suite import make_suite

    return [
        make_suite(name, content["kind"], content["settings"], name) for name, content in earlier.content["suites"].items()
    ]


def report_differences(arguments: argparse.Namespace, earlier: Scorecard, card: Scorecard) -> None:
    """Print which figures and settings differ from those of an earlier scorecard. Exits with 1 if any figure does."""
    from chameleon.evaluation.scorecard import differing_figures, differing_settings

    figures, settings = differing_figures(earlier, card), differing_settings(earlier, card)
    if not figures:
        lines = [f"all {len(card.figures())} figures are the same"]
    else:
        lines = [f"{len(figures)} of {len(card.figures())} figures differ:", *(f"  {line}" for line in figures)]
        if settings:
            lines += ["what else differs, and may be why:", *(f"  {line}" for line in settings)]
        else:
            lines.append("no recorded setting differs: orders of sums did (threads, load); on CPUs --exact excludes that")
    print_result(arguments, {"figures": figures, "settings": settings}, "\n".join(lines))
    if figures:
        raise SystemExit(EXIT_DIFFERENT)


def figures_table(card: Scorecard) -> str:
    """Return the figures as lines: name, value, interval, base rate."""
    figures = card.figures()
    width = max((len(name) for name in figures), default=0)
    lines = []
    for name, figure in figures.items():
        base_rate = f"  base rate {figure.base_rate:.3g}" if figure.base_rate is not None else ""
        lines.append(f"{name:<{width}}  {figure.text()}{base_rate}")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> None:
    from chameleon.evaluation.scorecard import Scorecard, differing_settings
    from chameleon.evaluation.scorecard import compare as compare_cards

    first, second = Scorecard.read(arguments.first), Scorecard.read(arguments.second)
    comparisons = compare_cards(first, second, arguments.seed)
    width = max(len(entry.name) for entry in comparisons)
    lines = [f"{'':<{width}}  {'A':>10} {'B':>10}  A − B (95% interval), p"]
    for entry in comparisons:
        line = f"{entry.name:<{width}}  {entry.first:>10.4g} {entry.second:>10.4g}"
        if entry.difference is not None:
            of = entry.difference
            bounds = "" if of.low is None or of.high is None else f" ({of.low:+.4g} to {of.high:+.4g})"
            line += f"  {of.value:+.4g}{bounds}, p = {of.p_value:.2g}, {of.count} samples"
        if entry.num_unmatched:
            line += f"; {entry.num_unmatched} samples are in one of the two alone"
        lines.append(line)
    lines += ["differing settings:", *(f"  {line}" for line in differing_settings(first, second))]
    print_result(arguments, [entry.to_json() for entry in comparisons], "\n".join(lines))
