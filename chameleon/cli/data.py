"""Verbs on data: tokenize."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon.cli.options import Verbs, add_tokenizer_options, load_tokenizer
from chameleon.cli.output import is_first_process, print_error, print_progress, print_result, sigterm_as_interrupt
from chameleon.cli.train import print_skipped
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.data.tokenize import Status

EXIT_TOO_MANY_SKIPPED = 3


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("tokenize", tokenize, "Tokenize sources to token shards.")
    parser.add_argument("source", nargs="+", help="files, patterns, KIND:PATTERN, or emoji:TASK")
    add_tokenizer_options(parser)
    parser.add_argument("--out", required=True, help="folder for the token shards")
    parser.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be read")
    parser.add_argument("--config", metavar="OPTIONS", help="a YAML file of filters, variants …")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="one of them, such as filters.min_side=256"
    )
    parser.add_argument("--allow-paths", action="store_true", help="let records name images outside their folder")
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that read images and encode text (default: 0)"
    )
    parser.add_argument("--device", default="cpu", help="where images are encoded (default: cpu)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="an existing cluster (default: one is started here)")
    parser.add_argument("--num-actors", type=int, help="Ray actors (default: one for each GPU, or for each CPU)")
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.05,
        help="exit with code 3 if more than this share of samples, or of bytes, could not be read (default: 0.05)",
    )


def tokenize(arguments: argparse.Namespace) -> None:
    from chameleon.config_reader import read_config
    from chameleon.data.ray_engine import ray_engine
    from chameleon.data.tokenize import TokenizeOptions, local_engine
    from chameleon.data.tokenize import tokenize as tokenize_sources
    from chameleon.device import check_device
    from chameleon.progress import StatusLine
    from chameleon.train.recipe import find_recipe

    if arguments.num_workers < 0 or (arguments.num_actors is not None and arguments.num_actors < 1):
        raise BadInput("--num-workers is 0 or more, --num-actors 1 or more", where="tokenize")
    if arguments.engine == "local" and (arguments.num_actors is not None or arguments.ray_address is not None):
        raise BadInput("--num-actors and --ray-address are for --engine ray", where="tokenize")
    check_device(arguments.device)
    config = None if arguments.config is None else find_recipe(arguments.config)
    options = read_config(TokenizeOptions, config, arguments.set)
    tokenizer = load_tokenizer(arguments)
    engine = local_engine
    if arguments.engine == "ray":
        engine = ray_engine(arguments.ray_address, num_actors=arguments.num_actors, device=arguments.device)
    else:
        tokenizer.image.network.to(arguments.device)
    with sigterm_as_interrupt(), StatusLine(enabled=is_first_process()) as status_line:
        report = tokenize_sources(
            arguments.source,
            tokenizer,
            Path(arguments.out),
            options=options,
            engine=engine,
            num_workers=arguments.num_workers,
            strict=arguments.strict,
            allow_paths=arguments.allow_paths,
            on_status=lambda s: status_line.update(status_text(s), final=s.shards == s.total_shards),
        )
    print_skipped(report)
    for name in report.others:
        print_progress(f"also in {arguments.out}, of other sources: {name}")
    value = report.to_json()
    keys = ("documents_in", "documents_out", "skipped", "unreadable_bytes", "tokens", "duplicate_share")
    print_result(arguments, value, "\n".join(f"{key:<18}{value[key]}" for key in keys))
    if not report.documents_out:
        print_error("tokenize", f"none of {report.documents_in} samples is left")
        raise SystemExit(EXIT_TOO_MANY_SKIPPED)
    if report.skipped_share > arguments.max_skipped:
        limit = arguments.max_skipped
        print_error("tokenize", f"{report.skipped_share:.1%} could not be read, more than --max-skipped {limit}")
        raise SystemExit(EXIT_TOO_MANY_SKIPPED)


def status_text(status: Status) -> str:
    from chameleon.progress import format_duration

    seconds = max(status.seconds, 1e-9)
    left = f", {format_duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    return (
        f"{status.shards} of {status.total_shards} shards, {status.documents:,} documents, {status.skipped:,} skipped, "
        f"{status.pictures / seconds:,.1f} images/s, {status.tokens / seconds:,.0f} tokens/s{left}"
    )
