"""Checkpoints of a run, from which it continues bit for bit: weights, optimiser states, and two counters.

Files::

    RUN/checkpoints/step-00001000/*.safetensors    each process's shard of the tensors, in PyTorch's distributed format
    RUN/checkpoints/step-00001000/checkpoint.json  the counters, the recipe, SHA-256 of each file

A checkpoint is written atomically, and can be read by any number of processes, however they shard the model. The order of
the data and all random numbers are functions of the counters, so they are not stored.
"""

from __future__ import annotations

import csv
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from chameleon.errors import BadInput
from chameleon.files import EVENTS_FILE, RUN_FILE, read_json, write_json
from chameleon.train.checkpoint_files import (
    DESCRIPTION_FILE,
    CheckpointReader,
    CheckpointWriter,
    restore,
    tensors_to_save,
)
from chameleon.train.processes import (
    STOP_SIGNALS,
    is_single_process,
    num_launched,
    on_first_process,
    run_on_all_processes,
)
from chameleon.train.recipe import RunConfig
from chameleon.train.step_module import StepModule

CHECKPOINTS_FOLDER = "checkpoints"
MAX_ROLLBACKS = 3
"""Rollbacks without a checkpoint between them after which a run ends."""
RESUMABLE_KEYS = (
    "run.",
    "num_workers",
    "micro_batch_size",
    "verify_shards",
    "compile",
    "activation_checkpointing",
    "attention",
    "monitors",
    "num_samples",
    "validation",
)
"""Prefixes of the recipe keys that may change when a run is resumed, apart from `FIXED_KEYS`."""
FIXED_KEYS = ("run.max_steps", "run.seed", "run.precision")


@dataclass
class StoredCheckpoint:
    """What checkpoint.json says of a checkpoint."""

    folder: Path
    completed_steps: int
    batches_seen: int
    tensor_parallel_size: int
    """Determines the order of the rows of fused matrices."""
    recipe: dict[str, Any]
    sha256: dict[str, str]
    """File name → its checksum."""

    @classmethod
    def from_folder(cls, folder: Path) -> StoredCheckpoint:
        """Raises `BadInput` where the description is not complete."""
        description = read_json(folder / DESCRIPTION_FILE)
        try:
            names = ("completed_steps", "batches_seen", "tensor_parallel_size", "recipe", "sha256")
            return cls(folder, **{name: description[name] for name in names})
        except KeyError as error:
            raise BadInput(f"incomplete (no {error})", where=folder) from None


def checkpoint_folders(out: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the latest first."""
    return sorted((out / CHECKPOINTS_FOLDER).glob("step-*"), reverse=True)


def stored_checkpoints(out: Path) -> list[StoredCheckpoint]:
    """Return the checkpoints of a run that have a description, the latest first; warn of the others."""
    checkpoints = []
    for folder in checkpoint_folders(out):
        try:
            checkpoints.append(StoredCheckpoint.from_folder(folder))
        except BadInput as error:
            warnings.warn(f"{folder} is ignored: {error}", stacklevel=2)
    return checkpoints


def resumable_checkpoints(run: RunConfig, recipe: dict[str, Any]) -> list[StoredCheckpoint]:
    """Return the checkpoints in `run.out` from which the run can go on, the latest first.

    Warns where there is none. Raises `BadInput` where the recipe has changed in a way that makes it another run, or none is
    complete, unless `run.force`.
    """
    out = Path(run.out)
    checkpoints = stored_checkpoints(out)
    if not checkpoints:
        if checkpoint_folders(out) and not run.force:
            raise no_complete_checkpoint(out)
        warnings.warn(f"no checkpoint in {out / CHECKPOINTS_FOLDER}: the run starts from the beginning", stacklevel=2)
    for checkpoint in checkpoints[:1]:
        compare_recipes(checkpoint.recipe, recipe, checkpoint.folder, force=run.force)
    return checkpoints


def no_complete_checkpoint(out: Path) -> BadInput:
    return BadInput(
        "no checkpoint is complete",
        where=out / CHECKPOINTS_FOLDER,
        remedy="--force starts from step 0 and moves them aside",
    )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dictionaries and lists of dictionaries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}.{index}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def compare_recipes(before: dict[str, Any], now: dict[str, Any], where: object, *, force: bool) -> None:
    """Warn of keys that have changed; raise `BadInput` for incompatible ones, unless `force`."""
    old, new = dict(flatten(before)), dict(flatten(now))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    fixed = [key for key in changed if key in FIXED_KEYS or not key.startswith(RESUMABLE_KEYS)]
    changes = [f"{key} from {old.get(key)} to {new.get(key)}" for key in (fixed or changed) if key != "run.resume"]
    if fixed and not force:
        raise BadInput(f"the recipe has changed: {', '.join(changes)}", where=where, remedy="--force resumes nevertheless")
    if changes:
        warnings.warn(f"changed since the checkpoint: {', '.join(changes)}", stacklevel=3)


def read_log_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    path = out / "log" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows if row.get("step", "").isdigit()]


# --- the callback ----------------------------------------------------------------------------------------------------


class CheckpointCallback(Callback):
    """Writes checkpoints during a run, restores the one that it is resumed from, and rolls back where needed."""

    def __init__(self, run: RunConfig, recipe: dict[str, Any]) -> None:
        """recipe: as plain values, with the precision that is used.

        Raises `BadInput` where the run cannot be resumed; of several processes all do so when training starts.
        """
        if run.save_total_limit < 1:
            raise BadInput(f"save_total_limit is {run.save_total_limit}, expected 1 or more", where="run.save_total_limit")
        self.run, self.recipe = run, recipe
        self.out = Path(run.out)
        self.last_save_time = time.monotonic()
        self.checkpoints: list[StoredCheckpoint] = []
        self.log_rows: list[dict[str, Any]] = []
        self.problem: BadInput | None = None
        """Why the run cannot be resumed, on the first process."""
        if run.resume and getattr(rank_zero_only, "rank", 0) == 0:
            self.log_rows = read_log_rows(self.out)  # before the loggers begin anew
            try:
                self.checkpoints = resumable_checkpoints(run, recipe)
            except BadInput as error:
                if num_launched() == 1:
                    raise
                self.problem = error  # the others wait for this process
        self.group: Any = None
        """All processes, with a backend for CPUs, for the tensors of checkpoints."""
        self.writer: CheckpointWriter | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.restore_log(trainer)  # first, so that it is there whatever may fail

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StepModule)
        self.last_save_time = time.monotonic()
        if not is_single_process():
            self.group = distributed.new_group(backend="gloo")
            writer_group = distributed.new_group(backend="gloo")
        else:
            writer_group = None
        self.writer = CheckpointWriter(writer_group, trainer.strategy.root_device)
        self.checkpoints = on_first_process(self.found_checkpoints)
        resumed = self.restore_latest(trainer, module, self.checkpoints)
        if self.checkpoints and resumed is None and not self.run.force:
            raise no_complete_checkpoint(self.out)

        def prepare_folder() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            kind = "fit_image" if "sources" in self.recipe else "training"
            record = {"kind": kind, "processes": trainer.world_size, "started": time.time(), "recipe": self.recipe}
            write_json(self.out / RUN_FILE, record)
            self.remove_stale_files(resumed)

        on_first_process(prepare_folder)
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, lambda *_: module.requests.update(stop=True))
        self.restore_log(trainer, resumed.completed_steps if resumed is not None else -1)
        if resumed is None:
            return
        module.completed_steps, module.batches_seen = resumed.completed_steps, resumed.batches_seen
        assert module.training_set is not None
        module.training_set.first_batch = resumed.batches_seen
        if trainer.is_global_zero:
            module.events.remove_after(resumed.completed_steps)

    def found_checkpoints(self) -> list[StoredCheckpoint]:
        if self.problem is not None:
            raise self.problem
        return self.checkpoints

    def restore_log(self, trainer: L.Trainer, last_step: int = sys.maxsize) -> None:
        """Write the rows that the log had up to a step, and no others. Lightning's logger has removed them all."""
        for logger in trainer.loggers if trainer.is_global_zero and self.log_rows else []:
            if isinstance(logger, CSVLogger):
                Path(logger.experiment.metrics_file_path).unlink(missing_ok=True)
                logger.experiment.metrics = [row for row in self.log_rows if row["step"] <= last_step]
                logger.save()

    def restore_latest(
        self, trainer: L.Trainer, module: StepModule, checkpoints: list[StoredCheckpoint]
    ) -> StoredCheckpoint | None:
        """Restore the first of the checkpoints whose files are what they were written as; warn of others.

        Returns None where there is none; then nothing has changed. A collective operation.
        """
        for checkpoint in checkpoints:
            reader = CheckpointReader(checkpoint.folder, checkpoint.sha256, self.group)
            try:
                run_on_all_processes(reader.read_share)
            except BadInput as error:
                if trainer.is_global_zero:
                    warnings.warn(f"{checkpoint.folder} is ignored: {error}", stacklevel=2)
                continue
            restore(reader, module, trainer.optimizers)
            before, now = checkpoint.tensor_parallel_size, self.run.tensor_parallel_size
            module.reorder_fused_rows(before, now, trainer.optimizers)
            return checkpoint
        return None

    def remove_stale_files(self, resumed: StoredCheckpoint | None) -> None:
        """Remove partial checkpoints, and those after the one that the run is resumed from.

        The checkpoints of an earlier run that is not resumed are moved aside.
        """
        for partial in (self.out / CHECKPOINTS_FOLDER).glob(".step-*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        if resumed is None:
            (self.out / EVENTS_FILE).unlink(missing_ok=True)
            if checkpoint_folders(self.out):
                aside = self.out / f"{CHECKPOINTS_FOLDER}.before"
                shutil.rmtree(aside, ignore_errors=True)
                (self.out / CHECKPOINTS_FOLDER).rename(aside)
            return
        for folder in checkpoint_folders(self.out):
            if folder.name > resumed.folder.name:  # it was incomplete
                shutil.rmtree(folder, ignore_errors=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, StepModule) and self.writer is not None
        module.requests["fail"] = self.writer.failed
        granted = module.take_granted()
        if granted["fail"]:
            self.writer.wait()  # raises on all processes
        if module.guard.needs_rollback:
            self.roll_back(trainer, module)
            module.granted |= {name: True for name, is_granted in granted.items() if is_granted}  # after the next step
            return
        step = module.current_step  # callbacks run before the module counts the step
        save_every, minutes = self.run.save_every_n_steps, self.run.save_every_n_minutes
        if trainer.is_global_zero and minutes and time.monotonic() - self.last_save_time > 60 * minutes:
            module.requests["save"] = True  # the first process's clock counts
            self.last_save_time = time.monotonic()
        if step >= self.run.max_steps:  # the result follows
            return
        if granted["stop"] or granted["save"] or (save_every and step % save_every == 0):
            module.read_result()
            if granted["stop"] or not module.guard.consecutive_skips:
                self.save(trainer, module, step)
            else:  # a rollback may follow
                module.requests["save"] = True
        if granted["stop"]:
            self.writer.wait()
            raise SystemExit(128 + signal.SIGTERM)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.writer is not None:
            self.writer.wait()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self.writer is not None:
            self.writer.wait_a_moment()

    def save(self, trainer: L.Trainer, module: StepModule, step: int) -> None:
        """Begin to write the checkpoint after `step` steps; once it is complete, all but the last ones are removed."""
        assert self.writer is not None
        module.guard.rollbacks = 0
        self.last_save_time = time.monotonic()
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.save()
        description = {
            "completed_steps": step,
            "batches_seen": module.batches_seen + 1,
            "tensor_parallel_size": self.run.tensor_parallel_size,
            "processes": trainer.world_size,
            "recipe": self.recipe,
        }
        target = self.out / CHECKPOINTS_FOLDER / f"step-{step:08}"
        self.writer.start(target, tensors_to_save(module, trainer.optimizers), description, self.remove_old_checkpoints)

    def remove_old_checkpoints(self) -> None:
        for folder in checkpoint_folders(self.out)[self.run.save_total_limit :]:
            shutil.rmtree(folder, ignore_errors=True)

    def roll_back(self, trainer: L.Trainer, module: StepModule) -> None:
        """Restore the latest checkpoint and continue with later batches. Raise `BadInput` where there is none."""
        assert self.writer is not None
        guard = module.guard
        summary = f"{guard.consecutive_skips} steps in a row were skipped"
        self.writer.wait()
        module.read_result()
        skipped_steps, rollbacks = guard.skipped_steps, guard.rollbacks
        latest = None
        if rollbacks < MAX_ROLLBACKS:
            latest = self.restore_latest(trainer, module, on_first_process(lambda: stored_checkpoints(self.out)))
        if latest is None:
            reason = f"{MAX_ROLLBACKS} rollbacks did not help" if rollbacks >= MAX_ROLLBACKS else "there is no checkpoint"
            raise BadInput(
                f"{summary} until step {module.current_step}, and {reason}",
                where=self.run.out,
                remedy="lower optimizer.lr, or look at the data named above",
            )
        step = latest.completed_steps
        module.events.add(module.current_step, "rollback", f"{summary}: on from step {step} with later batches")
        guard.skipped_steps, guard.rollbacks = skipped_steps, rollbacks
        guard.rolled_back()
        module.completed_steps = step - 1  # the module counts this batch as a step
