"""Output of the command: progress and errors on stderr, results on stdout, and what each rank prints.

Of several processes that train together only the first one prints progress and results. Errors are printed by whichever
process has them, with its rank.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""torchrun and SLURM number all processes; Lightning numbers nodes, and the processes that it starts on one."""


def rank_description() -> str | None:
    """Return the rank of this process, such as `RANK 3`; None for the first process, or a single one."""
    for name in RANK_VARIABLES:
        if os.environ.get(name, "0") != "0":
            return f"{name} {os.environ[name]}"
    return None


def is_first_process() -> bool:
    """Return whether this is the first of several processes, or a single one."""
    return rank_description() is None


def print_progress(text: str) -> None:
    """Print a line of progress to stderr, on the first process only."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def print_error(verb: str, message: str) -> None:
    """Print an error to stderr, with the rank of the process."""
    rank = rank_description()
    prefix = f"chameleon {verb}" if rank is None else f"chameleon {verb} ({rank})"
    print(f"{prefix}: {message}", file=sys.stderr, flush=True)


def print_result(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """Print a result to stdout: `value` as JSON with --json, else `text`."""
    print(json.dumps(value, ensure_ascii=False) if arguments.json else text, flush=True)


def metrics_table(metrics: dict[str, Any]) -> str:
    """Return nested metrics as lines of `name  value`."""
    rows: list[tuple[str, float]] = []

    def add_rows(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add_rows(f"{prefix} / {key}" if prefix else key, inner)
        else:
            rows.append((prefix, value))

    add_rows("", metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value:.4g}" for name, value in rows)


def aligned_lines(values: dict[str, Any]) -> str:
    """Return lines of `key  value`."""
    width = max(22, *(len(key) + 2 for key in values))
    return "\n".join(f"{key:<{width}}{value}" for key, value in values.items())


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM in the block as an interrupt, so that partial files are removed then too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt  # not a second signal: a shell that starts a command with `&` makes it ignore SIGINT

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
