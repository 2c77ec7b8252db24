"""The Lightning trainer that every run uses: devices, precision, strategy and loggers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from chameleon.allocator import keep_freed_memory
from chameleon.device import fast_bfloat16
from chameleon.errors import BadInput
from chameleon.train.process_watch import ProcessWatch
from chameleon.train.processes import is_lost_connection
from chameleon.train.progress import ProgressLine
from chameleon.train.recipe import RunConfig, to_plain
from chameleon.train.step_module import StepModule

IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*isinstance.treespec.*",
    ".*No device id.*",
    ".*You defined a `validation_step` but have no `val_dataloader`.*",
)


def uses_gpus(run: RunConfig) -> bool:
    """Return whether the run is to use GPUs, whether there are any or not."""
    return run.accelerator in ("gpu", "cuda") or (run.accelerator == "auto" and torch.cuda.is_available())


def effective_precision(run: RunConfig) -> str:
    """Return the precision that the run uses: the recipe's, or 32-true where bfloat16 is slow on this processor."""
    if not uses_gpus(run) and run.precision.startswith("bf16") and not fast_bfloat16():
        return "32-true"
    return run.precision


def plain_recipe(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain values, with the precision that is used here, for checkpoints and provenance."""
    plain = to_plain(recipe)
    plain["run"]["precision"] = effective_precision(recipe.run)
    return plain


def fsdp_param_dtype(run: RunConfig) -> torch.dtype | None:
    """Return the dtype in which FSDP2 gathers parameters: bfloat16 in mixed precision, else None, their own."""
    return torch.bfloat16 if effective_precision(run) == "bf16-mixed" else None


def device_count(run: RunConfig) -> int:
    """Return the number of devices on each node. Raise `BadInput` where the recipe asks for more than there are."""
    available = torch.cuda.device_count() if uses_gpus(run) else None
    if available == 0:
        raise BadInput("there is no GPU here", where="run.accelerator", remedy="set run.accelerator=cpu")
    if run.devices == "auto":
        return available or 1
    if not isinstance(run.devices, int) or run.devices < 1:
        raise BadInput(f"devices {run.devices!r} is neither auto nor a number of 1 or more", where="run.devices")
    if available is not None and run.devices > available:
        raise BadInput(
            f"the recipe asks for {run.devices} GPUs, there {'is' if available == 1 else 'are'} {available}",
            where="run.devices",
            remedy=f"set run.devices={available}",
        )
    return run.devices


def strategy_of(run: RunConfig, has_unused_parameters: bool) -> Any:
    """Return Lightning's strategy, or None for one device. Raise `BadInput` where the sizes do not divide."""
    world_size = device_count(run) * run.num_nodes
    if run.data_parallel == "fsdp":
        if run.tensor_parallel_size < 1 or world_size % run.tensor_parallel_size:
            raise BadInput(
                f"{world_size} devices are not divisible by {run.tensor_parallel_size}",
                where="run.tensor_parallel_size",
                remedy="change it, or run.devices",
            )
        if effective_precision(run) not in ("bf16-mixed", "32-true", "bf16-true"):
            raise BadInput(f"{run.precision} does not go with fsdp", where="run.precision", remedy="use bf16-mixed")
        return ModelParallelStrategy(
            data_parallel_size=world_size // run.tensor_parallel_size,
            tensor_parallel_size=run.tensor_parallel_size,
        )
    if run.tensor_parallel_size != 1:
        raise BadInput(
            "tensor parallelism needs fsdp", where="run.tensor_parallel_size", remedy="set run.data_parallel=fsdp"
        )
    if world_size == 1:
        return None
    return "ddp_find_unused_parameters_true" if has_unused_parameters else "ddp"


def build_loggers(run: RunConfig) -> list[Logger]:
    """Return loggers for CSV and TensorBoard under `run.out`/log, and Weights & Biases where a project is named."""
    loggers: list[Logger] = [
        CSVLogger(run.out, name="", version="log", flush_logs_every_n_steps=1),
        TensorBoardLogger(run.out, name="", version="log"),
    ]
    if run.wandb_project:
        try:
            loggers.append(WandbLogger(project=run.wandb_project, save_dir=run.out))
        except ModuleNotFoundError:
            raise BadInput(
                "wandb is not installed", where="run.wandb_project", remedy="pip install 'open-chameleon[wandb]'"
            ) from None
    return loggers


def build_trainer(run: RunConfig, *, has_unused_parameters: bool = False, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """Return a trainer for one pass over a loader that holds one batch for each step.

    has_unused_parameters: a backward pass may leave out some parameters, which DDP must know beforehand.
    """
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    if not uses_gpus(run):
        keep_freed_memory()
    if run.precision.startswith("16"):
        raise BadInput("float16 is for inference, not for training", where="run.precision", remedy="use bf16-mixed")
    options: dict[str, Any] = {}
    if SLURMEnvironment.detect():  # resuming is done from our own checkpoints
        options["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    precision, strategy = effective_precision(run), strategy_of(run, has_unused_parameters)
    if precision != run.precision:
        warnings.warn(f"bfloat16 is slow on this processor: {precision} instead of {run.precision}", stacklevel=2)
    if strategy is not None:
        options["strategy"] = strategy
    if run.data_parallel == "fsdp" and precision == "bf16-mixed":
        precision = "32-true"  # FSDP2 casts parameters itself, see `fsdp_param_dtype`
    trainer = L.Trainer(
        accelerator=("cuda" if uses_gpus(run) else "cpu") if run.accelerator == "auto" else run.accelerator,
        devices=device_count(run),
        num_nodes=run.num_nodes,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        log_every_n_steps=1,  # the module writes its metrics itself, see `StepModule.write_metrics`
        logger=build_loggers(run),
        callbacks=[ProcessWatch(), *callbacks, *([ProgressLine(run.max_steps)] if run.progress else [])],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.out,
        **options,
    )
    # Lightning would broadcast and wait in every step for what `StepModule.requests` tells with the step's result.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def fit(trainer: L.Trainer, module: StepModule, training_loader: Any, validation_loader: Any | None) -> dict[str, float]:
    """Train, and return the latest metrics; those of validation are of the final weights.

    Raises `BadInput` where memory runs out, and `SystemExit` with code 143 where SIGTERM ended the run.
    """
    # Lightning would count the steps of this process, and a run may have been resumed.
    loop: Any = trainer.fit_loop.epoch_loop
    loop._should_check_val_fx = lambda _: trainer.enable_validation and module.is_validated_step
    try:
        trainer.fit(module, training_loader, validation_loader)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise BadInput(
            f"out of memory ({reason})",
            where="recipe",
            remedy="lower micro_batch_size, set activation_checkpointing=full, or shard over more devices",
        ) from None
    except RuntimeError as error:
        watch = next((callback for callback in trainer.callbacks if isinstance(callback, ProcessWatch)), None)  # type: ignore[attr-defined]
        if watch is None or not is_lost_connection(error):
            raise
        raise watch.reason_for_lost_connection() from None
    return module.finite_metrics()
