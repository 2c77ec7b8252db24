"""What training starts from: a new model with given tokenizers, or a bundle; and the adapters that are trained on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chameleon.bundle import GenerationConfig, read_header, stored_names, verify_files
from chameleon.errors import BadInput
from chameleon.files import verify_once
from chameleon.model.config import ModelConfig, named_size
from chameleon.model.transformer import Transformer, initial_value
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.adapters import add_codebook_rows, add_lora, train_image_head_only
from chameleon.train.recipe import TrainRecipe
from chameleon.train.sharded_tensors import Box


@dataclass
class TrainingStart:
    """A model's configuration, tokenizers and initial weights, of which none has been read yet."""

    config: ModelConfig
    tokenizer: MixedTokenizer
    initial_part: Callable[[str, Box], Tensor]
    """(name of a parameter of the plain model, a part of it) → the values of that part, float32."""
    provenance: dict[str, Any] = field(default_factory=dict)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    bundle: Path | None = None
    """Folder of the bundle whose weights these are."""

    def verify(self) -> None:
        """Raise `BadInput` where a file of the bundle is not what it was written as; see `verify_once`."""
        if self.bundle is not None:
            checksums = self.provenance.get("sha256", {})  # without any, `verify_files` raises
            verify_once(self.bundle, checksums, partial(verify_files, self.bundle, self.provenance))

    @classmethod
    def from_recipe(cls, recipe: TrainRecipe) -> TrainingStart:
        """Return the start that the recipe asks for. Raise `BadInput` where its keys contradict each other."""
        start = cls.with_weights(recipe)
        return start if recipe.generation is None else replace(start, generation=recipe.generation)

    @classmethod
    def with_weights(cls, recipe: TrainRecipe) -> TrainingStart:
        """Return the start without what the recipe says of generation."""
        if (recipe.bundle is None) == (recipe.tokenizers is None):
            raise BadInput("give either bundle or tokenizers", where="recipe")
        if recipe.bundle is not None:
            return start_from_bundle(Path(recipe.bundle), recipe)
        assert recipe.tokenizers is not None
        if "vocab_size" in recipe.model:
            raise BadInput("the tokenizers determine vocab_size; leave it out", where="recipe.model")
        config = named_size(recipe.size or "mini", **recipe.model)
        tokenizer = MixedTokenizer.load(Path(recipe.tokenizers))
        config = replace(config, vocab_size=tokenizer.vocabulary.size)
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in Transformer(config).named_parameters()}

        def initial_part(name: str, box: Box) -> Tensor:
            return initial_value(name, shapes[name], config, recipe.run.seed)[box]

        return cls(config, tokenizer, initial_part)


def start_from_bundle(folder: Path, recipe: TrainRecipe) -> TrainingStart:
    """Return a start from a bundle. Raise `BadInput` where the recipe asks for another shape than the bundle's."""
    if not folder.is_dir():
        raise BadInput("no bundle here", where=folder, remedy="give the folder that a training or `convert` wrote")
    header = read_header(folder, verify=False)  # the first process does, for all
    if set(recipe.model) - {"dropout"}:
        raise BadInput("the shape of a bundle's model is fixed; only dropout can be set", where="recipe.model")
    if recipe.size is not None:
        expected = named_size(recipe.size)
        for name in ("layers", "width", "heads", "kv_heads", "ffn_width", "norm_order"):
            if getattr(expected, name) != (actual := getattr(header.model, name)):
                raise BadInput(
                    f"the recipe is for {recipe.size}, whose {name} is {getattr(expected, name)}; the bundle's is {actual}",
                    where=folder,
                    remedy="use the recipe of its size, or set size to null",
                )
    config = replace(header.model, dropout=recipe.model.get("dropout", header.model.dropout))
    files = SafetensorsFiles.from_folder(folder)
    missing = set(stored_names(config)) - set(files)
    if missing:
        raise BadInput(f"no tensor {min(missing)}", where=folder)
    tokenizer = MixedTokenizer.load(folder, header.vocabulary)

    def initial_part(name: str, box: Box) -> Tensor:
        return files.box(name, box).float()

    return TrainingStart(config, tokenizer, initial_part, header.provenance, header.generation, folder)


def add_adapters(model: Transformer, start: TrainingStart, recipe: TrainRecipe) -> None:
    """Add the adapters and parametrisations that the recipe trains. Raise `BadInput` for combinations that do not work."""
    vocabulary = start.tokenizer.vocabulary
    if recipe.codebook_rows and recipe.trainable != "all":
        raise BadInput(f"codebook_rows does not go with trainable={recipe.trainable}", where="recipe.codebook_rows")
    if recipe.codebook_rows:
        add_codebook_rows(model, start.tokenizer.image.network.quantize.codebook(), vocabulary)
    if recipe.trainable == "lora":
        add_lora(model, recipe.lora)
    elif recipe.trainable == "image_head":
        train_image_head_only(model, start.initial_part("head.weight", ()), vocabulary)
