"""The Lightning trainer that every run uses: loggers, progress, precision."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from chameleon.errors import BadInput
from chameleon.plan import fast_bfloat16
from chameleon.train.allocator import keep_memory
from chameleon.train.progress import ProgressLine
from chameleon.train.recipe import RunConfig


def validation_interval(run: RunConfig) -> int | None:
    """Steps between two validations; None where there is one at the end only."""
    return min(run.validate_every, run.steps) or None


def is_on_gpus(run: RunConfig) -> bool:
    """Whether the run wants GPUs, there or not."""
    return run.accelerator in ("gpu", "cuda") or (run.accelerator == "auto" and torch.cuda.is_available())


def usable_precision(run: RunConfig) -> str:
    """The recipe's precision; single precision where the processor that trains has no fast bfloat16."""
    if not is_on_gpus(run) and run.precision.startswith("bf16") and not fast_bfloat16():
        warnings.warn(f"this processor is slow in bfloat16: 32-true instead of {run.precision}", stacklevel=2)
        return "32-true"
    return run.precision


def low_dtype(run: RunConfig) -> torch.dtype | None:
    """The dtype that FSDP2 gathers parameters in: bfloat16 where the recipe mixes it in, else their own."""
    return torch.bfloat16 if usable_precision(run) == "bf16-mixed" else None


def device_count(run: RunConfig) -> int:
    """Devices on each node. Raises `BadInput` where the recipe wants more, or other, than there are."""
    there = torch.cuda.device_count() if is_on_gpus(run) else None
    if there == 0:
        raise BadInput("there is no GPU here", where="run.accelerator", remedy="give run.accelerator=cpu")
    if run.devices == "auto":
        return there or 1
    if not isinstance(run.devices, int) or run.devices < 1:
        raise BadInput(f"devices {run.devices!r} is neither auto nor a number of 1 or more", where="run.devices")
    if there is not None and run.devices > there:
        raise BadInput(
            f"the recipe wants {run.devices} GPUs, there {'is' if there == 1 else 'are'} {there}",
            where="run.devices",
            remedy=f"give run.devices={there}",
        )
    return run.devices


def strategy_of(run: RunConfig, parts_unused: bool) -> Any:
    """Lightning's strategy, or None for its own choice. Raises `BadInput` where the world does not divide."""
    world = device_count(run) * run.nodes
    if run.sharding == "fsdp":
        if run.tensor_parallel < 1 or world % run.tensor_parallel:
            raise BadInput(
                f"{world} devices do not divide by {run.tensor_parallel}",
                where="run.tensor_parallel",
                remedy="change it, or run.devices",
            )
        if usable_precision(run) not in ("bf16-mixed", "32-true", "bf16-true"):
            raise BadInput(f"{run.precision} cannot be sharded", where="run.precision", remedy="use bf16-mixed")
        return ModelParallelStrategy(
            data_parallel_size=world // run.tensor_parallel,
            tensor_parallel_size=run.tensor_parallel,
        )
    if run.tensor_parallel != 1:
        raise BadInput("tensor_parallel needs fsdp", where="run.tensor_parallel", remedy="set run.sharding=fsdp")
    if world == 1:
        return None
    return "ddp_find_unused_parameters_true" if parts_unused else "ddp"


def loggers(run: RunConfig) -> list[Logger]:
    """CSV and TensorBoard under `run.out`/log, and Weights & Biases where the recipe names a project."""
    found: list[Logger] = [
        CSVLogger(run.out, name="", version="log"),
        TensorBoardLogger(run.out, name="", version="log"),
    ]
    if run.wandb:
        try:
            found.append(WandbLogger(project=run.wandb, save_dir=run.out))
        except ModuleNotFoundError:
            raise BadInput(
                "wandb is not installed", where="run.wandb", remedy="pip install 'open-chameleon[wandb]'"
            ) from None
    return found


def build_trainer(
    run: RunConfig, *, parts_unused: bool = False, callbacks: Sequence[Callback] = (), **more: Any
) -> L.Trainer:
    """A trainer for one pass over a loader that holds one batch a step. Logs CSV and TensorBoard under `run.out`.

    `parts_unused`: a backward pass may leave out some parameters, which several processes must know of beforehand.
    """
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*isinstance.treespec.*", ".*No device id.*"):
        warnings.filterwarnings("ignore", text)
    if not is_on_gpus(run):
        keep_memory()
    if run.precision.startswith("16"):
        raise BadInput("float16 is for running models, not for training", where="run.precision", remedy="use bf16-mixed")
    if SLURMEnvironment.detect():  # checkpoints are our own, and so is going on from them
        more["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    precision, strategy = usable_precision(run), strategy_of(run, parts_unused)
    if strategy is not None:
        more["strategy"] = strategy
    if run.sharding == "fsdp" and precision == "bf16-mixed":
        precision = "32-true"  # FSDP2 does the mixing: see `low_dtype`
    return L.Trainer(
        accelerator=("cuda" if is_on_gpus(run) else "cpu") if run.accelerator == "auto" else run.accelerator,
        devices=device_count(run),
        num_nodes=run.nodes,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        logger=loggers(run),
        log_every_n_steps=run.log_every,
        val_check_interval=validation_interval(run),
        callbacks=[*callbacks, *([ProgressLine(run.steps)] if run.progress else [])],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.out,
        **more,
    )


def fit(
    trainer: L.Trainer, module: L.LightningModule, training: Any, validation: Any | None, run: RunConfig
) -> dict[str, float]:
    """Trains, and returns the last logged figures; those of validation are always of the trained weights.

    Raises `BadInput` where the memory is not enough; ends with 143 where SIGTERM ended the run.
    """
    try:
        trainer.fit(module, training, validation)
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except torch.OutOfMemoryError as error:
        told = str(error).split(". ")[0]
        raise BadInput(
            f"out of memory ({told})", where="recipe", remedy="lower micro_rows, set checkpointing=full, or shard over more"
        ) from None
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in figures.items() if math.isfinite(value)}
