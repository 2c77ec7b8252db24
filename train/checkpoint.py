"""Checkpoints of a run, from which it goes on bit for bit: weights, optimisers' states, random numbers, the step.

RUN/checkpoints/step-00001000/state.pt         what is restored, read as tensors alone
RUN/checkpoints/step-00001000/checkpoint.json  the step, the recipe, SHA-256 of state.pt

A checkpoint is written whole or not at all. The order of the data is a function of the step, so nothing of it is kept.
"""

from __future__ import annotations

import csv
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from chameleon.errors import BadInput
from chameleon.files import checksum, read_json, write_json, written_whole
from chameleon.train.recipe import RunConfig

FOLDER, STATE, DESCRIPTION = "checkpoints", "state.pt", "checkpoint.json"
HARMLESS = ("run.", "workers", "micro_rows", "verify", "compile", "validation")
"""What the recipe's keys begin with that may change when a run goes on, but for those below."""
HARMFUL = ("run.steps", "run.seed", "run.precision")


@dataclass
class Resumed:
    """What a run goes on from."""

    step: int
    """Steps that were done."""
    state: dict[str, Any]
    rows: list[dict[str, str]]
    """Rows of the log until then."""


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted((out / FOLDER).glob("step-*"), reverse=True)


def find(run: RunConfig, recipe: dict[str, Any]) -> Resumed | None:
    """What the run in `run.out` goes on from: its latest whole checkpoint; None where there is none.

    Raises `BadInput` where the recipe has changed in a way that would make another run of it, unless `run.force`.
    """
    for folder in folders(Path(run.out)):
        try:
            description = read_json(folder / DESCRIPTION)
            if checksum(folder / STATE) != description["sha256"]:
                raise BadInput("checksum does not fit", where=folder / STATE)
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            before = description["recipe"]
        except (BadInput, OSError, KeyError) as error:
            warnings.warn(f"{folder} is passed over: {error}", stacklevel=2)
            continue
        compare(before, recipe, folder, force=run.force)
        return Resumed(state["step"], state, logged(Path(run.out), state["step"]))
    warnings.warn(f"no checkpoint in {Path(run.out) / FOLDER}: the run begins anew", stacklevel=2)
    return None


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def compare(before: dict[str, Any], now: dict[str, Any], where: object, *, force: bool) -> None:
    """Warns of keys that changed; raises `BadInput` for those that make another run, unless `force`."""
    old, new = dict(flat(before)), dict(flat(now))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    harmful = [key for key in changed if key in HARMFUL or not key.startswith(HARMLESS)]
    told = [f"{key} from {old.get(key)} to {new.get(key)}" for key in (harmful or changed) if key != "run.resume"]
    if harmful and not force:
        raise BadInput(f"the recipe has changed: {', '.join(told)}", where=where, remedy="--force goes on nevertheless")
    if told:
        warnings.warn(f"changed since the checkpoint: {', '.join(told)}", stacklevel=3)


def logged(out: Path, step: int) -> list[dict[str, str]]:
    """The rows of the run's log before a step."""
    path = out / "log" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < step]


class Checkpoints(Callback):
    """Writes checkpoints while a run trains, and restores the one that it goes on from."""

    def __init__(self, run: RunConfig, recipe: dict[str, Any], resumed: Resumed | None) -> None:
        self.run, self.recipe, self.resumed = run, recipe, resumed
        self.last = time.monotonic()
        if resumed is None:
            shutil.rmtree(Path(run.out) / FOLDER, ignore_errors=True)  # of an earlier run in this folder

    @property
    def first(self) -> int:
        """Steps that were done before."""
        return self.resumed.step if self.resumed else 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last = time.monotonic()
        if self.resumed is None:
            return
        for optimizer, state in zip(trainer.optimizers, self.resumed.state["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        trainer.fit_loop.epoch_loop._batches_that_stepped = self.first  # what log rows are numbered by
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                rows: Any = self.resumed.rows
                logger.experiment.metrics.extend({**row, "step": int(row["step"])} for row in rows)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.resumed is not None:  # making the loader has drawn some numbers
            random = self.resumed.state["random"]
            torch.set_rng_state(random["cpu"])
            if random["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(random["cuda"])
            self.resumed.state.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = self.first + batch_idx + 1
        if done == self.run.steps:  # what comes next is the bundle
            return
        every, minutes = self.run.checkpoint_every, self.run.checkpoint_minutes
        late = bool(minutes) and time.monotonic() - self.last > 60 * minutes
        # Clocks and signals are the first process's: all have to decide alike.
        if (every and done % every == 0) or trainer.strategy.broadcast(late or trainer.received_sigterm):
            self.save(trainer, module, done)
            self.last = time.monotonic()

    def save(self, trainer: L.Trainer, module: Any, done: int) -> None:
        """Writes the checkpoint of `done` steps, then removes all but the last `run.keep`."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            state = {
                "step": done,
                "model": module.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "random": {
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                },
            }
            out = Path(self.run.out)
            with written_whole(out / FOLDER / f"step-{done:08}") as place:
                torch.save(state, place / STATE)
                description = {"step": done, "sha256": checksum(place / STATE), "recipe": self.recipe}
                write_json(place / DESCRIPTION, description)
            for old in folders(out)[self.run.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier()
