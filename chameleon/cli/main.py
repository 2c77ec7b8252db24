"""The entry point of the command: parses arguments, runs a verb, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from chameleon.cli import convert, data, evaluate, generate, inspect, serve, study, train
from chameleon.cli.options import ANYWHERE, Parser, Verbs
from chameleon.cli.output import print_error
from chameleon.errors import BadInput

DESCRIPTION = "Unified multimodal token models: train them, and generate text and images with them."
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(prog="chameleon", description=DESCRIPTION)
    for name, text in ANYWHERE.items():
        parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("--verbose", action="store_true", help="log what is chosen here, such as the form of the weights")
    verbs = Verbs(parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser))
    for module in (train, data, generate, serve, evaluate, study, inspect, convert):
        module.add_verbs(verbs)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments. Overrides `key=value` of a recipe may also follow options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    are_overrides = hasattr(arguments, "override") and all("=" in text and text[0] != "-" for text in rest)
    if rest and not are_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.override += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 2 for invalid input and 130 for an interrupt, on whichever rank it happens."""
    arguments = parse_arguments(argv)
    if arguments.verbose:
        logging.basicConfig(format="chameleon: %(message)s")
        logging.getLogger("chameleon").setLevel(logging.INFO)
    try:
        arguments.run(arguments)
    except BadInput as error:
        if arguments.debug:
            raise
        print_error(arguments.verb, str(error))
        raise SystemExit(EXIT_BAD_INPUT) from None
    except OSError as error:
        if arguments.debug or not error.strerror:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print_error(arguments.verb, f"{where}{error.strerror}")
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print_error(arguments.verb, "interrupted")
        raise SystemExit(EXIT_INTERRUPTED) from None
