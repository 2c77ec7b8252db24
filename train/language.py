"""Training of the Transformer under Lightning, for pretraining and for tuning alike.

One step sees the whole batch of rows: its loss is normalised by the batch's own count of weighted ids over all devices,
then micro-batches add up their gradients. What differs between the two verbs is the recipe, nothing here.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chameleon.bundle import Bundle
from chameleon.data.mixture import Mixture, Rows
from chameleon.errors import BadInput
from chameleon.model.config import named_size
from chameleon.model.loss import TokenLoss, chunked_cross_entropy
from chameleon.model.transformer import Transformer, packed_mask
from chameleon.plan import flops_per_token, matmul_peak
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.checkpoint import Checkpoints, find
from chameleon.train.codebook_rows import add_codebook_rows, fold_codebook_rows
from chameleon.train.optimizer import build_optimizers, rate_at, set_rate
from chameleon.train.recipe import FinetuneRecipe, TrainRecipe, to_plain
from chameleon.train.trainer import build_trainer, fit
from chameleon.vocabulary import Modality, Vocabulary


class StepRows(Dataset[Rows]):
    """Item s is the batch of step first + s for one device."""

    def __init__(self, mixture: Mixture, steps: int, first: int = 0) -> None:
        self.mixture, self.steps, self.first = mixture, steps, first
        self.rank, self.world = 0, 1

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, step: int) -> Rows:
        return self.mixture.batch(self.first + step, self.rank, self.world)


class TimedLoader:
    """A loader that knows how long it was waited for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.waited = 0.0
        """Seconds, in all."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch


class LanguageModule(L.LightningModule):
    """The Transformer with its loss, optimiser and monitors."""

    def __init__(self, model: Transformer, vocabulary: Vocabulary, recipe: TrainRecipe, context: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.vocabulary, self.recipe = model, vocabulary, recipe
        self.flops = flops_per_token(model.config, context)
        self.peak = 0.0
        self.output_norm: Tensor | None = None
        self.loader: TimedLoader | None = None
        """What training reads from, for the share of time that it waits."""
        self.marks = (0.0, 0.0)
        self.first = 0
        """Steps that were done before this module trains."""
        model.blocks[-1].register_forward_hook(self.watch_output)
        if recipe.compile:
            for block in model.blocks:
                block.compile()

    def watch_output(self, block: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """Mean norm of the last block's output: its growth foretells divergence (arXiv 2405.09818, fig. 5a)."""
        self.output_norm = output.detach().float().norm(dim=-1).mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.recipe.optimizer)

    def on_fit_start(self) -> None:
        self.peak = matmul_peak(self.device)
        self.marks = (time.perf_counter(), self.loader.waited if self.loader else 0.0)

    def token_loss(self, rows: Rows, weights: Tensor) -> TokenLoss:
        """Sum of the weighted losses of rows; weights [B, T] carry the normalisation."""
        hidden = self.model(rows.ids, rows.positions, packed_mask(rows.document_ids))
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.model.head.weight,
            rows.targets.flatten(),
            weights.flatten(),
            z_loss=self.recipe.z_loss,
        )

    def weights(self, rows: Rows, modality: Tensor) -> Tensor:
        """Weights [B, T] with image codes at `image_weight`."""
        return torch.where(modality == Modality.IMAGE, rows.weights * self.recipe.image_weight, rows.weights)

    def training_step(self, rows: Rows, number: int) -> None:
        started, step = time.perf_counter(), self.first + number
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        rate = rate_at(step, self.recipe.run.steps, self.recipe.optimizer)
        modality = self.vocabulary.modality(rows.targets)
        weights = self.weights(rows, modality)
        total = weights.sum()
        if self.trainer.world_size > 1:
            total = torch.as_tensor(self.all_gather(total)).sum() / self.trainer.world_size  # DDP averages gradients
        weights = weights / total.clamp(min=1e-6)
        micro = self.recipe.micro_rows or len(rows.ids)
        loss, parts = torch.zeros((), device=self.device), []
        for start in range(0, len(rows.ids), micro):
            part = slice(start, start + micro)
            result = self.token_loss(Rows(*(column[part] for column in rows)), weights[part])
            self.manual_backward(result.loss)
            loss += result.loss.detach()
            parts.append(result)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip or math.inf)
        for optimizer in optimizers:
            set_rate(optimizer.optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        self.log("rate", rate)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the clock stops before the work does
        self.log_step(rows, modality, parts, loss, norm, time.perf_counter() - started)

    def log_step(
        self, rows: Rows, modality: Tensor, parts: list[TokenLoss], loss: Tensor, norm: Tensor, seconds: float
    ) -> None:
        nll, log_z = (torch.cat([getattr(part, name) for part in parts]) for name in ("nll", "log_z"))
        live = rows.weights.flatten() > 0
        assert self.output_norm is not None
        chosen = {kind: live & (modality.flatten() == kind) for kind in (Modality.TEXT, Modality.IMAGE)}
        world = self.trainer.world_size
        # Sums of this process, which those of all others are added to: what is logged is the step's own, whoever logs it.
        sums = [loss / world, log_z[live].sum(), live.sum(), self.output_norm / world]
        for kind in chosen:
            sums += [nll[chosen[kind]].sum(), chosen[kind].sum()]
        totals = torch.stack([value.detach().double() for value in sums])
        if world > 1:
            totals = torch.as_tensor(self.all_gather(totals)).sum(dim=0)
        loss, log_z_sum, count, output_norm = totals[:4]
        self.log("train/loss", loss.float(), prog_bar=True)
        for place, kind in enumerate(chosen):
            total, found = totals[4 + 2 * place : 6 + 2 * place]
            if found:
                self.log(f"train/{kind.name.lower()}_loss", (total / found).float(), prog_bar=True)
        tokens = rows.ids.numel() / seconds
        self.log_dict(
            {
                "train/log_z": (log_z_sum / count).float(),
                "train/gradient_norm": norm,
                "train/output_norm": output_norm.float(),
                "speed/tokens_per_second": tokens * world,
                "speed/share_of_matmul_peak": tokens * self.flops / self.peak,
            }
        )
        self.log("tokens/s", tokens, prog_bar=True, logger=False)
        if self.loader is not None:
            began, waited = self.marks
            self.log("speed/waiting_share", (self.loader.waited - waited) / (time.perf_counter() - began))

    def validation_step(self, rows: Rows, index: int) -> None:
        modality = self.vocabulary.modality(rows.targets)
        result = self.token_loss(rows, rows.weights)
        for kind in (Modality.TEXT, Modality.IMAGE):
            chosen = (rows.weights.flatten() > 0) & (modality.flatten() == kind)
            if chosen.any():
                name = f"validation/{kind.name.lower()}_loss"
                self.log(name, result.nll[chosen].mean(), prog_bar=True, batch_size=int(chosen.sum()))


def start(recipe: TrainRecipe) -> Bundle:
    """The bundle that training starts from: a new model with given tokenizers, or a bundle's own in float32."""
    if (recipe.bundle is None) == (recipe.tokenizers is None):
        raise BadInput("give either bundle or tokenizers", where="recipe")
    if recipe.bundle is not None:
        bundle = Bundle.load(recipe.bundle, dtype=torch.float32)
        dropout = recipe.model.get("dropout", bundle.model.config.dropout)
        if set(recipe.model) - {"dropout"}:
            raise BadInput("the shape of a bundle's model is fixed; only dropout can be set", where="recipe.model")
        model = Transformer(replace(bundle.model.config, dropout=dropout))
        model.load_state_dict(bundle.model.state_dict())
        return Bundle(model, bundle.tokenizer, bundle.prompting, bundle.provenance)
    assert recipe.tokenizers is not None
    if "vocab_size" in recipe.model:
        raise BadInput("the tokenizers give the number of ids; leave vocab_size out", where="recipe.model")
    config = named_size(recipe.size, **recipe.model)
    tokenizer = MixedTokenizer.load(Path(recipe.tokenizers))
    model = Transformer(replace(config, vocab_size=tokenizer.vocabulary.size))
    model.init_weights()
    return Bundle(model, tokenizer)


def train(recipe: TrainRecipe) -> tuple[Bundle, dict[str, float]]:
    """Trains as the recipe says, saves a bundle to `run.out`/bundle, and returns it with the last logged figures."""
    L.seed_everything(recipe.run.seed, verbose=False)
    plain = to_plain(recipe)
    resumed = find(recipe.run, plain) if recipe.run.resume else None
    bundle = start(recipe)
    context = recipe.context or bundle.model.config.context
    if context > bundle.model.config.context:
        raise BadInput(f"context {context} exceeds the model's {bundle.model.config.context}", where="recipe.context")
    fixed = {"context": context, "vocabulary": bundle.vocabulary, "fingerprint": bundle.tokenizer.fingerprint}
    mixture = Mixture(
        recipe.mixture,
        rows=recipe.rows,
        seed=recipe.run.seed,
        stages=recipe.stages,
        steps=recipe.run.steps,
        balance_modalities=recipe.balance_modalities,
        **fixed,  # type: ignore[arg-type]
    )
    if recipe.codebook_rows:
        add_codebook_rows(bundle.model, bundle.tokenizer.image.network.quantize.codebook(), bundle.vocabulary)
    if resumed is not None:
        bundle.model.load_state_dict(resumed.state["model"])
    module = LanguageModule(bundle.model, bundle.vocabulary, recipe, context)
    checkpoints = Checkpoints(recipe.run, plain, resumed)
    module.first = checkpoints.first
    trainer = build_trainer(recipe.run, callbacks=[checkpoints])
    training = StepRows(mixture, recipe.run.steps, checkpoints.first)
    training.rank, training.world = trainer.global_rank, trainer.world_size
    held_out, sources = None, mixture.sources
    if recipe.validation:
        validation = Mixture(recipe.validation, rows=recipe.rows, seed=0, **fixed)  # type: ignore[arg-type]
        sources = sources + validation.sources
        count = max(1, sum(map(len, validation.sources)) // recipe.rows)
        held_out = DataLoader(StepRows(validation, count), batch_size=None)
    if recipe.verify:
        for shard in (shard for source in sources for shard in source.shards):
            shard.verify()
    loader = TimedLoader(DataLoader(training, batch_size=None, num_workers=recipe.workers))
    module.loader = loader
    figures = fit(trainer, module, loader, held_out, recipe.run)
    fold_codebook_rows(bundle.model)
    bundle.prompting = "conversation" if isinstance(recipe, FinetuneRecipe) else "document"
    stage = {"recipe": plain, "figures": figures, "data": data_fingerprint(mixture)}
    kept = {key: value for key, value in bundle.provenance.items() if key not in ("version", "sha256")}
    bundle.provenance = {**kept, "training": [*kept.get("training", []), stage]}
    if trainer.is_global_zero:
        bundle.save(Path(recipe.run.out) / "bundle")
    trainer.strategy.barrier()
    bundle.model.requires_grad_(False).eval()
    return bundle, figures


def data_fingerprint(mixture: Mixture) -> dict[str, str]:
    """SHA-256 over the ids of each source's token shards, all variants, by the source's name."""
    return {
        source.config.called: hashlib.sha256(
            "".join(
                digest
                for shard in source.shards
                for name, digest in sorted(shard.description["sha256"].items())
                if name.startswith("ids")
            ).encode()
        ).hexdigest()
        for source in mixture.sources
    }
