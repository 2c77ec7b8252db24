"""A model in transit: what a reader of one format hands to the writer of another, weights one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chameleon.bundle import Prompting, read_header, stored_names, write_bundle
from chameleon.convert import layout
from chameleon.errors import BadInput
from chameleon.files import read_json
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import Chosen, Progress, SafetensorsFiles, Weights, nothing
from chameleon.tokenizers.image import CONFIG_FILE, STEM, WEIGHTS_FILE
from chameleon.tokenizers.mixed import load_text_tokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.vocabulary import Vocabulary

DECODER, CODEBOOK = "decoder.", "quantize.embedding.weight"


@dataclass
class Checkpoint:
    """A model with its tokenizers, nothing of its weights read yet."""

    config: ModelConfig
    vocabulary: Vocabulary
    weights: Weights
    """Our names."""
    text: TextTokenizer
    image: VQGANConfig
    image_weights: Weights
    """Names as released."""
    nbytes: int
    """Bytes of the files, about as many as there are to write."""
    prompting: Prompting = "conversation"
    provenance: dict[str, Any] = field(default_factory=dict)
    """A bundle's, with what another format's files say beyond the model under `source`."""

    @property
    def source(self) -> dict[str, Any]:
        found: dict[str, Any] = self.provenance.get("source", {})
        return found


def vocabulary_of(text: TextTokenizer, image: VQGANConfig, rows: int, where: object) -> Vocabulary:
    """The layout that text tokenizer, image tokenizer and a model with `rows` ids agree on, or `BadInput`."""
    vocabulary = text.vocabulary(image.codebook_size, image.grid, rows)
    if vocabulary.image_count != image.codebook_size:
        raise BadInput(
            f"{vocabulary.image_count} image pieces, the image tokenizer has {image.codebook_size} codes", where=where
        )
    return vocabulary


# --- the image tokenizer ---------------------------------------------------------------------------------------------


def image_shapes(config: VQGANConfig) -> dict[str, torch.Size]:
    """Name → shape of every tensor of a released image tokenizer."""
    with torch.device("meta"):
        return {name: value.shape for name, value in VQGAN(config).released_state_dict().items()}


def image_weights(
    source: Mapping[str, Tensor], config: VQGANConfig, *, prefix: str = "", passed_over: str | None = None, where: object
) -> tuple[VQGANConfig, Weights]:
    """The image tokenizer that `source` holds under `prefix`, without a decoder where there is none.

    `passed_over`: prefix of names that are no part of it. Raises `BadInput` naming a tensor that is missing, unknown, or
    of the wrong shape or dtype.
    """
    found = {name.removeprefix(prefix): name for name in source if name.startswith(prefix)}
    if passed_over is not None:
        found = {name: theirs for name, theirs in found.items() if not name.startswith(passed_over)}
    config = replace(config, decoder=any(name.startswith(DECODER) for name in found))
    wanted = image_shapes(config)
    layout.check_names(found, set(wanted), where)
    for name, shape in wanted.items():
        layout.fit(prefix + name, source[found[name]], shape, where)
    return config, Chosen({name: (source, found[name]) for name in wanted})


def with_decoder(checkpoint: Checkpoint, config: VQGANConfig, weights: Weights, where: object) -> Checkpoint:
    """The checkpoint with the decoder of another copy of its image tokenizer; itself, where it has one.

    Raises `BadInput` where that is no copy, its codebook being another.
    """
    if checkpoint.image.decoder:
        return checkpoint
    if replace(checkpoint.image, decoder=True, dropout=config.dropout) != config:
        raise BadInput("an image tokenizer of another shape than the model's", where=where)
    ours, theirs = (entry[CODEBOOK].float() for entry in (checkpoint.image_weights, weights))
    coarse = min((checkpoint.image_weights.dtype(CODEBOOK), weights.dtype(CODEBOOK)), key=lambda dtype: dtype.itemsize)
    if not torch.equal(ours.to(coarse), theirs.to(coarse)):
        raise BadInput("its codebook is not the model's, so its decoder would draw something else", where=where)
    names = [name for name in image_shapes(config) if name.startswith(DECODER)]
    places = {name: (checkpoint.image_weights, name) for name in checkpoint.image_weights}
    joined = Chosen({**places, **{name: (weights, name) for name in names}})
    ordered = {name: joined.places[name] for name in image_shapes(config)}
    return replace(checkpoint, image=replace(checkpoint.image, decoder=True), image_weights=Chosen(ordered))


# --- bundles ---------------------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> Checkpoint:
    """A bundle, its checksums verified. Raises `BadInput` naming what does not fit."""
    header = read_header(folder)
    weights = SafetensorsFiles.of_folder(folder)
    files = SafetensorsFiles.of_folder(folder, STEM)
    image, pictures = image_weights(files, VQGANConfig(**read_json(folder / CONFIG_FILE)), where=folder / WEIGHTS_FILE)
    kept = {key: value for key, value in header.provenance.items() if key not in ("version", "sha256")}
    return Checkpoint(
        header.model,
        header.vocabulary,
        weights,
        load_text_tokenizer(folder),
        image,
        pictures,
        weights.nbytes + files.nbytes,
        header.prompting,
        kept,
    )


def write_as_bundle(checkpoint: Checkpoint, place: Path, progress: Progress = nothing) -> None:
    """Writes a bundle's files into an empty folder."""
    write_bundle(
        place,
        checkpoint.config,
        checkpoint.vocabulary,
        ((name, checkpoint.weights[name]) for name in stored_names(checkpoint.config)),
        checkpoint.text,
        checkpoint.image,
        checkpoint.image_weights,
        prompting=checkpoint.prompting,
        provenance=checkpoint.provenance,
        progress=progress,
    )
