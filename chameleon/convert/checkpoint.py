"""The common form of a checkpoint: what a reader of one format passes to the writer of another, with lazy tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chameleon.bundle import PROVENANCE_FILE, GenerationConfig, Prompting, read_header, stored_names, write_bundle
from chameleon.convert import layout
from chameleon.dialect import ShapeConfig, SizedDialect
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import LazyTensors, Progress, RenamedTensors, SafetensorsFiles, no_progress
from chameleon.tokenizers.image import STEM, WEIGHTS_FILE, read_config
from chameleon.tokenizers.mixed import check_compatible, load_text_tokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.vocabulary import Vocabulary

Format = Literal["bundle", "hf", "lumina", "meta"]
DECODER, CODEBOOK = "decoder.", "quantize.embedding.weight"


@dataclass(frozen=True)
class Source:
    """Details of another format's files that a bundle keeps in its provenance, so that converting back restores them."""

    format: Format = "bundle"
    name: str | None = None
    """Name of the model's folder."""
    shards: int | None = None
    """Number of files of Meta's weights."""
    fused: bool = False
    """Whether Meta's files have q, k, v and gate, up as one matrix each."""
    frequencies: dict[str, Any] | None = None
    """Meta's `rope.freqs`: dtype, shape, values."""
    config: dict[str, Any] | None = None
    """Lumina's config.json without the names of token ids."""

    @classmethod
    def from_json(cls, value: Any, where: object) -> Source:
        """Read the form in a bundle's provenance. Raise `BadInput` for what this class would not have written."""
        try:
            source = cls(**value)
            frequencies = source.frequencies
            if frequencies is not None:
                torch.tensor(frequencies["values"], dtype=torch.float64).to(getattr(torch, frequencies["dtype"])).view(
                    frequencies["shape"]
                )
            if source.format not in get_args(Format) or not isinstance(source.fused, bool):
                raise ValueError("format or fused")
            if source.config is not None and not isinstance(source.config, dict):
                raise ValueError("config")
            if source.name is not None and (Path(source.name).name != source.name or source.name in ("", "..")):
                raise ValueError("name")
            if source.shards is not None and (type(source.shards) is not int or source.shards < 1):
                raise ValueError("shards")
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise BadInput(f"source cannot be read ({error})", where=where) from None
        return source


@dataclass
class Checkpoint:
    """A model with its tokenizers, none of whose weights has been read yet."""

    config: ModelConfig
    vocabulary: Vocabulary
    weights: LazyTensors
    """By the names of `chameleon.model.transformer`."""
    text: TextTokenizer
    image: VQGANConfig
    image_weights: LazyTensors
    """By the names of Meta's release."""
    nbytes: int
    """Size of the files in bytes, about as many as will be written."""
    source: Source = field(default_factory=Source)
    prompting: Prompting = "conversation"
    provenance: dict[str, Any] = field(default_factory=dict)
    """A bundle's, without its version and checksums."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one line each; complete once all weights were read."""


def vocabulary_of(
    text: TextTokenizer, image: VQGANConfig, num_ids: int, where: object, shapes: ShapeConfig | None = None
) -> Vocabulary:
    """Return the vocabulary of a text and an image tokenizer and a model with `num_ids` token ids.

    shapes: those of images, where they are not all squares of one size. Raises `BadInput` where they do not fit together.
    """
    vocabulary = text.vocabulary(image.codebook_size, image.grid, num_ids, shapes=shapes)
    if vocabulary.num_image_codes != image.codebook_size:
        raise BadInput(
            f"{vocabulary.num_image_codes} image pieces, the image tokenizer has {image.codebook_size} codes", where=where
        )
    return vocabulary


def note_what_is_lost(checkpoint: Checkpoint) -> None:
    """Note what Meta's and Hugging Face's formats cannot say of a checkpoint."""
    if isinstance(checkpoint.vocabulary.dialect, SizedDialect):
        checkpoint.notes.append("the format does not say that images have several shapes: read again, they are squares")
    if checkpoint.generation.to_json():
        checkpoint.notes.append("the format does not keep how the model is asked and sampled")


# --- the image tokenizer ---------------------------------------------------------------------------------------------


def image_shapes(config: VQGANConfig) -> dict[str, torch.Size]:
    """Return name → shape of every tensor of an image tokenizer in the released format."""
    with torch.device("meta"):
        return {name: value.shape for name, value in VQGAN(config).released_state_dict().items()}


def image_weights(
    source: Mapping[str, Tensor], config: VQGANConfig, *, prefix: str = "", where: object
) -> tuple[VQGANConfig, LazyTensors]:
    """Return the image tokenizer under `prefix` of a mapping of tensors, without a decoder where there is none.

    Raises `BadInput` naming a tensor that is missing, unknown, or of the wrong shape or dtype.
    """
    source_names = {name.removeprefix(prefix): name for name in source if name.startswith(prefix)}
    config = replace(config, decoder=any(name.startswith(DECODER) for name in source_names))
    shapes = image_shapes(config)
    layout.check_names(source_names, set(shapes), where)
    for name, shape in shapes.items():
        layout.check_tensor(prefix + name, source[source_names[name]], shape, where)
    return config, RenamedTensors({name: (source, source_names[name]) for name in shapes})


def add_decoder(checkpoint: Checkpoint, config: VQGANConfig, weights: LazyTensors, where: object) -> Checkpoint:
    """Return the checkpoint with the decoder of another copy of its image tokenizer; unchanged where it has one.

    Raises `BadInput` where the other one is not a copy, since it has another codebook.
    """
    if checkpoint.image.decoder:
        return checkpoint
    if replace(checkpoint.image, decoder=True, dropout=config.dropout) != config:
        raise BadInput("an image tokenizer of another shape than the model's", where=where)
    own_codebook, other_codebook = (entry[CODEBOOK].float() for entry in (checkpoint.image_weights, weights))
    coarser_dtype = min(
        (checkpoint.image_weights.dtype(CODEBOOK), weights.dtype(CODEBOOK)), key=lambda dtype: dtype.itemsize
    )
    if not torch.equal(own_codebook.to(coarser_dtype), other_codebook.to(coarser_dtype)):
        raise BadInput("its codebook is not the model's, so its decoder would draw something else", where=where)
    names = [name for name in image_shapes(config) if name.startswith(DECODER)]
    locations = {name: (checkpoint.image_weights, name) for name in checkpoint.image_weights}
    joined = RenamedTensors({**locations, **{name: (weights, name) for name in names}})
    ordered = {name: joined.names[name] for name in image_shapes(config)}
    return replace(checkpoint, image=replace(checkpoint.image, decoder=True), image_weights=RenamedTensors(ordered))


# --- bundles ---------------------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> Checkpoint:
    """Open a bundle after verifying its checksums. Raise `BadInput` that names what does not fit."""
    header = read_header(folder)
    provenance = {key: value for key, value in header.provenance.items() if key not in ("version", "sha256", "source")}
    source = Source.from_json(header.provenance.get("source", {}), folder / PROVENANCE_FILE)
    weights, image_files = SafetensorsFiles.from_folder(folder), SafetensorsFiles.from_folder(folder, STEM)
    text = load_text_tokenizer(folder)
    image, image_tensors = image_weights(image_files, read_config(folder), where=folder / WEIGHTS_FILE)
    check_compatible(header.vocabulary, text, image, folder)
    return Checkpoint(
        header.model,
        header.vocabulary,
        layout.BundleTensors(weights, header.model, folder),
        text,
        image,
        image_tensors,
        weights.nbytes + image_files.nbytes,
        source,
        header.prompting,
        provenance,
        header.generation,
    )


def write_as_bundle(checkpoint: Checkpoint, folder: Path, progress: Progress = no_progress) -> None:
    """Write a bundle's files to an empty folder."""
    source = checkpoint.source
    write_bundle(
        folder,
        checkpoint.config,
        checkpoint.vocabulary,
        ((name, checkpoint.weights[name]) for name in stored_names(checkpoint.config)),
        checkpoint.text,
        checkpoint.image,
        checkpoint.image_weights,
        prompting=checkpoint.prompting,
        generation=checkpoint.generation,
        provenance={**checkpoint.provenance, **({} if source == Source() else {"source": asdict(source)})},
        progress=progress,
    )
