"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chameleon.cli.output import print_error
from chameleon.errors import BadInput

if TYPE_CHECKING:
    from chameleon.generation.chameleon import Chameleon
    from chameleon.generation.sampling import Sampling
    from chameleon.tokenizers.mixed import MixedTokenizer


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(self.prog.removeprefix("chameleon").strip(), f"{message}; see {self.prog} --help")
        raise SystemExit(2)


ANYWHERE = {"--json": "print results as JSON", "--debug": "show tracebacks"}
"""Options that may stand before the verb or after it."""


class Verbs:
    """Adds verbs to the command."""

    def __init__(self, subparsers: Any) -> None:
        self.subparsers = subparsers

    def add(self, name: str, run: Callable[[argparse.Namespace], None], description: str) -> Parser:
        """Add a verb and return its parser."""
        parser: Parser = self.subparsers.add_parser(name, help=description, description=description)
        parser.set_defaults(run=run)
        for name, description in ANYWHERE.items():  # before the verb as well
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=description)
        return parser


# --- a model ---


def add_model_options(parser: Parser) -> None:
    parser.add_argument("--model", metavar="BUNDLE", help="folder of a bundle (default: the shipped one)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="bfloat16, float32, float16, float64 (default: the fastest here, see `chameleon info`)",
    )
    parser.add_argument(
        "--weight-format",
        default="auto",
        help="plain, packed, float16, int8, int4 (default: the fastest here that changes next to nothing)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads of an operation (default: by its work, and what other processes leave free)"
    )
    parser.add_argument(
        "--exact", action="store_true", help="the seed alone determines the output, whatever the batch or draft length"
    )
    parser.add_argument("--draft-length", type=int, default=1, help="image codes verified in one forward pass (default: 1)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the decode step: takes a minute, then decoding is faster"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def load_model(arguments: argparse.Namespace) -> Chameleon:
    from chameleon.generation.chameleon import Chameleon
    from chameleon.threads import set_threads

    if arguments.threads is not None:
        set_threads(arguments.threads)
    return Chameleon.load(arguments.model, **load_options(arguments))


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `Chameleon.load` that are given."""
    names = ("device", "dtype", "weight_format", "draft_length", "compile", "exact", "max_batch_size")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


# --- sampling ---


def add_sampling_options(parser: Parser, max_new_tokens: int | None = None) -> None:
    """max_new_tokens: default of that option; 0 is the model's own, None a verb without text output."""
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding")
    parser.add_argument("--top-p", type=float, help="nucleus sampling; 1 keeps all tokens")
    parser.add_argument("--top-k", type=int, help="keep this many tokens; 0 keeps all")
    if max_new_tokens is not None:
        parser.add_argument("--repetition-penalty", type=float, help="penalty on earlier text tokens; 1 is none")
        default = str(max_new_tokens) if max_new_tokens else "the model's own, usually 30"
        parser.add_argument(
            "--max-new-tokens", type=int, default=max_new_tokens or None, help=f"tokens at most (default: {default})"
        )


def sampling_from(arguments: argparse.Namespace, default: Sampling) -> Sampling:
    """Return `default` with the options that are given."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values = {name: getattr(arguments, name, None) for name in names}
    return replace(default, **{name: value for name, value in values.items() if value is not None})


# --- tokenizers ---


def add_tokenizer_options(parser: Parser) -> None:
    parser.add_argument("--model", metavar="BUNDLE", help="bundle whose tokenizers are used (default: the shipped one)")
    parser.add_argument("--tokenizers", metavar="DIR", help="folder with both tokenizers, instead of --model")


def load_tokenizer(arguments: argparse.Namespace) -> MixedTokenizer:
    """Return the tokenizers of --model or --tokenizers; by default the shipped ones."""
    from chameleon.bundle import Bundle
    from chameleon.tokenizers.mixed import MixedTokenizer

    if arguments.tokenizers and arguments.model:
        raise BadInput("give --model or --tokenizers, not both", where=arguments.verb)
    if arguments.tokenizers:
        return MixedTokenizer.load(Path(arguments.tokenizers))
    return Bundle.load(arguments.model).tokenizer


# --- recipes ---


def add_recipe_options(parser: Parser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("override", nargs="*", metavar="key=value", help="keys of the recipe to change")
    parser.add_argument("--resume", action="store_true", help="resume from the latest checkpoint in run.out")
    parser.add_argument(
        "--force",
        action="store_true",
        help="resume although incompatible keys have changed; start although the estimated memory does not fit",
    )


def apply_recipe_options(arguments: argparse.Namespace, run: Any) -> None:
    """Set `resume` and `force` of a `RunConfig` where the command line does."""
    run.resume |= arguments.resume
    run.force |= arguments.force


# --- image files ---


def check_image_path(path: Path) -> None:
    """Raise `BadInput` where an image cannot be written to a path."""
    from PIL import Image as PILImage

    if PILImage.registered_extensions().get(path.suffix.lower()) not in PILImage.SAVE:
        raise BadInput("not the extension of an image", where=path, remedy="use .png, .webp or .jpg")
    if not path.parent.is_dir():
        raise BadInput("no such folder", where=path.parent, remedy="create it first")
