"""What one sees of a run while it trains: one line."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.live import Live
from rich.text import Text

from chameleon.train.steps import StepModule

QUIET = 30.0  # seconds between two lines where there is no terminal
LIVELY = 0.25  # seconds between two changes of the line on a terminal
SHOWN = {
    "train/loss": "loss",
    "train/text_loss": "text",
    "train/image_loss": "image",
    "train/psnr": "PSNR",
    "train/usage": "codes used",
    "validation/text_loss": "validation text",
    "validation/image_loss": "validation image",
    "validation/psnr": "validation PSNR",
}


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class ProgressLine(Callback):
    """Step, losses, speed, time left and the last alarm: a line that changes on a terminal, else one now and then."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self.shown = 0.0
        self.times: deque[tuple[int, float]] = deque(maxlen=50)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4)
            self.live.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, StepModule)
        if not trainer.is_global_zero:
            return
        now, done = time.monotonic(), module.done + 1
        self.times.append((done, now))
        if now - self.shown < (LIVELY if self.live else QUIET) and done < self.steps:
            return
        self.shown = now
        line = self.line(done, module, trainer)
        if self.live:
            self.live.update(Text(line))
        else:
            self.console.print(line, soft_wrap=True, highlight=False)

    def line(self, done: int, module: StepModule, trainer: L.Trainer) -> str:
        parts = [f"step {done:,} of {self.steps:,}"]
        figures = trainer.callback_metrics
        shown = {name: float(figures[key]) for key, name in SHOWN.items() if key in figures}
        parts += [f"{name} {value:.3f}" for name, value in shown.items() if not math.isnan(value)]
        if "speed/tokens_per_second" in figures:
            parts.append(f"{float(figures['speed/tokens_per_second']):,.0f} tokens/s")
        (first, began), (last, now) = self.times[0], self.times[-1]
        if last > first:
            parts.append(f"{clock((now - began) / (last - first) * (self.steps - done))} left")
        if module.guard.skipped:
            parts.append(f"{module.guard.skipped} left out")
        if module.events.latest:
            parts.append(module.events.latest)
        return ", ".join(parts)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
