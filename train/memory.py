"""Whether a run fits into the memory of its devices, before it begins."""

from __future__ import annotations

import os

import torch

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.plan import RESERVED, Setup, make_plan
from chameleon.train.recipe import RunConfig, TrainRecipe
from chameleon.train.trainer import is_on_gpus, usable_precision

WORTH_A_LOOK = 0.05  # share of the memory that weights and optimiser take before anything else is reckoned


def memory_of(run: RunConfig, processes: int) -> float:
    """Bytes that one process may use: of a GPU, or its share of this machine's memory."""
    if is_on_gpus(run):
        return torch.cuda.get_device_properties(0).total_memory - RESERVED
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(1, processes // run.nodes)


def setup_of(recipe: TrainRecipe, context: int, processes: int) -> Setup:
    """What `plan` is asked for a recipe."""
    parts = processes // recipe.run.tensor_parallel
    return Setup(
        rows=recipe.micro_rows or max(1, recipe.rows // parts),
        context=context,
        precision=usable_precision(recipe.run),
        optimizer=recipe.optimizer.kind,
        sharding=recipe.run.sharding if processes > 1 else "none",
        checkpointing=recipe.checkpointing,
        devices=processes,
    )


def check_memory(config: ModelConfig, recipe: TrainRecipe, context: int, processes: int) -> None:
    """Raises `BadInput` where `chameleon plan` says that a step does not fit: by how much, and what to change.

    `run.force` goes on nevertheless. With `learn` other than all, gradients and optimiser are hardly any.
    """
    available = memory_of(recipe.run, processes)
    if recipe.run.force or 16.0 * config.parameters / processes < WORTH_A_LOOK * available:
        return
    setup = setup_of(recipe, context, processes)
    needed = make_plan(config, setup).training
    total = float(needed.total)
    if recipe.learn != "all":
        total -= needed.gradients + needed.optimizer
    split = recipe.run.tensor_parallel
    total -= needed.activations * 0.5 * (1 - 1 / split)  # heads and inner width are split, what lies between blocks is not
    ends = 16.0 * 2 * config.vocab_size * config.width  # embedding and head lie whole on each of those that split
    total += ends * (split - 1) / processes
    if total <= available:
        return
    changes = []
    if setup.rows > 1:
        changes.append(f"micro_rows={setup.rows // 2}")
    if recipe.checkpointing != "full":
        changes.append("checkpointing=full")
    if recipe.run.sharding != "fsdp" or processes == 1:
        changes.append("run.sharding=fsdp over more devices")
    if recipe.learn == "all":
        changes.append("learn=lora")
    raise BadInput(
        f"a step takes {total / 1e9:.1f} GB on a device, {(total - available) / 1e9:.1f} GB more than the "
        f"{available / 1e9:.1f} GB that it has",
        where="recipe",
        remedy=f"try {', '.join(changes) or 'more devices'}; --force goes on nevertheless",
    )
