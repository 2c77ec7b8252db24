"""Checks before a run whether a training step fits into the memory of its devices."""

from __future__ import annotations

import torch

from chameleon.device import total_memory
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.plan import RESERVED_BYTES, TrainingSetup, plan_training
from chameleon.train.recipe import RunConfig, TrainRecipe
from chameleon.train.trainer import effective_precision, uses_gpus

MIN_SHARE_TO_CHECK = 0.05
"""Models whose weights and optimiser take less than this share of the memory are not checked."""


def memory_per_process(run: RunConfig, num_processes: int) -> float:
    """Return the bytes that one process may use: a GPU's, or its share of the host's memory (cgroup limits included)."""
    if uses_gpus(run):
        return total_memory(torch.device("cuda", 0)) - RESERVED_BYTES
    return total_memory() / max(1, num_processes // run.num_nodes)


def setup_of(recipe: TrainRecipe, context_length: int, num_processes: int) -> TrainingSetup:
    """Return the setup of a recipe for `plan_training`."""
    rows = max(1, recipe.global_batch_size // (num_processes // recipe.run.tensor_parallel_size))
    micro_batch_size = recipe.micro_batch_size or rows
    return TrainingSetup(
        micro_batch_size=micro_batch_size,
        micro_batches=-(-rows // micro_batch_size),
        context_length=context_length,
        precision=effective_precision(recipe.run),
        optimizer=recipe.optimizer.kind,
        data_parallel=recipe.run.data_parallel if num_processes > 1 else "none",
        activation_checkpointing=recipe.activation_checkpointing,
        devices=num_processes,
        tensor_parallel_size=recipe.run.tensor_parallel_size,
        gradient_sync=recipe.gradient_sync,
        device_type="cuda" if uses_gpus(recipe.run) else "cpu",
    )


def check_memory(config: ModelConfig, recipe: TrainRecipe, context_length: int, num_processes: int) -> None:
    """Raise `BadInput` where, by `chameleon plan`, a step does not fit: by how much, and what to change.

    `run.force` skips the check. With `trainable` other than all, gradients and optimiser hardly count.
    """
    available = memory_per_process(recipe.run, num_processes)
    if recipe.run.force or 16.0 * config.parameters / num_processes < MIN_SHARE_TO_CHECK * available:
        return
    setup = setup_of(recipe, context_length, num_processes)
    needed = plan_training(config, setup).training
    total = float(needed.total)
    if recipe.trainable != "all":
        total -= needed.gradients + needed.optimizer
    if total <= available:
        return
    changes = []
    if setup.micro_batch_size > 1:
        changes.append(f"micro_batch_size={setup.micro_batch_size // 2}")
    if recipe.activation_checkpointing != "full":
        changes.append("activation_checkpointing=full")
    if recipe.run.data_parallel != "fsdp" or num_processes == 1:
        changes.append("run.data_parallel=fsdp over more devices")
    if recipe.trainable == "all":
        changes.append("trainable=lora")
    raise BadInput(
        f"a step takes {total / 1e9:.1f} GB on a device, {(total - available) / 1e9:.1f} GB more than the "
        f"{available / 1e9:.1f} GB that it has",
        where="recipe",
        remedy=f"try {', '.join(changes) or 'more devices'}; --force goes on nevertheless",
    )
