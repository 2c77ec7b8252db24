"""A run of pretraining or tuning from its recipe to its bundle."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from chameleon.bundle import Bundle
from chameleon.data.mixture import Mixture
from chameleon.errors import BadInput
from chameleon.train.checkpoint import Checkpoints, find
from chameleon.train.language import LanguageModule, StepRows, TimedLoader, data_fingerprint, start
from chameleon.train.memory import check_memory
from chameleon.train.recipe import TrainRecipe, to_plain
from chameleon.train.samples import Samples
from chameleon.train.steps import SPARE
from chameleon.train.trainer import build_trainer, fit, is_on_gpus


def train(recipe: TrainRecipe) -> tuple[Bundle | None, dict[str, float]]:
    """Trains as the recipe says, saves a bundle to `run.out`/bundle, and returns it with the last logged figures.

    Of several processes only the first has the bundle; the others get None.
    """
    L.seed_everything(recipe.run.seed, verbose=False)
    plain = to_plain(recipe)
    resumed = find(recipe.run, plain) if recipe.run.resume else None
    if recipe.attention == "flex" and not is_on_gpus(recipe.run):
        raise BadInput("flex needs a GPU", where="recipe.attention", remedy="use auto")
    begun = start(recipe)
    context = recipe.context or begun.config.context
    if context > begun.config.context:
        raise BadInput(f"context {context} exceeds the model's {begun.config.context}", where="recipe.context")
    vocabulary = begun.tokenizer.vocabulary
    fixed = {"context": context, "vocabulary": vocabulary, "fingerprint": begun.tokenizer.fingerprint}
    mixture = Mixture(
        recipe.mixture,
        rows=recipe.rows,
        seed=recipe.run.seed,
        stages=recipe.stages,
        steps=recipe.run.steps,
        balance_modalities=recipe.balance_modalities,
        **fixed,  # type: ignore[arg-type]
    )
    module = LanguageModule(begun, recipe, mixture, context)
    callbacks: list[Callback] = [Checkpoints(recipe.run, plain, resumed)]
    callbacks += [Samples(recipe.samples)] if recipe.samples else []
    trainer = build_trainer(recipe.run, callbacks=callbacks)
    mixture.check_parts(trainer.world_size // recipe.run.tensor_parallel)
    check_memory(begun.config, recipe, context, trainer.world_size)
    first = resumed.batches if resumed else 0
    training = StepRows(mixture, SPARE * recipe.run.steps, first)
    training.rank, training.world = (
        place // recipe.run.tensor_parallel for place in (trainer.global_rank, trainer.world_size)
    )
    held_out, sources = None, mixture.sources
    if recipe.validation:
        rows = recipe.micro_rows or recipe.rows // training.world  # as many as one pass of training
        validation = Mixture(recipe.validation, rows=rows, seed=0, **fixed)  # type: ignore[arg-type]
        sources, module.sample_sources = sources + validation.sources, validation.sources
        count = max(1, sum(map(len, validation.sources)) // rows)
        held_out = DataLoader(StepRows(validation, count), batch_size=None)
    if recipe.verify:
        for shard in (shard for source in sources for shard in source.shards):
            shard.verify()
    loader = TimedLoader(DataLoader(training, batch_size=None, num_workers=recipe.workers))
    module.loader = loader
    figures = fit(trainer, module, loader, held_out, recipe.run)
    model = module.trained()
    bundle = None
    if model is not None:
        kept = {key: value for key, value in begun.provenance.items() if key not in ("version", "sha256")}
        stage = {"recipe": plain, "figures": figures, "data": data_fingerprint(mixture)}
        provenance = {**kept, "training": [*kept.get("training", []), stage]}
        bundle = Bundle(model, begun.tokenizer, module.prompting, provenance)
        bundle.save(Path(recipe.run.out) / "bundle")
    trainer.strategy.barrier()
    return bundle, figures
