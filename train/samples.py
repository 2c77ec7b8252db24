"""What the model makes while it trains, at each validation."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.document import Document
from chameleon.generation.chameleon import Chameleon
from chameleon.train.language import LanguageModule
from chameleon.train.monitors import uncompiled


class Samples(Callback):
    """Captions of pictures, and drawings of their texts, at each validation: in TensorBoard, and in Weights & Biases.

    The pictures are those of the first documents that have both, of the validation sources, or else of the training's.
    A model that is divided by FSDP2 is not asked: no process has it whole.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.pairs: list[tuple[PILImage.Image, str]] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, LanguageModule)
        if not trainer.is_global_zero or module.recipe.run.sharding == "fsdp":
            return
        tokenizer = module.begun.tokenizer
        self.pairs = self.pairs or self.find(module)
        if not self.pairs or not tokenizer.image.config.decoder:
            return
        was_training = module.model.training
        try:
            module.model.eval()
            chameleon = Chameleon(Bundle(module.model, tokenizer, module.prompting))
            with uncompiled(module.model):
                captions = chameleon.caption_batch([picture for picture, _ in self.pairs])
                drawings = chameleon.draw_batch([text for _, text in self.pairs])
        finally:
            module.model.train(was_training)
        for number, ((picture, text), caption, drawing) in enumerate(zip(self.pairs, captions, drawings, strict=True)):
            told = f"“{caption}” for “{text}”"
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    pixels = np.concatenate([np.asarray(each.convert("RGB")) for each in (picture, drawing)], axis=1)
                    logger.experiment.add_text(f"samples/caption_{number}", told, module.done)
                    logger.experiment.add_image(f"samples/drawing_{number}", pixels, module.done, dataformats="HWC")
                elif isinstance(logger, WandbLogger):
                    logger.log_image(f"samples/{number}", [picture, drawing], caption=[told, text])

    def find(self, module: LanguageModule) -> list[tuple[PILImage.Image, str]]:
        """Pictures with their texts."""
        found = []
        for source in module.sample_sources:
            for shard in source.shards:
                for number in range(min(len(shard), 4 * self.count)):
                    document: Document = module.begun.tokenizer.decode(torch.from_numpy(shard[number]))
                    if document.text.strip() and len(document.images) == 1:
                        found.append((document.images[0], document.text.strip()))
                    if len(found) == self.count:
                        return found  # type: ignore[return-value]
        return found  # type: ignore[return-value]
