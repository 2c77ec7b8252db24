"""A run of pretraining or fine-tuning, from its recipe to its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from chameleon.bundle import Bundle, with_stage
from chameleon.data.mixture import Mixture
from chameleon.errors import BadInput
from chameleon.train.checkpoint import CheckpointCallback
from chameleon.train.language_data import PackedBatchDataset, TimedLoader, ValidationDataset, data_fingerprint
from chameleon.train.language_module import LanguageModule
from chameleon.train.memory import check_memory
from chameleon.train.objective import AttentionKind
from chameleon.train.recipe import TrainRecipe
from chameleon.train.samples import SampleLogger
from chameleon.train.step_module import SPARE_BATCHES_FACTOR
from chameleon.train.trainer import build_trainer, fit, plain_recipe, uses_gpus
from chameleon.train.training_start import TrainingStart


def automatic_attention(recipe: TrainRecipe) -> AttentionKind:
    """Return the kind of attention that `auto` means."""
    is_recomputed, is_on_gpus = recipe.activation_checkpointing != "none", uses_gpus(recipe.run)
    if is_recomputed and (is_on_gpus or recipe.compile):  # what is recomputed must be the same operations
        return "dense"
    return "flex" if is_on_gpus else "documents"


def train(recipe: TrainRecipe) -> tuple[Bundle | None, dict[str, float]]:
    """Train as the recipe says, save a bundle to `run.out`/bundle, and return it with the latest metrics.

    Of several processes only the first one returns the bundle; the others return None.
    """
    L.seed_everything(recipe.run.seed, verbose=False)
    recipe.optimizer.warn_of_warmup(recipe.run.max_steps)
    plain = plain_recipe(recipe)
    callbacks: list[Callback] = [CheckpointCallback(recipe.run, plain)]
    if recipe.attention == "flex" and not uses_gpus(recipe.run):
        raise BadInput("flex needs a GPU", where="recipe.attention", remedy="use auto")
    if recipe.activation_checkpointing != "none" and recipe.attention == "flex":
        raise BadInput(
            "flex does not go with activation_checkpointing: what PyTorch recomputes has another order",
            where="recipe.attention",
            remedy="use auto",
        )
    if recipe.loss == "cut" and recipe.run.tensor_parallel_size > 1:
        raise BadInput(
            "cut does not go with tensor parallelism, which splits the vocabulary",
            where="recipe.loss",
            remedy="use chunked",
        )
    if recipe.trainable == "lora" and recipe.lora.dropout and recipe.run.tensor_parallel_size > 1:
        raise BadInput(
            "dropout of LoRA does not go with tensor parallelism: devices that share a matrix would drop other inputs",
            where="recipe.lora.dropout",
            remedy="set it to 0",
        )
    if recipe.attention == "auto":
        recipe.attention = automatic_attention(recipe)
    start = TrainingStart.from_recipe(recipe)
    context_length = recipe.context_length or start.config.context_length
    if context_length > start.config.context_length:
        raise BadInput(
            f"context_length {context_length} exceeds the model's {start.config.context_length}",
            where="recipe.context_length",
        )
    if context_length % recipe.run.tensor_parallel_size:
        raise BadInput(
            f"context_length {context_length} is not divisible by {recipe.run.tensor_parallel_size} devices, which share "
            "the tokens of a row",
            where="run.tensor_parallel_size",
        )
    shared: dict[str, Any] = {
        "context_length": context_length,
        "vocabulary": start.tokenizer.vocabulary,
        "fingerprint": start.tokenizer.fingerprint,
    }
    mixture = Mixture(
        recipe.mixture,
        global_batch_size=recipe.global_batch_size,
        seed=recipe.run.seed,
        stages=recipe.stages,
        max_steps=recipe.run.max_steps,
        balance_modalities=recipe.balance_modalities,
        **shared,
    )
    module = LanguageModule(start, recipe, mixture, context_length)
    callbacks += [SampleLogger(recipe.num_samples)] if recipe.num_samples else []
    trainer = build_trainer(recipe.run, callbacks=callbacks)
    rank, world = (n // recipe.run.tensor_parallel_size for n in (trainer.global_rank, trainer.world_size))
    mixture.check_divisible(world)
    check_memory(start.config, recipe, context_length, trainer.world_size)
    training_set = PackedBatchDataset(mixture, SPARE_BATCHES_FACTOR * recipe.run.max_steps, rank=rank, world=world)
    validation_loader, sources = None, mixture.sources
    if recipe.validation:
        batch_size = recipe.micro_batch_size or recipe.global_batch_size // world  # as in a forward pass of training
        validation = Mixture(recipe.validation, global_batch_size=batch_size, seed=0, **shared)
        sources, module.sample_sources = sources + validation.sources, validation.sources
        validation_set = ValidationDataset(validation, batch_size, rank=rank, world=world)
        validation_loader = DataLoader(validation_set, batch_size=None)
    if recipe.verify_shards:
        module.shards_to_verify = [shard for source in sources for shard in source.shards]
    module.training_set = training_set
    module.loader = TimedLoader(training_set, recipe.num_workers)
    metrics = fit(trainer, module, module.loader, validation_loader)
    model = module.full_model()
    bundle = None
    if model is not None:
        stage = {"recipe": plain, "figures": metrics, "data": data_fingerprint(mixture)}
        provenance = with_stage(start.provenance, stage)
        bundle = Bundle(model, start.tokenizer, module.prompting, provenance, start.generation)
        bundle.save(Path(recipe.run.out) / "bundle")
    trainer.strategy.barrier()
    return bundle, metrics
