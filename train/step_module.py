"""What training modules share: the step counters, random numbers of a step, events, and the log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import Dataset

from chameleon.data.mixture import splitmix64
from chameleon.files import EVENTS_FILE, read_events
from chameleon.train.recipe import RunConfig
from chameleon.train.stability import StabilityConfig, StepGuard
from chameleon.train.step_result import HostCopy, StepResult

REQUESTS = ("save", "stop", "fail")
"""What one process may ask of all: to write a checkpoint, to write one and end, to end since something failed."""
SPARE_BATCHES_FACTOR = 2
"""Loaders hold this many times the batches that a run needs, so that it can roll back."""


class EventLog:
    """Events of a run: alarms, skipped steps and rollbacks, one line each on stderr and in RUN/events.jsonl."""

    def __init__(self, out: Path, *, enabled: bool = True) -> None:
        """enabled: whether this process writes; one of several does."""
        self.path, self.enabled = out / EVENTS_FILE, enabled
        self.latest: str | None = None
        """The last event, for the progress line."""

    def remove_after(self, step: int) -> None:
        """Remove the events after a step, since the run continues from there."""
        if self.path.is_file():
            kept = [event for event in read_events(self.path) if event["step"] <= step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
            partial.replace(self.path)

    def add(self, step: int, kind: str, text: str) -> None:
        """Report an event."""
        self.latest = f"{kind} at step {step}"
        if not self.enabled:
            return
        print(f"step {step}: {kind}: {text}", file=sys.stderr, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "kind": kind, "text": text}) + "\n")


class StepDataset(Dataset[Any]):
    """A dataset whose item n is one process's part of batch `first_batch` + n."""

    first_batch: int = 0


class StepModule(L.LightningModule):
    """A Lightning module with manual optimisation that can continue from any step.

    Its position is two counters: completed steps, and batches seen, which are more after a rollback. Together with the
    seed they determine the next batch and its random numbers.

    A step never waits for its own result, logged steps apart: processes sum what they have to tell each other in one
    collective (`sum_over_processes`), the decision to skip the step stays on the device (`decide_to_skip`), and the host
    reads the result one step later (`record_step`).
    """

    def __init__(self, run: RunConfig, stability: StabilityConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run_config = run
        self.guard = StepGuard(stability)
        self.events = EventLog(Path(run.out))
        self.completed_steps = 0
        self.batches_seen = 0
        """Also the index of the next batch."""
        self.metrics: dict[str, float] = {}
        """The latest value of each metric."""
        self.requests = dict.fromkeys(REQUESTS, False)
        """What this process asks all of them to do; the next step's collective tells them."""
        self.granted = dict.fromkeys(REQUESTS, False)
        """What any process asked for, by the results that the host has read, and nobody has taken up."""
        self.training_set: StepDataset | None = None
        """What the loader reads, told where to begin once a checkpoint is restored."""
        self.unread: tuple[StepResult, HostCopy] | None = None
        """The result of the latest step, while it is on its way to the host."""

    @property
    def data_parallel_rank(self) -> int:
        """Index of the part of each batch that this process sees."""
        return self.trainer.global_rank // self.run_config.tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Number of parts that each batch is split into."""
        return self.trainer.world_size // self.run_config.tensor_parallel_size

    @property
    def current_step(self) -> int:
        """Number of the step in progress, from 1, as logs and events have it."""
        return self.completed_steps + 1

    @property
    def is_logged_step(self) -> bool:
        """Whether the metrics of the current step are logged: every n steps, and the last."""
        step = self.current_step
        return step % self.run_config.log_every_n_steps == 0 or step == self.run_config.max_steps

    @property
    def is_validated_step(self) -> bool:
        """Whether validation follows the completed steps: every n of the run, and the last."""
        every = self.run_config.validate_every_n_steps
        return self.completed_steps >= self.run_config.max_steps or (every > 0 and self.completed_steps % every == 0)

    def on_fit_start(self) -> None:
        self.events.enabled = self.trainer.is_global_zero

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(splitmix64(self.run_config.seed, self.batches_seen, self.trainer.global_rank) >> 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.completed_steps += 1
        self.batches_seen += 1
        if self.completed_steps >= self.run_config.max_steps:
            self.trainer.should_stop = True

    def optimizer_list(self) -> list[Any]:
        """Return Lightning's wrappers of the optimisers as a list."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    # --- the result of a step ----------------------------------------------------------------------------------------

    def sum_over_processes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (values summed over all processes, number of processes that make each request).

        values: float64 [N]. The one collective of a step beside those of parameters and gradients.
        """
        requested = torch.zeros(len(REQUESTS), dtype=values.dtype, device=values.device)
        for index, name in enumerate(REQUESTS):
            if self.requests[name]:
                requested[index], self.requests[name] = 1, False
        sums = torch.cat((requested, values))
        if self.trainer.world_size > 1:
            distributed.all_reduce(sums)
        return sums[len(REQUESTS) :], sums[: len(REQUESTS)]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the data-parallel processes. A collective operation."""
        if self.trainer.world_size > 1:
            distributed.all_reduce(values)
        return values / self.run_config.tensor_parallel_size

    def decide_to_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return 1.0 where the optimiser step is to be skipped, else 0.0: a float32 scalar, the same on all processes."""
        is_usual = loss.isfinite() & (grad_norm <= self.guard.limit(self.current_step))  # false for NaN
        return (~is_usual).float()

    def record_step(self, skip: Tensor, loss: Tensor, grad_norm: Tensor, requested: Tensor, *values: Tensor) -> StepResult:
        """Read the result of the step before this one; on logged steps this one's too.

        Returns this step's, whose numbers are there once it is read. values: further float64 scalars.
        """
        self.read_result()
        numbers = torch.stack([number.double() for number in (skip, loss, grad_norm, *requested, *values)])
        result = StepResult(self.current_step, self.batches_seen)
        self.unread = result, HostCopy(numbers)
        if self.is_logged_step:
            self.read_result()
        return result

    def read_result(self) -> None:
        """Wait for the result that is on its way to the host, if one is, and report what it says."""
        if self.unread is None:
            return
        result, copy = self.unread
        self.unread = None
        skip, result.loss, result.grad_norm, *rest = copy.read()
        requested, result.values = rest[: len(REQUESTS)], rest[len(REQUESTS) :]
        self.granted |= {name: True for name, processes in zip(REQUESTS, requested, strict=True) if processes}
        reason = self.guard.observe(result.step, result.loss, result.grad_norm, is_skipped=bool(skip))
        if reason is not None:
            text = f"{reason} {self.describe_batch(result.batch)}".rstrip()
            self.events.add(result.step, "skipped step", text)
        self.check_result(result)

    def take_granted(self) -> dict[str, bool]:
        """Return what was asked for since the last call."""
        granted, self.granted = self.granted, dict.fromkeys(REQUESTS, False)
        return granted

    def check_result(self, result: StepResult) -> None:
        """Report what a step's result is a sign of."""

    # --- the log -----------------------------------------------------------------------------------------------------

    def write_metrics(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Write the metrics of a step to all loggers. NaN marks a metric for which the batch has no tokens."""
        values = {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in metrics.items()}
        self.metrics |= values
        for logger in self.loggers:
            logger.log_metrics(values, step=step)

    def finite_metrics(self) -> dict[str, float]:
        """Return the latest value of each metric that is a finite number."""
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}

    def extra_state(self) -> dict[str, Tensor]:
        """Return small tensors beside weights and optimisers that a checkpoint stores."""
        return {f"guard.{name}": value for name, value in self.guard.state().items()}

    def load_extra_state(self, extra: dict[str, Tensor]) -> None:
        self.guard.load_state({name: extra[f"guard.{name}"] for name in ("steps", "grad_norms", "counts")})

    def checkpointed_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores of the module: trainable parameters, and buffers, by name."""
        named = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in named if not isinstance(value, nn.Parameter) or value.requires_grad}

    def reorder_fused_rows(self, before: int, now: int, optimizers: list[torch.optim.Optimizer]) -> None:
        """Reorder what was restored from a run with tensor_parallel_size `before` for one with `now`."""

    def describe_batch(self, batch_index: int) -> str:
        """Return where the samples of a batch are, for a message about it; empty where that is not known."""
        return ""
