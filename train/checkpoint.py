"""Checkpoints of a run, from which it goes on bit for bit: weights, optimisers' states, and two counts.

RUN/checkpoints/step-00001000/*.safetensors    each process's part of the tensors, in PyTorch's distributed format
RUN/checkpoints/step-00001000/checkpoint.json  the counts, the recipe, SHA-256 of each file

A checkpoint is written whole or not at all, and read by any number of processes, however they divide the model. The order
of the data and all random numbers are functions of the counts, so nothing of them is kept.
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
from chameleon.files import EVENTS, RECORD, checksum, read_json, write_json, written_whole
from chameleon.train.recipe import RunConfig
from chameleon.train.steps import StepModule

FOLDER, DESCRIPTION = "checkpoints", "checkpoint.json"
RETURNS = 3
"""How often a run goes back with no checkpoint between."""
HARMLESS = (
    "run.",
    "workers",
    "micro_rows",
    "verify",
    "compile",
    "checkpointing",
    "attention",
    "monitors",
    "samples",
    "validation",
)
"""What the recipe's keys begin with that may change when a run goes on, but for those below."""
STATES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What optimisers keep of a parameter."""
HARMFUL = ("run.steps", "run.seed", "run.precision")


@dataclass
class Resumed:
    """What a run goes on from."""

    folder: Path
    step: int
    """Steps that were done."""
    batches: int
    """Batches that were seen."""
    tensor_parallel: int
    """In whose order the rows of fused matrices lie."""
    rows: list[dict[str, str]]
    """Rows of the log until then."""


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted((out / FOLDER).glob("step-*"), reverse=True)


def verified(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises `BadInput` where it is not whole."""
    description = read_json(folder / DESCRIPTION)
    try:
        for name, wanted in description["sha256"].items():
            if checksum(folder / name) != wanted:
                raise BadInput("checksum does not fit", where=folder / name)
        return {key: description[key] for key in ("step", "batches", "tensor_parallel", "recipe", "sha256")}
    except (OSError, KeyError, AttributeError) as error:
        raise BadInput(f"not whole ({error})", where=folder) from None


def latest(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest whole checkpoint of a run with what it says of itself; those that are not whole are passed over."""
    for folder in folders(out):
        try:
            return folder, verified(folder)
        except BadInput as error:
            warnings.warn(f"{folder} is passed over: {error}", stacklevel=2)
    return None


def find(run: RunConfig, recipe: dict[str, Any]) -> Resumed | None:
    """What the run in `run.out` goes on from: its latest whole checkpoint; None where there is none.

    Raises `BadInput` where the recipe has changed in a way that would make another run of it, unless `run.force`.
    """
    out = Path(run.out)
    found = latest(out)
    if found is None:
        if folders(out) and not run.force:
            raise BadInput("no checkpoint is whole", where=out / FOLDER, remedy="--force begins anew and sets them aside")
        warnings.warn(f"no checkpoint in {out / FOLDER}: the run begins anew", stacklevel=2)
        return None
    folder, description = found
    compare(description["recipe"], recipe, folder, force=run.force)
    step = description["step"]
    return Resumed(folder, step, description["batches"], description["tensor_parallel"], logged(out, step))


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


def tensors_of(module: StepModule, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: `module.…`, `optimizer.PARAMETER.KEY`, `extra.…`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    found = {f"module.{name}": value.detach() for name, value in module.weights_kept().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            found |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return found | {f"extra.{name}": value for name, value in module.extras().items()}


def is_alone() -> bool:
    """Whether this process trains by itself."""
    return not (distributed.is_available() and distributed.is_initialized())


def write(place: Path, tensors: dict[str, Tensor]) -> None:
    """Writes this process's part of the tensors into a folder that all processes see."""
    # Copies, so that memory of a GPU is not needed twice, nor a view into a larger storage refused.
    tensors = {name: value if isinstance(value, DTensor) else value.to("cpu", copy=True) for name, value in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being alone
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True), no_dist=is_alone())
    except CheckpointException as error:  # it is no Exception
        raise OSError("; ".join(map(str, error.failures.values())) or str(error)) from None


def read(folder: Path, module: StepModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restores module and optimisers from a checkpoint, each process its own part. Raises `BadInput` for another shape."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {f"module.{name}": value.detach() for name, value in module.weights_kept().items()}
    for name, target in targets.items():
        if name not in stored or stored[name].size != target.shape:  # type: ignore[union-attr]
            found = list(stored[name].size) if name in stored else "nothing"  # type: ignore[union-attr]
            raise BadInput(f"{name} is {found} there, here {list(target.shape)}", where=folder)
    for optimizer in optimizers:
        optimizer.state.clear()  # before as much is read again
    named = dict(module.named_parameters())
    places = {}
    for name, about in stored.items():
        if name in targets:
            continue
        owner = named.get(name.removeprefix("optimizer.").rpartition(".")[0]) if name.startswith("optimizer.") else None
        size, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
        if owner is not None and size == owner.shape:
            targets[name] = torch.zeros_like(owner, dtype=dtype)
        else:
            targets[name] = torch.zeros(size, dtype=dtype)
        if owner is not None:
            places[name] = owner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(targets, storage_reader=reader, no_dist=is_alone())
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in places.items():
        states.setdefault(parameter, {})[name.rpartition(".")[2]] = targets[name]
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = states.get(parameter, {})
            if set(state) == STATES[type(optimizer)]:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
            elif state:
                warnings.warn(f"{folder} is of another optimizer, whose state is left behind", stacklevel=2)
    module.restore_extras({n.removeprefix("extra."): v for n, v in targets.items() if n.startswith("extra.")})


def all_agree(act: Callable[[], None]) -> None:
    """Does something on every process. Raises `BadInput` on all of them where it fails on one."""
    problem: str | None = None
    try:
        act()
    except (BadInput, OSError) as error:
        problem = str(error)
    problems: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    told = next((text for text in problems if text), None)
    if told is not None:
        raise BadInput(told, where=FOLDER)


class Checkpoints(Callback):
    """Writes checkpoints while a run trains, restores the one that it goes on from, and goes back where it must."""

    def __init__(self, run: RunConfig, recipe: dict[str, Any], resumed: Resumed | None) -> None:
        if run.keep < 1:
            raise BadInput(f"keep is {run.keep}, expected 1 or more", where="run.keep")
        self.run, self.recipe, self.resumed = run, recipe, resumed
        self.last = time.monotonic()
        self.terminated = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StepModule)
        self.last = time.monotonic()
        if trainer.is_global_zero:
            kind = "fit_image" if "sources" in self.recipe else "training"
            write_json(
                Path(self.run.out) / RECORD,
                {"kind": kind, "processes": trainer.world_size, "started": time.time(), "recipe": self.recipe},
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.terminate)
        if trainer.is_global_zero:
            self.clear_up(Path(self.run.out))
        if self.resumed is None:
            return
        if trainer.is_global_zero:
            module.events.forget_from(self.resumed.step)
        read(self.resumed.folder, module, trainer.optimizers)
        module.done, module.batches = self.resumed.step, self.resumed.batches
        module.reorder_rows(self.resumed.tensor_parallel, self.run.tensor_parallel, trainer.optimizers)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                rows: Any = self.resumed.rows
                logger.experiment.metrics.extend({**row, "step": int(row["step"])} for row in rows)
                logger.save()

    def terminate(self, *_: object) -> None:
        """SIGTERM, whichever process gets it: all write a checkpoint at the end of the step, and end."""
        self.terminated = True

    def clear_up(self, out: Path) -> None:
        """Removes what killed processes left half written, and what lies behind the checkpoint that the run goes on from.

        Checkpoints of an earlier run that this one does not go on from are set aside.
        """
        for left in (out / FOLDER).glob(".step-*.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        if self.resumed is None:
            (out / EVENTS).unlink(missing_ok=True)
            if folders(out):
                aside = out / f"{FOLDER}.before"
                shutil.rmtree(aside, ignore_errors=True)
                (out / FOLDER).rename(aside)
            return
        for later in folders(out):
            if later.name > self.resumed.folder.name:  # it was passed over
                shutil.rmtree(later, ignore_errors=True)

    def any_process(self, trainer: L.Trainer, late: bool) -> tuple[bool, bool]:
        """(whether it is time for a checkpoint by the first process's clock, whether any process was told to end)."""
        flags = torch.tensor([late and trainer.is_global_zero, self.terminated], device=trainer.strategy.root_device).int()
        if not is_alone():
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, StepModule)
        if module.guard.gives_up:
            self.go_back(trainer, module)
            return
        done = module.done + 1  # callbacks are asked before the module counts
        if done >= self.run.steps or module.guard.in_a_row:  # what comes next is the result; or it may have to go back
            return
        every, minutes = self.run.checkpoint_every, self.run.checkpoint_minutes
        late = bool(minutes) and time.monotonic() - self.last > 60 * minutes
        late, ended = self.any_process(trainer, late)
        if (every and done % every == 0) or late or ended:
            module.guard.returns = 0
            self.save(trainer, module, done)
            self.last = time.monotonic()
        if ended:
            trainer._signal_connector.received_sigterm = True  # Lightning ends the run for it

    def go_back(self, trainer: L.Trainer, module: StepModule) -> None:
        """To the latest checkpoint, and on behind the batches that were seen. Raises `BadInput` where there is none."""
        found = trainer.strategy.broadcast(latest(Path(self.run.out)) if trainer.is_global_zero else None)
        told = f"{module.guard.in_a_row} steps in a row were left out"
        if found is None or module.guard.returns >= RETURNS:
            why = "there is no checkpoint to go back to" if found is None else f"{RETURNS} times it went back in vain"
            raise BadInput(
                f"{told} until step {module.done}, and {why}",
                where=self.run.out,
                remedy="lower optimizer.rate, or look at the data named above",
            )
        folder, description = found
        module.events.tell(module.done, "going back", f"{told}: on from step {description['step']} with later batches")
        kept = (module.guard.skipped, module.guard.returns)
        read(folder, module, trainer.optimizers)
        module.reorder_rows(description["tensor_parallel"], self.run.tensor_parallel, trainer.optimizers)
        module.guard.skipped, module.guard.returns = kept
        module.guard.went_back()
        module.done = description["step"] - 1  # the module counts this batch as one more

    def save(self, trainer: L.Trainer, module: StepModule, done: int) -> None:
        """Writes the checkpoint of `done` steps, then removes all but the last `run.keep`.

        Raises `BadInput` where the disk is full; the checkpoints before it stay.
        """
        out = Path(self.run.out)
        tensors = tensors_of(module, trainer.optimizers)
        if is_alone():
            with written_whole(out / FOLDER / f"step-{done:08}") as place:
                self.check_space(out, tensors)
                write(place, tensors)
                self.describe(place, trainer, module, done)
            self.tidy(out, trainer)
            return
        # Several processes write into one folder, which the first one makes and names when all are through.
        place = out / FOLDER / f".step-{done:08}.partial-all"
        if trainer.is_global_zero:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        trainer.strategy.barrier()
        try:
            all_agree(lambda: self.check_space(out, tensors))  # before any of them waits for the others' writing
            all_agree(lambda: write(place, tensors))
        except BadInput as error:
            if trainer.is_global_zero:
                shutil.rmtree(place, ignore_errors=True)
            raise BadInput(error.reason, where=out / FOLDER, remedy="make room; earlier ones are kept") from None
        if trainer.is_global_zero:
            self.describe(place, trainer, module, done)
            target = out / FOLDER / f"step-{done:08}"
            shutil.rmtree(target, ignore_errors=True)
            place.rename(target)
        self.tidy(out, trainer)
        trainer.strategy.barrier()

    def check_space(self, out: Path, tensors: dict[str, Tensor]) -> None:
        """Raises `BadInput` where this process's part has no room, before a byte is written."""
        parts = (value.to_local() if isinstance(value, DTensor) else value for value in tensors.values())
        needed, free = sum(part.numel() * part.element_size() for part in parts), shutil.disk_usage(out).free
        if needed > free:
            raise BadInput(
                f"a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                where=out / FOLDER,
                remedy=f"make room, then go on with --resume; the last {self.run.keep} checkpoints are kept",
            )

    def describe(self, place: Path, trainer: L.Trainer, module: StepModule, done: int) -> None:
        description = {
            "step": done,
            "batches": module.batches + 1,
            "tensor_parallel": self.run.tensor_parallel,
            "processes": trainer.world_size,
            "sha256": {path.name: checksum(path) for path in sorted(place.glob("*.safetensors"))},
            "recipe": self.recipe,
        }
        write_json(place / DESCRIPTION, description)

    def tidy(self, out: Path, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        for old in folders(out)[self.run.keep :]:
            shutil.rmtree(old, ignore_errors=True)
