"""Training of the VQGAN under Lightning: two optimisers by hand, codebook health in the log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from PIL import Image as PILImage
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from chameleon.data.sources import PictureEntry, read_pictures
from chameleon.data.webdataset import Skip, stop
from chameleon.errors import BadInput
from chameleon.evaluation.pictures import perplexity, psnr
from chameleon.tokenizers.image import ImageTokenizer, fit_square, load_picture, moved, to_tensor
from chameleon.tokenizers.quantizer import PlainCodebook, build_quantizer, mean_over_all, over_all
from chameleon.tokenizers.vq_loss import PatchDiscriminator, ShiftTolerantLPIPS, adaptive_weight, hinge_discriminator_loss
from chameleon.tokenizers.vqgan import VQGAN
from chameleon.train.checkpoint import Checkpoints, find
from chameleon.train.optimizer import build_optimizers, clip_gradients, gradient_norm, rate_at, set_rate
from chameleon.train.recipe import FitImageRecipe, to_plain
from chameleon.train.steps import SPARE, StepModule
from chameleon.train.trainer import build_trainer, fit

TRIES = 100  # pictures drawn for one place before a source counts as unreadable
SLICE = 8  # pictures encoded at one time to start the codebook
SETTLED = 200  # steps after which the codebook's usage says something


class StepPictures(Dataset[Tensor]):
    """Batch n: a pure function of (seed, n). Each row draws a group of pictures, then one of the group."""

    def __init__(
        self, entries: Sequence[PictureEntry], recipe: FitImageRecipe, on_skip: Skip = stop, first: int = 0
    ) -> None:
        """Item n is batch first + n."""
        groups: dict[str, list[PictureEntry]] = {}
        for entry in entries:
            groups.setdefault(entry.group, []).append(entry)
        self.groups = [groups[name] for name in sorted(groups)]
        self.recipe, self.on_skip, self.first = recipe, on_skip, first
        weights = [max(self.weight(entry) for entry in group) for group in self.groups]
        self.edges = np.cumsum(weights) if recipe.weight_field else None
        self.bad: set[str] = set()
        self.rank, self.world = 0, 1

    def weight(self, entry: PictureEntry) -> float:
        """How often a picture is drawn, relative to others. Raises `BadInput` where its record says no such number."""
        value = entry.fields.get(self.recipe.weight_field, 1.0) if self.recipe.weight_field else 1.0
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise BadInput(f"{self.recipe.weight_field} is {value!r}, expected a number above 0", where=entry.name)
        return float(value)

    def __len__(self) -> int:
        return SPARE * self.recipe.run.steps

    def __getitem__(self, number: int) -> Tensor:
        """float32 [batch / devices, 3, R, R] in [-1, 1]."""
        self.check_parts(self.world)
        pictures = []
        for row in range(self.rank, self.recipe.batch, self.world):
            stream = np.random.default_rng((self.recipe.run.seed, self.first + number, row))
            pictures.append(self.draw(stream))
        return to_tensor(pictures)

    def check_parts(self, world: int) -> None:
        """Raises `BadInput` where the batch does not divide by `world`."""
        if self.recipe.batch % world:
            near = max(world, self.recipe.batch // world * world)
            raise BadInput(
                f"batch {self.recipe.batch} does not divide by {world} devices", where="recipe.batch", remedy=f"{near} does"
            )

    def draw(self, stream: np.random.Generator) -> PILImage.Image:
        """A picture by the stream; one that cannot be read is reported once, and another drawn in its place."""
        for _ in range(TRIES):
            if self.edges is None:
                group = self.groups[stream.integers(len(self.groups))]
            else:
                place = np.searchsorted(self.edges, stream.random() * self.edges[-1], side="right")
                group = self.groups[min(int(place), len(self.groups) - 1)]
            entry = group[stream.integers(len(group))]
            if entry.name in self.bad:
                continue
            try:
                picture = fit_square(load_picture(entry.source, entry.name), self.recipe.model.resolution)
            except BadInput as error:
                self.on_skip(entry.name, error.reason)
                self.bad.add(entry.name)
                continue
            return self.augment(picture, entry, stream)
        raise BadInput(f"none of {TRIES} pictures drawn could be read", where=", ".join(self.recipe.sources))

    def augment(self, picture: PILImage.Image, entry: PictureEntry, stream: np.random.Generator) -> PILImage.Image:
        recipe = self.recipe
        mirror = entry.may_mirror and bool(stream.random() < 0.5)
        zoom = stream.uniform(*recipe.scale)
        shift = (stream.uniform(-recipe.shift, recipe.shift), stream.uniform(-recipe.shift, recipe.shift))
        return moved(picture, zoom, shift, mirror)


class ImageTokenizerModule(StepModule):
    """VQGAN and, where the recipe wants them, its discriminator and a moving average of its weights."""

    def __init__(self, recipe: FitImageRecipe) -> None:
        super().__init__(recipe.run, recipe.stability)
        self.recipe = recipe
        model = recipe.model
        self.network = VQGAN(model, build_quantizer(recipe.codebook, model.codebook_size, model.codebook_width))
        loss = recipe.loss
        self.perceptual = ShiftTolerantLPIPS.pretrained() if loss.perceptual else None
        self.discriminator = (
            PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers) if loss.adversarial else None
        )
        if not 0 <= recipe.ema < 1:
            raise BadInput(f"{recipe.ema} is not in [0, 1)", where="recipe.ema")
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).requires_grad_(False)
            if recipe.ema
            else None
        )
        self.register_buffer("counts", torch.zeros(model.codebook_size))
        self.collapsed = False
        self.first_pictures: list[Tensor] = []
        """Batches from whose latents the codebook starts; none where a run goes on."""

    counts: Tensor

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.first_pictures:
            torch.manual_seed(self.run_config.seed)  # the same on any number of processes
            self.start_codebook(self.first_pictures)
            self.first_pictures = []

    def weights_kept(self) -> dict[str, Tensor]:
        """All but the perceptual network, which does not learn; codebooks may learn without gradients."""
        named = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in named if not name.startswith("perceptual.")}

    @property
    def result(self) -> VQGAN:
        """The network that is validated and saved."""
        averaged: Any = self.average.module if self.average is not None else self.network
        return averaged

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = build_optimizers(self.network, self.recipe.optimizer)
        if self.discriminator is not None:
            optimizers += build_optimizers(self.discriminator, self.recipe.discriminator)
        return optimizers

    @torch.no_grad()
    def start_codebook(self, batches: Sequence[Tensor]) -> None:
        """Starts the codebook from the latents of `batches` (k-means, or the spread for a linear codebook)."""
        pictures = [part for batch in batches for part in batch.split(SLICE)]
        found: list[Tensor] = []
        most = 32 * self.recipe.model.codebook_size
        while pictures and sum(len(latents) for latents in found) < most:
            latents = self.network.latent(pictures.pop(0).to(self.device))
            found.append(rearrange(latents, "b c h w -> (b h w) c").float())
        latent = torch.cat(found)
        if len(latent) < self.recipe.model.codebook_size:
            raise BadInput(
                f"{len(latent)} latents cannot start {self.recipe.model.codebook_size} codes",
                where="image tokenizer",
                remedy="raise batch or lower model.codebook_size",
            )
        order = torch.randperm(len(latent))[:most].to(latent.device)
        self.network.quantize.start_from(latent[order])  # type: ignore[operator]

    def training_step(self, pictures: Tensor, index: int) -> None:
        step, weights = self.done, self.recipe.loss
        optimizers = self.optimizers()
        network_optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        set_rate(network_optimizer.optimizer, rate_at(step, self.recipe.run.steps, self.recipe.optimizer))
        drawn, quantized = self.network(pictures)
        drawn = drawn.float()
        difference = drawn - pictures
        reconstruction = weights.l1 * difference.abs().mean() + weights.l2 * difference.square().mean()
        if self.perceptual is not None:
            distance = self.perceptual(pictures, drawn).mean()
            reconstruction = reconstruction + weights.perceptual * distance
            self.log("train/st_lpips", distance)
        loss = reconstruction + weights.codebook * quantized.codebook_loss + weights.commitment * quantized.commitment_loss
        fights = self.discriminator is not None and step >= weights.adversarial_start
        if fights:
            assert self.discriminator is not None and self.network.decoder is not None
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(drawn).mean()
            self.discriminator.requires_grad_(True)
            balance = torch.ones((), device=self.device)
            if weights.adaptive:
                balance = adaptive_weight(reconstruction, adversarial, self.network.decoder.last_layer)
            loss = loss + weights.adversarial * balance * adversarial
            self.log_dict({"train/adversarial": adversarial, "train/adaptive_weight": balance})
        network_optimizer.zero_grad()
        self.manual_backward(loss)
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        norm = gradient_norm(learning)
        shown = mean_over_all(torch.stack((loss.detach().float(), psnr(drawn.detach(), pictures).mean())))
        taken = not self.leaves_out(shown[0], norm)
        if taken:
            clip_gradients(learning, self.recipe.optimizer.clip, norm)
            network_optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
        if taken and fights and self.discriminator is not None:
            begun = weights.adversarial_start
            rate = rate_at(step - begun, self.recipe.run.steps - begun, self.recipe.discriminator)
            set_rate(others[0].optimizer, rate)
            judged = hinge_discriminator_loss(self.discriminator(pictures), self.discriminator(drawn.detach()))
            others[0].zero_grad()
            self.manual_backward(judged)
            judging = list(self.discriminator.parameters())
            judged_norm = gradient_norm(judging)
            if judged_norm.isfinite():
                clip_gradients(judging, self.recipe.discriminator.clip, judged_norm)
                others[0].step()
            self.log("train/discriminator", judged)
        self.counts.mul_(0.99).add_(over_all(torch.bincount(quantized.codes.flatten(), minlength=len(self.counts))))
        usage, quantizer = (self.counts > 0.01).float().mean(), self.network.quantize
        self.watch_codebook(float(usage))
        self.log("train/loss", shown[0], prog_bar=True)
        self.log("train/psnr", shown[1], prog_bar=True)
        self.log_dict(
            {
                "train/commitment": quantized.commitment_loss,
                "train/gradient_norm": norm,
                "train/usage": usage,
                "train/revived": float(
                    quantizer.revived if isinstance(quantizer := self.network.quantize, PlainCodebook) else 0
                ),
                "stability/skipped": float(self.guard.skipped),
                "train/perplexity": perplexity(self.counts).float(),
                "rate": network_optimizer.optimizer.param_groups[0]["lr"],
            }
        )

    def watch_codebook(self, usage: float) -> None:
        """Warns once where hardly any code is in use any more."""
        if self.done >= SETTLED and usage < self.recipe.smallest_usage and not self.collapsed:
            self.collapsed = True
            self.events.tell(
                self.done,
                "alarm",
                f"{usage:.0%} of the codebook is in use: it collapses (lower the rate, or use codebook=moving_average)",
            )

    def on_validation_epoch_start(self) -> None:
        self.seen = torch.zeros_like(self.counts)

    def validation_step(self, pictures: Tensor, index: int) -> None:
        drawn, quantized = self.result(pictures)
        self.seen += torch.bincount(quantized.codes.flatten(), minlength=len(self.seen))
        self.log(
            "validation/psnr", psnr(drawn.float().clamp(-1, 1), pictures).mean(), prog_bar=True, batch_size=len(pictures)
        )

    def on_validation_epoch_end(self) -> None:
        self.log("validation/usage", (self.seen > 0).float().mean(), prog_bar=True)
        self.log("validation/perplexity", perplexity(self.seen).float())

    def tokenizer(self) -> ImageTokenizer:
        """The trained tokenizer, its codebook folded into the released format."""
        network = VQGAN(self.recipe.model)
        network.load_state_dict(self.result.released_state_dict())
        return ImageTokenizer(network)


def fit_image(recipe: FitImageRecipe, on_skip: Skip = stop) -> tuple[ImageTokenizer, dict[str, float]]:
    """Trains, saves to `run.out`, and returns the tokenizer and its last logged figures.

    What cannot be read goes to `on_skip` and is passed over.
    """
    if recipe.run.sharding != "ddp":
        raise BadInput("an image tokenizer is not sharded", where="run.sharding", remedy="use ddp")
    L.seed_everything(recipe.run.seed, verbose=False)
    plain = to_plain(recipe)
    resumed = find(recipe.run, plain) if recipe.run.resume else None
    module = ImageTokenizerModule(recipe)
    training = StepPictures(read_pictures(recipe.sources, on_skip), recipe, on_skip, resumed.batches if resumed else 0)
    if resumed is None:
        module.first_pictures = [training[step] for step in range(max(1, -(-512 // recipe.batch)))]
    checkpoints = Checkpoints(recipe.run, plain, resumed)
    trainer = build_trainer(recipe.run, parts_unused=bool(recipe.loss.adversarial), callbacks=[checkpoints])
    training.check_parts(trainer.world_size)
    training.rank, training.world = trainer.global_rank, trainer.world_size
    loader: DataLoader[Any] = DataLoader(training, batch_size=None, num_workers=recipe.workers)
    held_out = []
    if recipe.validation:
        side = recipe.model.resolution
        pictures = []
        for entry in read_pictures(recipe.validation, on_skip):
            try:
                pictures.append(fit_square(load_picture(entry.source, entry.name), side))
            except BadInput as error:
                on_skip(entry.name, error.reason)
        held_out = [to_tensor(pictures[start : start + 64]) for start in range(0, len(pictures), 64)]
    validation: DataLoader[Any] | None = DataLoader(held_out, batch_size=None) if held_out else None  # type: ignore[arg-type]
    figures = fit(trainer, module, loader, validation, recipe.run)
    tokenizer = module.tokenizer()
    if trainer.is_global_zero:
        tokenizer.save(Path(recipe.run.out))
    trainer.strategy.barrier()
    return tokenizer, figures
