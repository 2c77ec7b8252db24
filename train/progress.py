"""The progress line of a training run."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from chameleon.progress import StatusLine, format_duration
from chameleon.train.step_module import StepModule

SHOWN_METRICS = {
    "train/loss": "loss",
    "train/text_loss": "text",
    "train/image_loss": "image",
    "train/psnr": "PSNR",
    "train/codebook_usage": "codes used",
    "train/codebook_perplexity": "perplexity",
    "validation/text_loss": "validation text",
    "validation/image_loss": "validation image",
    "validation/psnr": "validation PSNR",
}


class ProgressLine(Callback):
    """Shows step, losses, speed, time left and the last event."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.status = StatusLine()
        self.step_times: deque[tuple[int, float]] = deque(maxlen=50)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.status.enabled = trainer.is_global_zero

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, StepModule)
        step = module.current_step  # callbacks run before the module counts the step
        self.step_times.append((step, time.monotonic()))
        is_last = step >= self.max_steps
        if is_last or self.status.is_due():
            self.status.update(self.line(step, module), final=is_last)

    def line(self, step: int, module: StepModule) -> str:
        metrics = module.metrics
        parts = [f"step {step:,} of {self.max_steps:,}"]
        shown = {name: metrics[key] for key, name in SHOWN_METRICS.items() if key in metrics}
        parts += [f"{name} {value:.3f}" for name, value in shown.items() if not math.isnan(value)]
        if "speed/tokens_per_second" in metrics:
            parts.append(f"{metrics['speed/tokens_per_second']:,.0f} tokens/s")
        (first_step, first_time), (last_step, last_time) = self.step_times[0], self.step_times[-1]
        if last_step > first_step:
            seconds_left = (last_time - first_time) / (last_step - first_step) * (self.max_steps - step)
            parts.append(f"{format_duration(seconds_left)} left")
        if module.guard.skipped_steps:
            parts.append(f"{module.guard.skipped_steps} skipped")
        if module.events.latest:
            parts.append(module.events.latest)
        return ", ".join(parts)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.status.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.status.stop()
