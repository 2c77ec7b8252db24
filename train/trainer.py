"""The Lightning trainer that every run uses: loggers, progress, precision."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from chameleon.train.recipe import RunConfig


def build_trainer(run: RunConfig, callbacks: list[Callback] | None = None, **more: Any) -> L.Trainer:
    """A trainer for one pass over a loader that holds one batch a step. Logs CSV and TensorBoard under `run.out`."""
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*isinstance.treespec.*", ".*No device id.*"):
        warnings.filterwarnings("ignore", text)
    bar: list[Callback] = [RichProgressBar()] if run.progress else []
    return L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        precision=run.precision,  # type: ignore[arg-type]
        max_epochs=1,
        logger=[CSVLogger(run.out, name="", version="log"), TensorBoardLogger(run.out, name="", version="log")],
        log_every_n_steps=run.log_every,
        val_check_interval=min(run.validate_every, run.steps) or None,
        callbacks=[*bar, *(callbacks or [])],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=run.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.out,
        **more,
    )
