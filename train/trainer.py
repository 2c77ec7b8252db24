"""The Lightning trainer that every run uses: loggers, progress, precision."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from chameleon.plan import fast_bfloat16
from chameleon.train.recipe import RunConfig


def validation_interval(run: RunConfig) -> int | None:
    """Steps between two validations; None where there is one at the end only."""
    return min(run.validate_every, run.steps) or None


def usable_precision(run: RunConfig) -> str:
    """The recipe's precision; single precision where the processor that trains has no fast bfloat16."""
    on_cpu = run.accelerator == "cpu" or (run.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and run.precision.startswith("bf16") and not fast_bfloat16():
        warnings.warn(f"this processor is slow in bfloat16: 32-true instead of {run.precision}", stacklevel=2)
        return "32-true"
    return run.precision


def build_trainer(
    run: RunConfig, *, parts_unused: bool = False, callbacks: Sequence[Callback] = (), **more: Any
) -> L.Trainer:
    """A trainer for one pass over a loader that holds one batch a step. Logs CSV and TensorBoard under `run.out`.

    `parts_unused`: a backward pass may leave out some parameters, which several processes must know of beforehand.
    """
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*isinstance.treespec.*", ".*No device id.*"):
        warnings.filterwarnings("ignore", text)
    bar = [RichProgressBar(console_kwargs={"stderr": True})] if run.progress else []
    devices = run.devices
    if devices == "auto" and run.accelerator in ("auto", "gpu", "cuda"):
        devices = max(1, torch.cuda.device_count())
    if parts_unused and devices not in ("auto", 1):
        more["strategy"] = "ddp_find_unused_parameters_true"
    return L.Trainer(
        accelerator=run.accelerator,
        devices=devices,
        precision=usable_precision(run),  # type: ignore[arg-type]
        max_epochs=1,
        logger=[CSVLogger(run.out, name="", version="log"), TensorBoardLogger(run.out, name="", version="log")],
        log_every_n_steps=run.log_every,
        val_check_interval=validation_interval(run),
        callbacks=[*bar, *callbacks],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=run.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.out,
        **more,
    )


def fit(
    trainer: L.Trainer, module: L.LightningModule, training: Any, validation: Any | None, run: RunConfig
) -> dict[str, float]:
    """Trains, and returns the last logged figures; those of validation are always of the trained weights."""
    trainer.fit(module, training, validation)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    interval = validation_interval(run)
    if validation is not None and interval and run.steps % interval:
        trainer.validate(module, validation, verbose=False)
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return figures
