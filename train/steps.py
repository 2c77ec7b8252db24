"""What modules share that train by hand: a count of steps, random numbers of a step, what is worth telling."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from chameleon.data.mixture import splitmix
from chameleon.files import EVENTS, read_events
from chameleon.train.recipe import RunConfig
from chameleon.train.stability import Guard, StabilityConfig

SPARE = 2  # times the batches that a run needs, so that it may go back


class Events:
    """Things that happened to a run: a line each on stderr and in RUN/events.jsonl, by the first process alone."""

    def __init__(self, out: Path, *, speaks: bool = True) -> None:
        self.path, self.speaks = out / EVENTS, speaks
        self.latest: str | None = None
        """The last alarm, for the progress line."""

    def forget_from(self, step: int) -> None:
        """Leaves out what happened from a step on, since it will happen again."""
        if self.path.is_file():
            kept = [event for event in read_events(self.path) if event["step"] < step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
            partial.replace(self.path)

    def tell(self, step: int, kind: str, text: str) -> None:
        self.latest = f"{kind} at step {step}"
        if not self.speaks:
            return
        print(f"step {step}: {kind}: {text}", file=sys.stderr, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "kind": kind, "text": text}) + "\n")


class StepModule(L.LightningModule):
    """A module that takes its steps by hand and can go on from any of them.

    All it knows of its place are two counts: steps done, and batches seen, which are more once it has gone back. Both,
    and the seed, say which batch comes next and which random numbers go with it.
    """

    def __init__(self, run: RunConfig, stability: StabilityConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run_config = run
        self.guard = Guard(stability)
        self.events = Events(Path(run.out))
        self.done = 0
        """Steps that were done."""
        self.batches = 0
        """Batches that were seen; the next one has this number."""

    @property
    def parts(self) -> tuple[int, int]:
        """(which of how many parts of each batch this process sees)."""
        size = self.run_config.tensor_parallel
        return self.trainer.global_rank // size, self.trainer.world_size // size

    @property
    def is_logged(self) -> bool:
        """Whether the log has a row of the step that is being done."""
        return (self.done + 1) % self.run_config.log_every == 0

    def on_fit_start(self) -> None:
        self.events.speaks = self.trainer.is_global_zero

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(splitmix(self.run_config.seed, self.batches, self.parts[0]) >> 1)
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.done  # what log rows are numbered by

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.done += 1
        self.batches += 1
        if self.done >= self.run_config.steps:
            self.trainer.should_stop = True

    def on_all(self, values: Tensor) -> Tensor:
        """The sum of `values` over the parts of the batch."""
        if self.trainer.world_size == 1:
            return values
        return torch.as_tensor(self.all_gather(values)).sum(dim=0) / self.run_config.tensor_parallel

    def extras(self) -> dict[str, Tensor]:
        """Small tensors beside weights and optimisers that a checkpoint keeps."""
        return {f"guard.{name}": value for name, value in self.guard.state().items()}

    def restore_extras(self, extras: dict[str, Tensor]) -> None:
        self.guard.restore({name: extras[f"guard.{name}"] for name in ("norms", "counts")})

    def weights_kept(self) -> dict[str, Tensor]:
        """Parameters that learn, and buffers, by name: what checkpoints hold of the module."""
        named = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in named if not isinstance(value, nn.Parameter) or value.requires_grad}

    def reorder_rows(self, before: int, now: int, optimizers: list[torch.optim.Optimizer]) -> None:
        """Puts what was restored into the order of rows of another size of tensor parallel."""

    def sources_of(self, batch: int) -> str:
        """Where the samples of a batch lie, for a message about it; empty where that is not known."""
        return ""

    def leaves_out(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether this step is not to be taken; the same on all processes. Tells of it."""
        reason = self.guard.judge(*torch.stack((loss.detach().double(), norm.detach().double())).tolist())
        if reason is not None:
            self.events.tell(self.done, "step left out", f"{reason} {self.sources_of(self.batches)}".rstrip())
        return reason is not None
