"""Training of the VQGAN: two optimisers with manual optimisation, and the health of the codebook in the log."""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from PIL import Image as PILImage
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from chameleon.data.augmentation import change_style
from chameleon.data.picture_index import PictureSet, PictureSources
from chameleon.data.source_types import PictureEntry
from chameleon.data.webdataset import SkipHandler, raise_on_skip
from chameleon.errors import BadInput
from chameleon.evaluation.pictures import perplexity, psnr
from chameleon.tokenizers.fitting import fit_square
from chameleon.tokenizers.image import ImageTokenizer, affine_augment, load_picture, to_tensor
from chameleon.tokenizers.mixed import write_shapes
from chameleon.tokenizers.quantizer import PlainCodebook, build_quantizer
from chameleon.tokenizers.vq_loss import PatchDiscriminator, ShiftTolerantLPIPS, adaptive_weight, hinge_discriminator_loss
from chameleon.tokenizers.vqgan import VQGAN
from chameleon.train.checkpoint import CheckpointCallback
from chameleon.train.language_data import TimedLoader
from chameleon.train.optimizer import (
    build_optimizers,
    clip_factor,
    local_grad_square,
    local_grads,
    lr_at,
    scale_grads,
    set_lr,
    step_unless,
)
from chameleon.train.processes import on_first_process
from chameleon.train.recipe import FitImageRecipe
from chameleon.train.step_module import SPARE_BATCHES_FACTOR, StepDataset, StepModule
from chameleon.train.step_result import StepResult
from chameleon.train.trainer import build_trainer, fit, plain_recipe

MAX_READ_ATTEMPTS = 100
"""Pictures drawn for one row of a batch before the sources count as unreadable."""
CODEBOOK_INIT_BATCH_SIZE = 8
"""Pictures encoded at one time to initialise the codebook."""
CODEBOOK_INIT_PICTURES = 512
"""Pictures read for that at most."""
CODEBOOK_INIT_LATENTS = 32768
"""Latents that are enough to initialise a small codebook; a large one takes eight for each code."""
USAGE_SETTLES_AFTER_STEPS = 200
"""Steps after which the usage of the codebook is meaningful."""
MIN_GAIN_DB = 1.0
"""How much nearer a reconstruction must be than the mean of its batch's pictures, for the codes to tell something."""
USAGE_WINDOW = 16
"""Latents for each code over which uses are counted."""
MIN_RECENT_USES = 0.5
"""Decayed count of uses below which a code is not in use."""
VALIDATION_BATCH_SIZE = 64


class SkipReports:
    """Passes pictures that cannot be read to `on_skip`, each once, whichever process of a loader found them."""

    def __init__(self, on_skip: SkipHandler) -> None:
        self.on_skip = on_skip
        self.reported: set[str] = set()
        self.from_workers: Any = multiprocessing.Queue()

    def add(self, name: str, reason: str) -> None:
        """Report a picture: at once, or from a loader's process by the next `collect`."""
        if get_worker_info() is not None:
            self.from_workers.cancel_join_thread()  # the process may end before anybody has read them
            self.from_workers.put((name, reason))
        elif name not in self.reported:
            self.reported.add(name)
            self.on_skip(name, reason)

    def collect(self) -> None:
        """Report what the processes of a loader have found."""
        while not self.from_workers.empty():
            self.add(*self.from_workers.get())


class ImageBatchDataset(StepDataset):
    """Batch n is a pure function of (seed, n): each row draws a picture, and how it is changed."""

    def __init__(self, pictures: PictureSet | None, recipe: FitImageRecipe, on_skip: SkipHandler = raise_on_skip) -> None:
        """pictures: may be set later, before the first batch is read."""
        self.pictures, self.recipe, self.skips = pictures, recipe, SkipReports(on_skip)
        self.unreadable: set[str] = set()
        self.rank, self.world = 0, 1

    def __len__(self) -> int:
        return SPARE_BATCHES_FACTOR * self.recipe.run.max_steps

    def __getitem__(self, index: int) -> Tensor:
        return self.part(self.first_batch + index, self.rank, self.world)

    def part(self, batch: int, rank: int, world: int) -> Tensor:
        """Return one of `world` parts of a batch: float32 [global_batch_size / world, 3, R, R] in [-1, 1]."""
        self.check_divisible(world)
        pictures = []
        for row in range(rank, self.recipe.global_batch_size, world):
            rng = np.random.default_rng((self.recipe.run.seed, batch, row))
            pictures.append(self.draw(rng))
        return to_tensor(pictures)

    def check_divisible(self, world: int) -> None:
        """Raise `BadInput` where the global batch size is not divisible by `world`."""
        batch_size = self.recipe.global_batch_size
        if batch_size % world:
            raise BadInput(
                f"global_batch_size {batch_size} is not divisible by {world} devices",
                where="recipe.global_batch_size",
                remedy=f"{max(world, batch_size // world * world)} is",
            )

    def draw(self, rng: np.random.Generator) -> PILImage.Image:
        """Draw a picture; an unreadable one is reported once, and another one drawn instead."""
        assert self.pictures is not None
        for _ in range(MAX_READ_ATTEMPTS):
            entry = self.pictures.draw(rng)
            if entry.name in self.unreadable:
                continue
            try:
                picture = fit_square(load_picture(entry.source, entry.name), self.recipe.model.resolution)
            except BadInput as error:
                self.skips.add(entry.name, error.reason)
                self.unreadable.add(entry.name)
                continue
            return self.augment(picture, entry, rng)
        raise BadInput(f"none of {MAX_READ_ATTEMPTS} pictures could be read", where=", ".join(self.recipe.sources))

    def augment(self, picture: PILImage.Image, entry: PictureEntry, rng: np.random.Generator) -> PILImage.Image:
        recipe = self.recipe
        mirror = entry.may_mirror and bool(rng.random() < 0.5)
        zoom = rng.uniform(*recipe.scale)
        shift = (rng.uniform(-recipe.shift, recipe.shift), rng.uniform(-recipe.shift, recipe.shift))
        picture = affine_augment(picture, zoom, shift, mirror)
        if recipe.restyle and rng.random() < recipe.restyle:
            picture = change_style(picture, random.Random(int(rng.integers(2**32))), max_hue=180)
        return picture


class ImageValidationDataset(Dataset[tuple[Tensor, int]]):
    """The validation pictures in batches, of each of which every process has some; all have as many batches."""

    def __init__(self, resolution: int, on_skip: SkipHandler) -> None:
        self.pictures: PictureSet | None = None
        """Set before the first batch is read."""
        self.resolution, self.skips = resolution, SkipReports(on_skip)
        self.rank, self.world = 0, 1

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / (VALIDATION_BATCH_SIZE * self.world)) if self.pictures is not None else 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return float32 [B, 3, R, R] in [-1, 1], B ≥ 1, and how many of them count."""
        assert self.pictures is not None
        first, end = (n * VALIDATION_BATCH_SIZE * self.world for n in (index, index + 1))
        pictures = []
        for number in range(first + self.rank, min(end, len(self.pictures)), self.world):
            entry = self.pictures[number]
            try:
                pictures.append(fit_square(load_picture(entry.source, entry.name), self.resolution))
            except BadInput as error:
                self.skips.add(entry.name, error.reason)
        blank = PILImage.new("RGB", (self.resolution, self.resolution))
        return to_tensor(pictures or [blank]), len(pictures)


class ImageTokenizerModule(StepModule):
    """The VQGAN and, where the recipe asks for them, its discriminator and a moving average of its weights."""

    def __init__(self, recipe: FitImageRecipe, on_skip: SkipHandler = raise_on_skip) -> None:
        super().__init__(recipe.run, recipe.stability)
        self.recipe = recipe
        self.training_set: ImageBatchDataset = ImageBatchDataset(None, recipe, on_skip)
        self.validation_set = ImageValidationDataset(recipe.model.resolution, on_skip)
        model = recipe.model
        self.network = VQGAN(model, build_quantizer(recipe.codebook, *model.codebook_shape))
        loss = recipe.loss
        self.perceptual = ShiftTolerantLPIPS.pretrained() if loss.perceptual else None
        self.discriminator = (
            PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers) if loss.adversarial else None
        )
        if not 0 <= recipe.ema_decay < 1:
            raise BadInput(f"{recipe.ema_decay} is not in [0, 1)", where="recipe.ema_decay")
        self.ema = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay)).requires_grad_(False)
            if recipe.ema_decay
            else None
        )
        self.register_buffer("code_counts", torch.zeros(model.codebook_size))
        self.collapse_reported = False

    code_counts: Tensor
    """float32 [codebook_size]: counts of the codes' uses that decay by half over some `USAGE_WINDOW` latents a code."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.find_pictures()

    def find_pictures(self) -> None:
        """Open the pictures of training and validation; the first process indexes them. A collective operation."""
        recipe, folder = self.recipe, Path(self.recipe.run.out) / "pictures"
        for name, sources, dataset in (
            ("training", recipe.sources, self.training_set),
            ("validation", recipe.validation, self.validation_set),
        ):
            if sources and dataset.pictures is None:
                weight_field = recipe.weight_field if name == "training" else None
                found = PictureSources(sources, allow_paths=recipe.allow_paths, weight_field=weight_field)
                on_first_process(partial(found.make_index, folder / name, dataset.skips.on_skip, recipe.num_workers))
                dataset.pictures = found.open(folder / name)

    def on_train_start(self) -> None:
        if self.completed_steps:  # a checkpoint was restored
            return
        num_batches = max(1, -(-CODEBOOK_INIT_PICTURES // self.recipe.global_batch_size))
        torch.manual_seed(self.run_config.seed)  # the same on any number of processes, as are the pictures
        self.init_codebook(self.training_set.part(index, 0, 1) for index in range(num_batches))

    def checkpointed_tensors(self) -> dict[str, Tensor]:
        """Return all but the perceptual network, which is not trained; codebooks may be trained without gradients."""
        named = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in named if not name.startswith("perceptual.")}

    @property
    def final_network(self) -> VQGAN:
        """The network that is validated and saved."""
        network: Any = self.ema.module if self.ema is not None else self.network
        return network

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = build_optimizers(self.network, self.recipe.optimizer)
        if self.discriminator is not None:
            optimizers += build_optimizers(self.discriminator, self.recipe.discriminator)
        return optimizers

    @torch.no_grad()
    def init_codebook(self, batches: Iterable[Tensor]) -> None:
        """Initialise the codebook from the latents of `batches` (k-means, or the standard deviation, by its kind).

        Only as many batches are read as it takes.
        """
        codebook_size = self.recipe.model.codebook_size
        max_latents = min(32 * codebook_size, max(CODEBOOK_INIT_LATENTS, 8 * codebook_size))
        latents: list[Tensor] = []
        for pictures in (part for batch in batches for part in batch.split(CODEBOOK_INIT_BATCH_SIZE)):
            latent = self.network.latent(pictures.to(self.device))
            latents.append(rearrange(latent, "b c h w -> (b h w) c").float())
            if sum(map(len, latents)) >= max_latents:
                break
        flat = torch.cat(latents)
        if len(flat) < codebook_size:
            raise BadInput(
                f"{len(flat)} latents cannot initialise {codebook_size} codes",
                where="image tokenizer",
                remedy="raise global_batch_size or lower model.codebook_size",
            )
        order = torch.randperm(len(flat))[:max_latents].to(flat.device)
        self.network.quantize.init_from_latents(flat[order])

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, pictures: Tensor, batch_idx: int) -> None:
        """Forward, losses, backward, gradient norm, clipping, optimiser steps, log."""
        self.training_set.skips.collect()
        step, recipe, loss_config = self.completed_steps, self.recipe, self.recipe.loss
        max_steps = recipe.run.max_steps
        optimizers = self.optimizer_list()
        network_optimizers = optimizers[: len(optimizers) - (self.discriminator is not None)]
        lr = lr_at(step, max_steps, recipe.optimizer)
        metrics: dict[str, float | Tensor] = {}

        reconstruction, quantized = self.network(pictures)
        reconstruction = reconstruction.float()
        difference = reconstruction - pictures
        reconstruction_loss = loss_config.l1 * difference.abs().mean() + loss_config.l2 * difference.square().mean()
        if self.perceptual is not None:
            distance = self.perceptual(pictures, reconstruction).mean()
            reconstruction_loss = reconstruction_loss + loss_config.perceptual * distance
            metrics["train/st_lpips"] = distance
        loss = reconstruction_loss + loss_config.codebook * quantized.codebook_loss
        loss = loss + loss_config.commitment * quantized.commitment_loss
        is_adversarial = self.discriminator is not None and step >= loss_config.adversarial_start
        if is_adversarial:
            adversarial_loss, weight = self.adversarial_loss(reconstruction, reconstruction_loss)
            loss = loss + loss_config.adversarial * weight * adversarial_loss
            metrics |= {"train/adversarial": adversarial_loss, "train/adaptive_weight": weight}

        for optimizer in network_optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        mean_psnr = psnr(reconstruction.detach(), pictures).mean()
        psnr_of_mean = psnr(pictures.mean(dim=0, keepdim=True), pictures).mean()
        world_size = self.trainer.world_size
        means = torch.stack((loss.detach(), mean_psnr, mean_psnr - psnr_of_mean)).double() / world_size
        grad_square = local_grad_square(parameters, world_size).to(self.device)
        counts = torch.bincount(quantized.codes.flatten(), minlength=len(self.code_counts)).double()
        sums, requested = self.sum_over_processes(torch.cat((grad_square.unsqueeze(0), means, counts)))
        grad_norm, (mean_loss, mean_psnr, gain), counts = sums[0].sqrt(), sums[1:4], sums[4:]
        skip = self.decide_to_skip(mean_loss, grad_norm)
        scale_grads(parameters, clip_factor(grad_norm, recipe.optimizer.max_grad_norm))
        for optimizer in network_optimizers:
            set_lr(optimizer.optimizer, lr)
            step_unless(skip, optimizer)
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        if is_adversarial:
            metrics["train/discriminator"] = self.discriminator_step(
                optimizers[-1], pictures, reconstruction.detach(), skip
            )

        window = USAGE_WINDOW * len(self.code_counts)
        self.code_counts.mul_(torch.exp(-counts.sum() / window)).add_(counts)
        code_perplexity = perplexity(self.code_counts)
        self.record_step(skip, mean_loss, grad_norm, requested, code_perplexity / len(self.code_counts), gain)
        if self.is_logged_step:
            quantizer = self.network.quantize
            metrics |= {
                "train/loss": mean_loss,
                "train/psnr": mean_psnr,
                "train/psnr_gain": gain,
                "train/commitment": quantized.commitment_loss,
                "train/grad_norm": grad_norm,
                "train/codebook_usage": (self.code_counts >= MIN_RECENT_USES).float().mean(),
                "train/codebook_perplexity": code_perplexity,
                "train/revived_codes": quantizer.num_revived if isinstance(quantizer, PlainCodebook) else 0,
                "stability/skipped_steps": self.guard.skipped_steps,
                "lr": lr,
            }
            self.write_metrics(self.current_step, metrics)

    def adversarial_loss(self, reconstruction: Tensor, reconstruction_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adversarial loss and its adaptive weight, both scalars."""
        assert self.discriminator is not None and self.network.decoder is not None
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(reconstruction).mean()
        self.discriminator.requires_grad_(True)
        weight = torch.ones((), device=self.device)
        if self.recipe.loss.adaptive:
            weight = adaptive_weight(reconstruction_loss, loss, self.network.decoder.last_layer)
        return loss, weight

    def discriminator_step(self, optimizer: Any, pictures: Tensor, reconstruction: Tensor, skip: Tensor) -> Tensor:
        """Train the discriminator on one batch, unless `skip` is 1 or its gradient is not finite, and return its loss."""
        assert self.discriminator is not None
        recipe, start = self.recipe, self.recipe.loss.adversarial_start
        lr = lr_at(self.completed_steps - start, recipe.run.max_steps - start, recipe.discriminator)
        set_lr(optimizer.optimizer, lr)
        loss = hinge_discriminator_loss(self.discriminator(pictures), self.discriminator(reconstruction))
        optimizer.zero_grad()
        self.manual_backward(loss)
        parameters = list(self.discriminator.parameters())
        grad_norm = torch.nn.utils.get_total_norm(local_grads(parameters))
        scale_grads(parameters, clip_factor(grad_norm, recipe.discriminator.max_grad_norm))
        step_unless(torch.maximum(skip, (~grad_norm.isfinite()).float()), optimizer)
        return loss.detach()

    def check_result(self, result: StepResult) -> None:
        self.check_collapse(result.step, *result.values)

    def check_collapse(self, step: int, usage: float, gain_db: float) -> None:
        """Warn once where hardly any code is used any more, or where pictures come back no better than their mean.

        usage: perplexity of the codes / size of the codebook. gain_db: PSNR of the reconstructions above that of the
        batch's mean. Codes can be as frequent as each other and tell nothing: by position, or where the decoder ignores
        them.
        """
        if step <= USAGE_SETTLES_AFTER_STEPS or self.collapse_reported:
            return
        if usage < self.recipe.min_codebook_usage:
            sign = f"its perplexity is {usage:.1%} of its size"
        elif gain_db < MIN_GAIN_DB:
            sign = f"pictures come back {gain_db:.1f} dB nearer than their mean"
        else:
            return
        self.collapse_reported = True
        remedy = "lower the lr, or use codebook=moving_average"
        self.events.add(step, "alarm", f"the codebook collapses: {sign} ({remedy})")

    # --- validation and result -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.validation_counts = torch.zeros_like(self.code_counts)
        self.validation_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        """Sum of the PSNR of the pictures, and their number."""

    def validation_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
        pictures, count = batch
        reconstruction, quantized = self.final_network(pictures)
        codes = quantized.codes[:count].flatten()
        self.validation_counts += torch.bincount(codes, minlength=len(self.validation_counts))
        total = psnr(reconstruction.float().clamp(-1, 1), pictures)[:count].double().sum()
        self.validation_sums += torch.stack((total, torch.full_like(total, count)))

    def on_validation_epoch_end(self) -> None:
        counts, (total, number) = self.all_reduce_sum(self.validation_counts), self.all_reduce_sum(self.validation_sums)
        self.write_metrics(
            self.completed_steps,
            {
                "validation/psnr": total / number,
                "validation/codebook_usage": (counts > 0).float().mean(),
                "validation/codebook_perplexity": perplexity(counts),
            },
        )

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the trained tokenizer, with its codebook in the released format."""
        network = VQGAN(self.recipe.model)
        network.load_state_dict(self.final_network.released_state_dict())
        return ImageTokenizer(network)


def fit_image(recipe: FitImageRecipe, on_skip: SkipHandler = raise_on_skip) -> tuple[ImageTokenizer, dict[str, float]]:
    """Train an image tokenizer, save it to `run.out`, and return it with the latest metrics.

    Pictures that cannot be read are passed to `on_skip`.
    """
    if recipe.run.data_parallel != "ddp":
        raise BadInput("an image tokenizer is not sharded", where="run.data_parallel", remedy="use ddp")
    L.seed_everything(recipe.run.seed, verbose=False)
    recipe.optimizer.warn_of_warmup(recipe.run.max_steps)
    plain = plain_recipe(recipe)
    module = ImageTokenizerModule(recipe, on_skip)
    callbacks = [CheckpointCallback(recipe.run, plain)]
    trainer = build_trainer(recipe.run, has_unused_parameters=bool(recipe.loss.adversarial), callbacks=callbacks)
    module.training_set.check_divisible(trainer.world_size)
    for dataset in (module.training_set, module.validation_set):
        dataset.rank, dataset.world = trainer.global_rank, trainer.world_size
    loader = TimedLoader(module.training_set, recipe.num_workers)
    validation_loader = DataLoader(module.validation_set, batch_size=None) if recipe.validation else None
    metrics = fit(trainer, module, loader, validation_loader)
    module.training_set.skips.collect()
    tokenizer = module.image_tokenizer()
    if trainer.is_global_zero:
        write_shapes(Path(recipe.run.out), recipe.shapes)  # first: without it the tokenizers would be those of squares
        tokenizer.save(Path(recipe.run.out))
    trainer.strategy.barrier()
    return tokenizer, metrics
