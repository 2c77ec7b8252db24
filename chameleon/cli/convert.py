"""Verbs that make bundles of others: convert, average."""

from __future__ import annotations

import argparse
import time

from chameleon.cli.options import Verbs
from chameleon.cli.output import is_first_process, print_progress, print_result, sigterm_as_interrupt


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "convert", convert, "Convert a checkpoint between formats: a bundle, Meta's, Hugging Face's, Lumina-mGPT's."
    )
    parser.add_argument("source", metavar="SRC", help="folder in any of the four formats, detected by its files")
    parser.add_argument("target", metavar="DST", help="a new folder")
    parser.add_argument("--to", required=True, choices=("bundle", "hf", "lumina", "meta"), help="the format to write")
    parser.add_argument("--model-dir", metavar="NAME", help="which of several models in Meta's format below SRC")
    parser.add_argument("--tokenizer", metavar="DIR", help="Meta's tokenizer folder, for what SRC lacks (its decoder)")
    parser.add_argument(
        "--target-side",
        type=int,
        metavar="PIXELS",
        help="of Lumina-mGPT: side of a square image (default: as the folder's name says, 512, 768 or 1024)",
    )
    parser.add_argument("--shards", type=int, help="number of files of Meta's weights (default: as in SRC)")
    parser.add_argument(
        "--prompting", choices=("conversation", "document"), help="default: conversation, or the bundle's own"
    )

    parser = verbs.add("average", average, "Write a bundle whose weights are the mean of those of other bundles.")
    parser.add_argument("bundle", nargs="+", help="bundles of one shape; all but the weights is the last one's")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of each bundle (default: all the same); scaled to sum to 1"
    )


def average(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from chameleon.average import average as average_bundles

    out = Path(arguments.out)
    with sigterm_as_interrupt():
        summary = average_bundles([Path(bundle) for bundle in arguments.bundle], out, arguments.weights)
    parts = [f"{part['weight']:.3g} × {part['bundle']}" for part in summary["average_of"]]
    print_result(arguments, summary, f"{out}: {' + '.join(parts)}")


def convert(arguments: argparse.Namespace) -> None:
    from chameleon.convert.convert import convert as convert_checkpoint
    from chameleon.progress import StatusLine, format_duration

    total_bytes, bytes_written, start_time = 0, 0, time.monotonic()
    with sigterm_as_interrupt(), StatusLine(enabled=is_first_process()) as status_line:

        def set_total(num_bytes: int) -> None:
            nonlocal total_bytes
            total_bytes = num_bytes

        def add_progress(num_bytes: int) -> None:
            nonlocal bytes_written
            bytes_written += num_bytes
            rate = bytes_written / max(1e-9, time.monotonic() - start_time)
            left = format_duration(max(0, total_bytes - bytes_written) / max(1.0, rate))
            if status_line.is_due():
                status_line.update(
                    f"{bytes_written / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left} left"
                )

        summary = convert_checkpoint(
            arguments.source,
            arguments.target,
            arguments.to,
            model_dir=arguments.model_dir,
            tokenizer=arguments.tokenizer,
            shards=arguments.shards,
            prompting=arguments.prompting,
            target_side=arguments.target_side,
            progress=add_progress,
            on_total=set_total,
        )
    for note in summary["notes"]:
        print_progress(note)
    if not summary["decoder"]:
        consequence = "" if arguments.to in ("hf", "lumina") else ", so it cannot draw; --tokenizer adds one"
        print_progress(f"without an image decoder{consequence}")
    text = f"{summary['out']}: {summary['parameters'] / 1e9:.3f} billion parameters, {summary['vocabulary']} token ids"
    print_result(arguments, summary, text)
