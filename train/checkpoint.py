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
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from chameleon.errors import BadInput
from chameleon.files import EVENTS_FILE, RUN_FILE, atomic_folder, read_json, sha256_of, write_json
from chameleon.train.muon import Muon
from chameleon.train.recipe import RunConfig
from chameleon.train.step_module import StepModule

CHECKPOINTS_FOLDER, DESCRIPTION_FILE = "checkpoints", "checkpoint.json"
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
OPTIMIZER_STATE_KEYS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
"""Keys of an optimiser's state of each parameter."""


@dataclass
class ResumePoint:
    """The checkpoint that a run is resumed from."""

    folder: Path
    completed_steps: int
    batches_seen: int
    tensor_parallel_size: int
    """Determines the order of the rows of fused matrices."""
    log_rows: list[dict[str, str]]
    """Rows of the log up to the checkpoint."""


def checkpoint_folders(out: Path) -> list[Path]:
    """Return the checkpoints of a run, the latest first."""
    return sorted((out / CHECKPOINTS_FOLDER).glob("step-*"), reverse=True)


def read_description(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's checkpoint.json. Raise `BadInput` where a file is missing or does not match its checksum."""
    description = read_json(folder / DESCRIPTION_FILE)
    try:
        for name, expected in description["sha256"].items():
            if sha256_of(folder / name) != expected:
                raise BadInput("checksum does not match", where=folder / name)
        keys = ("completed_steps", "batches_seen", "tensor_parallel_size", "recipe", "sha256")
        return {key: description[key] for key in keys}
    except (OSError, KeyError, AttributeError) as error:
        raise BadInput(f"incomplete ({error})", where=folder) from None


def latest_checkpoint(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest complete checkpoint of a run and its description; warn of later ones that are incomplete."""
    for folder in checkpoint_folders(out):
        try:
            return folder, read_description(folder)
        except BadInput as error:
            warnings.warn(f"{folder} is ignored: {error}", stacklevel=2)
    return None


def find_resume_point(run: RunConfig, recipe: dict[str, Any]) -> ResumePoint | None:
    """Return the latest complete checkpoint in `run.out`; None where there is none.

    Raises `BadInput` where the recipe has changed in a way that makes it another run, unless `run.force`.
    """
    out = Path(run.out)
    latest = latest_checkpoint(out)
    if latest is None:
        if checkpoint_folders(out) and not run.force:
            raise BadInput(
                "no checkpoint is complete",
                where=out / CHECKPOINTS_FOLDER,
                remedy="--force starts from step 0 and moves them aside",
            )
        warnings.warn(f"no checkpoint in {out / CHECKPOINTS_FOLDER}: the run starts from the beginning", stacklevel=2)
        return None
    folder, description = latest
    compare_recipes(description["recipe"], recipe, folder, force=run.force)
    step = description["completed_steps"]
    return ResumePoint(
        folder, step, description["batches_seen"], description["tensor_parallel_size"], read_log_rows(out, step)
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


def read_log_rows(out: Path, step: int) -> list[dict[str, str]]:
    """Return the rows of a run's log up to a step."""
    path = out / "log" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) <= step]


def is_single_process() -> bool:
    """Return whether no process group is initialised."""
    return not (distributed.is_available() and distributed.is_initialized())


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensors_to_save(module: StepModule, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint: `module.NAME`, `optimizer.PARAMETER.KEY`, `extra.NAME`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {f"module.{name}": value.detach() for name, value in module.checkpointed_tensors().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors | {f"extra.{name}": value for name, value in module.extra_state().items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shard of the tensors to a folder that all processes share."""
    # Copies on the CPU: GPU memory is not needed twice, and a view into a larger storage would be refused.
    tensors = {name: value if isinstance(value, DTensor) else value.to("cpu", copy=True) for name, value in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of running in a single process
            save(tensors, storage_writer=writer, no_dist=is_single_process())
    except CheckpointException as error:  # not a subclass of Exception
        raise OSError("; ".join(map(str, error.failures.values())) or str(error)) from None


def restore(folder: Path, module: StepModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore module and optimisers from a checkpoint, each process its shard. Raise `BadInput` for other shapes."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {f"module.{name}": v.detach() for name, v in module.checkpointed_tensors().items()}
    for name, target in targets.items():
        if name not in stored or stored[name].size != target.shape:  # type: ignore[union-attr]
            stored_shape = list(stored[name].size) if name in stored else "missing"  # type: ignore[union-attr]
            raise BadInput(f"{name} is {stored_shape} in the checkpoint, {list(target.shape)} here", where=folder)
    for optimizer in optimizers:
        optimizer.state.clear()  # frees as much memory as is read next
    parameters = dict(module.named_parameters())
    parameter_of = {}
    for name, metadata in stored.items():
        if name in targets:
            continue
        parameter_name = name.removeprefix("optimizer.").rpartition(".")[0]
        parameter = parameters.get(parameter_name) if name.startswith("optimizer.") else None
        size, dtype = metadata.size, metadata.properties.dtype  # type: ignore[union-attr]
        if parameter is not None and size == parameter.shape:
            targets[name] = torch.zeros_like(parameter, dtype=dtype)
        else:
            targets[name] = torch.zeros(size, dtype=dtype)
        if parameter is not None:
            parameter_of[name] = parameter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(targets, storage_reader=reader, no_dist=is_single_process())
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in parameter_of.items():
        states.setdefault(parameter, {})[name.rpartition(".")[2]] = targets[name]
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = states.get(parameter, {})
            if set(state) == OPTIMIZER_STATE_KEYS[type(optimizer)]:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
            elif state:
                warnings.warn(f"{folder} is of another optimizer, whose state is dropped", stacklevel=2)
    module.load_extra_state({n.removeprefix("extra."): v for n, v in targets.items() if n.startswith("extra.")})


def run_on_all_processes(action: Callable[[], None]) -> None:
    """Run an action on every process. Raise `BadInput` on all of them where it fails on one."""
    message: str | None = None
    try:
        action()
    except (BadInput, OSError) as error:
        message = str(error)
    messages: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(messages, message)
    first_message = next((text for text in messages if text), None)
    if first_message is not None:
        raise BadInput(first_message, where=CHECKPOINTS_FOLDER)


# --- the callback ----------------------------------------------------------------------------------------------------


class CheckpointCallback(Callback):
    """Writes checkpoints during a run, restores the one that it is resumed from, and rolls back where needed."""

    def __init__(self, run: RunConfig, recipe: dict[str, Any], resume_point: ResumePoint | None) -> None:
        """recipe: as plain values, with the precision that is used."""
        if run.save_total_limit < 1:
            raise BadInput(f"save_total_limit is {run.save_total_limit}, expected 1 or more", where="run.save_total_limit")
        self.run, self.recipe, self.resume_point = run, recipe, resume_point
        self.out = Path(run.out)
        self.last_save_time = time.monotonic()
        self.sigterm_received = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StepModule)
        self.last_save_time = time.monotonic()

        def prepare_folder() -> None:
            if not trainer.is_global_zero:
                return
            self.out.mkdir(parents=True, exist_ok=True)
            kind = "fit_image" if "sources" in self.recipe else "training"
            record = {"kind": kind, "processes": trainer.world_size, "started": time.time(), "recipe": self.recipe}
            write_json(self.out / RUN_FILE, record)
            self.remove_stale_files()

        if is_single_process():
            prepare_folder()
        else:
            run_on_all_processes(prepare_folder)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm)
        if self.resume_point is None:
            return
        point = self.resume_point
        if trainer.is_global_zero:
            module.events.remove_after(point.completed_steps)
        restore(point.folder, module, trainer.optimizers)
        module.completed_steps, module.batches_seen = point.completed_steps, point.batches_seen
        module.reorder_fused_rows(point.tensor_parallel_size, self.run.tensor_parallel_size, trainer.optimizers)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                rows: Any = point.log_rows
                logger.experiment.metrics.extend({**row, "step": int(row["step"])} for row in rows)
                logger.save()

    def on_sigterm(self, *_: object) -> None:
        """Note SIGTERM, on whichever process: all write a checkpoint at the end of the step, and exit."""
        self.sigterm_received = True

    def remove_stale_files(self) -> None:
        """Remove partial checkpoints, and those after the one that the run is resumed from.

        The checkpoints of an earlier run that is not resumed are moved aside.
        """
        for partial in (self.out / CHECKPOINTS_FOLDER).glob(".step-*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        if self.resume_point is None:
            (self.out / EVENTS_FILE).unlink(missing_ok=True)
            if checkpoint_folders(self.out):
                aside = self.out / f"{CHECKPOINTS_FOLDER}.before"
                shutil.rmtree(aside, ignore_errors=True)
                (self.out / CHECKPOINTS_FOLDER).rename(aside)
            return
        for folder in checkpoint_folders(self.out):
            if folder.name > self.resume_point.folder.name:  # it was incomplete
                shutil.rmtree(folder, ignore_errors=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, StepModule)
        if module.guard.needs_rollback:
            self.roll_back(trainer, module)
            return
        step = module.current_step  # callbacks run before the module counts the step
        if step >= self.run.max_steps:  # the result follows
            return
        save_every, minutes = self.run.save_every_n_steps, self.run.save_every_n_minutes
        is_due = bool(minutes) and time.monotonic() - self.last_save_time > 60 * minutes
        is_due, is_terminated = self.agree(trainer, is_due)
        is_due |= bool(save_every) and step % save_every == 0
        if (is_due or is_terminated) and not module.guard.consecutive_skips:  # not where a rollback may follow
            module.guard.rollbacks = 0
            self.save(trainer, module, step)
            self.last_save_time = time.monotonic()
        if is_terminated:
            raise SystemExit(128 + signal.SIGTERM)

    def agree(self, trainer: L.Trainer, is_due: bool) -> tuple[bool, bool]:
        """Return (whether a checkpoint is due by the first process's clock, whether any process received SIGTERM)."""
        flags = torch.tensor([is_due and trainer.is_global_zero, self.sigterm_received]).int()
        flags = flags.to(trainer.strategy.root_device)
        if not is_single_process():
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def roll_back(self, trainer: L.Trainer, module: StepModule) -> None:
        """Restore the latest checkpoint and continue with later batches. Raise `BadInput` where there is none."""
        latest = trainer.strategy.broadcast(latest_checkpoint(self.out) if trainer.is_global_zero else None)
        guard = module.guard
        summary = f"{guard.consecutive_skips} steps in a row were skipped"
        if latest is None or guard.rollbacks >= MAX_ROLLBACKS:
            reason = "there is no checkpoint" if latest is None else f"{MAX_ROLLBACKS} rollbacks did not help"
            raise BadInput(
                f"{summary} until step {module.current_step}, and {reason}",
                where=self.run.out,
                remedy="lower optimizer.lr, or look at the data named above",
            )
        folder, description = latest
        step = description["completed_steps"]
        module.events.add(module.current_step, "rollback", f"{summary}: on from step {step} with later batches")
        skipped_steps, rollbacks = guard.skipped_steps, guard.rollbacks
        restore(folder, module, trainer.optimizers)
        before, now = description["tensor_parallel_size"], self.run.tensor_parallel_size
        module.reorder_fused_rows(before, now, trainer.optimizers)
        guard.skipped_steps, guard.rollbacks = skipped_steps, rollbacks
        guard.rolled_back()
        module.completed_steps = step - 1  # the module counts this batch as a step

    # --- writing ---

    def save(self, trainer: L.Trainer, module: StepModule, step: int) -> None:
        """Write the checkpoint after `step` steps, then remove all but the last `run.save_total_limit`.

        Raises `BadInput` where the disk is full; earlier checkpoints stay.
        """
        folder = self.out / CHECKPOINTS_FOLDER
        target = folder / f"step-{step:08}"
        tensors = tensors_to_save(module, trainer.optimizers)
        if is_single_process():
            with atomic_folder(target) as partial:
                self.check_disk_space(tensors)
                write_tensors(partial, tensors)
                self.write_description(partial, trainer, module, step)
            self.remove_old_checkpoints(trainer)
            return
        # All processes write to one folder, which the first one creates, and renames when all are done.
        partial = folder / f".step-{step:08}.partial-all"

        def create_folder() -> None:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def complete() -> None:
            if trainer.is_global_zero:
                self.write_description(partial, trainer, module, step)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                self.remove_old_checkpoints(trainer)

        try:
            run_on_all_processes(create_folder)
            run_on_all_processes(lambda: self.check_disk_space(tensors))  # before any process waits for another's writing
            run_on_all_processes(lambda: write_tensors(partial, tensors))
            run_on_all_processes(complete)
        except BadInput as error:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise BadInput(error.reason, where=folder, remedy="free some space; earlier checkpoints are kept") from None

    def check_disk_space(self, tensors: dict[str, Tensor]) -> None:
        """Raise `BadInput` where this process's shard does not fit on the disk, before anything is written."""
        shards = [value.to_local() if isinstance(value, DTensor) else value for value in tensors.values()]
        needed, free = sum(shard.numel() * shard.element_size() for shard in shards), shutil.disk_usage(self.out).free
        if needed > free:
            raise BadInput(
                f"a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                where=self.out / CHECKPOINTS_FOLDER,
                remedy=f"free some space, then --resume; the last {self.run.save_total_limit} checkpoints are kept",
            )

    def write_description(self, folder: Path, trainer: L.Trainer, module: StepModule, step: int) -> None:
        description = {
            "completed_steps": step,
            "batches_seen": module.batches_seen + 1,
            "tensor_parallel_size": self.run.tensor_parallel_size,
            "processes": trainer.world_size,
            "sha256": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
            "recipe": self.recipe,
        }
        write_json(folder / DESCRIPTION_FILE, description)

    def remove_old_checkpoints(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        for folder in checkpoint_folders(self.out)[self.run.save_total_limit :]:
            shutil.rmtree(folder, ignore_errors=True)
