"""The command `chameleon VERB`, a module for each group of verbs.

Progress goes to stderr, results to stdout; `--json` makes results machine-readable. Invalid input ends with exit code 2 and
one line that says where the problem is, what it is, and how to fix it; `--debug` shows the traceback.

The parsers are argparse's. Parsers derived from typed functions by jsonargparse, which reads the recipes, would import
every module that a verb needs, so that `--help` would take seconds, and help texts would have to be docstrings.
"""

from chameleon.cli.main import main

__all__ = ["main"]
