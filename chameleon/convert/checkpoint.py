"""A model in transit: what a reader of one format hands to the writer of another, weights one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chameleon.bundle import PROVENANCE_FILE, Prompting, read_header, stored_names, write_bundle
from chameleon.convert import layout
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import Chosen, Progress, SafetensorsFiles, Weights, nothing
from chameleon.tokenizers.image import STEM, WEIGHTS_FILE, read_config
from chameleon.tokenizers.mixed import check_fit, load_text_tokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.vocabulary import Vocabulary

Format = Literal["bundle", "hf", "meta"]
DECODER, CODEBOOK = "decoder.", "quantize.embedding.weight"


@dataclass(frozen=True)
class Source:
    """What another format's files say beyond the model, kept in a bundle's provenance for the way back."""

    format: Format = "bundle"
    name: str | None = None
    """Of the model's folder."""
    shards: int | None = None
    """Files of Meta's weights."""
    fused: bool = False
    """Whether q, k, v and gate, up are one matrix each in Meta's."""
    frequencies: dict[str, Any] | None = None
    """Meta's `rope.freqs`: dtype, shape, values."""

    @classmethod
    def from_json(cls, value: Any, where: object) -> Source:
        """Reads what a bundle holds. Raises `BadInput` for what this class would not have written."""
        try:
            found = cls(**value)
            kept = found.frequencies
            if kept is not None:
                torch.tensor(kept["values"], dtype=torch.float64).to(getattr(torch, kept["dtype"])).view(kept["shape"])
            if found.format not in get_args(Format) or not isinstance(found.fused, bool):
                raise ValueError("format or fused")
            if found.name is not None and (Path(found.name).name != found.name or found.name in ("", "..")):
                raise ValueError("name")
            if found.shards is not None and (type(found.shards) is not int or found.shards < 1):
                raise ValueError("shards")
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise BadInput(f"source cannot be read ({error})", where=where) from None
        return found


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
    source: Source = field(default_factory=Source)
    prompting: Prompting = "conversation"
    provenance: dict[str, Any] = field(default_factory=dict)
    """A bundle's, without what belongs to its files."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, one line each; complete once all weights were read."""


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
    source: Mapping[str, Tensor], config: VQGANConfig, *, prefix: str = "", where: object
) -> tuple[VQGANConfig, Weights]:
    """The image tokenizer that `source` holds under `prefix`, without a decoder where there is none.

    Raises `BadInput` naming a tensor that is missing, unknown, or of the wrong shape or dtype.
    """
    found = {name.removeprefix(prefix): name for name in source if name.startswith(prefix)}
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
    ordered = {name: joined.names[name] for name in image_shapes(config)}
    return replace(checkpoint, image=replace(checkpoint.image, decoder=True), image_weights=Chosen(ordered))


# --- bundles ---------------------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> Checkpoint:
    """A bundle, its checksums verified. Raises `BadInput` naming what does not fit."""
    header = read_header(folder)
    kept = {key: value for key, value in header.provenance.items() if key not in ("version", "sha256", "source")}
    source = Source.from_json(header.provenance.get("source", {}), folder / PROVENANCE_FILE)
    weights, pictures = SafetensorsFiles.of_folder(folder), SafetensorsFiles.of_folder(folder, STEM)
    text = load_text_tokenizer(folder)
    image, chosen = image_weights(pictures, read_config(folder), where=folder / WEIGHTS_FILE)
    check_fit(header.vocabulary, text, image, folder)
    return Checkpoint(
        header.model,
        header.vocabulary,
        layout.BundleReading(weights, header.model, folder),
        text,
        image,
        chosen,
        weights.nbytes + pictures.nbytes,
        source,
        header.prompting,
        kept,
    )


def write_as_bundle(checkpoint: Checkpoint, place: Path, progress: Progress = nothing) -> None:
    """Writes a bundle's files into an empty folder."""
    source = checkpoint.source
    write_bundle(
        place,
        checkpoint.config,
        checkpoint.vocabulary,
        ((name, checkpoint.weights[name]) for name in stored_names(checkpoint.config)),
        checkpoint.text,
        checkpoint.image,
        checkpoint.image_weights,
        prompting=checkpoint.prompting,
        provenance={**checkpoint.provenance, **({} if source == Source() else {"source": asdict(source)})},
        progress=progress,
    )
