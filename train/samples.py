"""Captions and drawings of the model during training, at each validation."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.document import Document, Text
from chameleon.generation.chameleon import Chameleon
from chameleon.train.language_module import LanguageModule
from chameleon.train.monitors import uncompiled


class SampleLogger(Callback):
    """Logs captions of pictures, and drawings of their texts, to TensorBoard and Weights & Biases.

    The pictures are those of the first documents with one picture and a text, from the validation sources, or from those
    of training where there are none. Of a sharded model the first process gathers a copy on the CPU, while the others wait.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.pairs: list[tuple[PILImage.Image, str]] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, LanguageModule)
        is_sharded = module.recipe.run.data_parallel == "fsdp"
        gathered = module.full_model() if is_sharded else None
        if not trainer.is_global_zero:
            return
        tokenizer, model = module.tokenizer, gathered if gathered is not None else module.model
        self.pairs = self.pairs or self.find_pairs(module)
        if not self.pairs or not tokenizer.image.config.decoder:
            return
        was_training = model.training
        try:
            model.eval()
            chameleon = Chameleon(Bundle(model, tokenizer, module.prompting, generation=module.start.generation))
            with uncompiled():
                captions = chameleon.caption_batch([picture for picture, _ in self.pairs])
                drawings = chameleon.draw_after([Document((Text(text),)) for _, text in self.pairs])
        finally:
            model.train(was_training)
        step = module.completed_steps
        for index, ((picture, text), caption, drawing) in enumerate(zip(self.pairs, captions, drawings, strict=True)):
            caption_and_truth = f"“{caption}” for “{text}”"
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    pixels = np.asarray(beside(picture, drawing))
                    logger.experiment.add_text(f"samples/caption_{index}", caption_and_truth, step)
                    logger.experiment.add_image(f"samples/drawing_{index}", pixels, step, dataformats="HWC")
                elif isinstance(logger, WandbLogger):
                    logger.log_image(f"samples/{index}", [picture, drawing], caption=[caption_and_truth, text])

    def find_pairs(self, module: LanguageModule) -> list[tuple[PILImage.Image, str]]:
        """Return pictures with their texts."""
        pairs: list[tuple[PILImage.Image, str]] = []
        for source in module.sample_sources:
            for shard in source.shards:
                for document_index in range(min(len(shard), 4 * self.num_samples)):
                    document = module.tokenizer.decode(torch.from_numpy(shard[document_index]))
                    if document.text.strip() and len(document.images) == 1:
                        (picture,) = document.images
                        assert isinstance(picture, PILImage.Image)
                        pairs.append((picture, document.text.strip()))
                    if len(pairs) == self.num_samples:
                        return pairs
        return pairs


def beside(left: PILImage.Image, right: PILImage.Image) -> PILImage.Image:
    """Return two pictures beside each other on white."""
    both = PILImage.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left.convert("RGB"), (0, 0))
    both.paste(right.convert("RGB"), (left.width, 0))
    return both
