"""A bundle: one folder that holds a model with both tokenizers. Saved whole or not at all; loaded strictly.

config.json                  shape of the model, vocabulary, how it is prompted
model.safetensors            weights (several files and an index past 4 GB)
text_tokenizer.model         our own text tokenizer, or tokenizer.json: the originals'
image_tokenizer.json, image_tokenizer.safetensors
provenance.json              how it came to be, and SHA-256 of every other file
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.files import checksum, read_json, write_json, written_whole
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tensor_files import Progress, SafetensorsFiles, nothing, write_safetensors
from chameleon.tokenizers.image import write_files as write_image_files
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import Vocabulary

CONFIG_FILE, MODEL_FILE, PROVENANCE_FILE = "config.json", "model.safetensors", "provenance.json"
SHIPPED = Path(__file__).parent / "bundles" / "emoji"
FORMAT = 2

Prompting = Literal["document", "conversation"]


@dataclass
class Bundle:
    """A model and its tokenizers."""

    model: Transformer
    tokenizer: MixedTokenizer
    prompting: Prompting = "document"
    """Whether prompts end with `sep` (tuned on conversations) or are plain documents (pretrained)."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    def save(self, folder: Path | str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes the bundle, weights in `dtype`. What was there before is replaced only once all is written."""
        state = self.model.state_dict()
        names = stored_names(self.model.config)
        image = self.tokenizer.image.network.released_state_dict()
        with written_whole(Path(folder)) as place:
            write_bundle(
                place,
                self.model.config,
                self.vocabulary,
                ((name, state[name].detach().to("cpu", dtype)) for name in names),
                self.tokenizer.text,
                self.tokenizer.image.config,
                {name: value.to("cpu", dtype) for name, value in image.items()},
                prompting=self.prompting,
                provenance=self.provenance,
            )

    @classmethod
    def load(
        cls,
        folder: Path | str | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        verify: bool = True,
    ) -> Bundle:
        """Reads a bundle (None: the shipped one), the model in `dtype`, the image tokenizer in float32.

        Raises `BadInput` for a missing, altered or unfitting file, naming it.
        """
        place = Path(folder) if folder is not None else SHIPPED
        if not place.is_dir():
            raise BadInput("no bundle here", where=place, remedy="give the folder that `pretrain` or `finetune` wrote")
        header = read_header(place, verify)
        tokenizer = MixedTokenizer.load(place, header.vocabulary, device)
        model = load_weights(header.model, place, device, dtype)
        return cls(model, tokenizer, header.prompting, header.provenance)


@dataclass(frozen=True)
class Header:
    """What a bundle says of itself."""

    model: ModelConfig
    vocabulary: Vocabulary
    prompting: Prompting
    provenance: dict[str, Any]


def read_header(place: Path, verify: bool = True) -> Header:
    """Reads config.json and provenance.json, and with `verify` checks every file's checksum. Raises `BadInput`."""
    provenance = read_json(place / PROVENANCE_FILE)
    if verify:
        verify_files(place, provenance)
    path = place / CONFIG_FILE
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise BadInput(f"bundle format {config.get('format')!r}, this version reads {FORMAT}", where=path)
    for key in ("model", "vocabulary", "prompting"):
        if key not in config:
            raise BadInput(f"no key {key}", where=path)
    vocabulary = Vocabulary.from_json(config["vocabulary"], where=path)
    model = ModelConfig.from_json(config["model"], where=path)
    if vocabulary.size != model.vocab_size:
        raise BadInput(f"vocabulary says {vocabulary.size} ids, the model has {model.vocab_size}", where=path)
    if config["prompting"] not in get_args(Prompting):
        raise BadInput(f"prompting is none of {', '.join(get_args(Prompting))}", where=path)
    return Header(model, vocabulary, config["prompting"], provenance)


def version() -> str:
    """The package's version; "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("open-chameleon")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def verify_files(place: Path, provenance: dict[str, Any]) -> None:
    """Raises `BadInput` naming a file that is missing or not what provenance.json says."""
    hashes = provenance.get("sha256")
    if not isinstance(hashes, dict) or CONFIG_FILE not in hashes:
        raise BadInput("no checksums", where=place / PROVENANCE_FILE, remedy="copy the whole bundle again")
    for name, wanted in hashes.items():
        if not (place / name).is_file():
            raise BadInput("file is missing", where=place / name, remedy="copy the whole bundle again")
        if checksum(place / name) != wanted:
            raise BadInput("file was altered: its checksum does not fit", where=place / name, remedy="copy it again")


def stored_names(config: ModelConfig) -> list[str]:
    """Names of the tensors that are written, in order: a tied head is the embedding again, and left out."""
    with torch.device("meta"):
        names = list(Transformer(config).state_dict())
    return [name for name in names if not (config.tied_head and name == "head.weight")]


def write_bundle(
    place: Path,
    config: ModelConfig,
    vocabulary: Vocabulary,
    weights: Iterable[tuple[str, Tensor]],
    text: TextTokenizer,
    image: VQGANConfig,
    image_weights: Mapping[str, Tensor],
    *,
    prompting: Prompting,
    provenance: dict[str, Any],
    progress: Progress = nothing,
) -> None:
    """Writes a bundle's files into an empty folder, weights as they come, one at a time."""
    write_json(
        place / CONFIG_FILE,
        {"format": FORMAT, "model": config.to_json(), "vocabulary": vocabulary.to_json(), "prompting": prompting},
    )
    write_safetensors(place, weights, stored_names(config), progress=progress)
    (place / text.FILE).write_bytes(text.data)
    write_image_files(place, image, image_weights, progress)
    files = {path.name: checksum(path) for path in sorted(place.iterdir())}
    write_json(place / PROVENANCE_FILE, {**provenance, "version": version(), "sha256": files})


def load_weights(config: ModelConfig, place: Path, device: str | torch.device, dtype: torch.dtype) -> Transformer:
    files = SafetensorsFiles.of_folder(place)
    state = {name: value.to(device, dtype) for name, value in files.items()}
    with torch.device("meta"):
        model = Transformer(config)
    if config.tied_head and "embed.weight" in state:
        state["head.weight"] = state["embed.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadInput(f"tensors do not fit {CONFIG_FILE} ({error})", where=place / MODEL_FILE) from None
    if config.tied_head:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()
