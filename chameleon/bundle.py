"""A bundle: one folder with a model and both tokenizers. Saved atomically, loaded strictly.

config.json                  shape of the model, vocabulary, how it is prompted and sampled
model.safetensors            weights (several files and an index past 4 GB)
text_tokenizer.model         sentencepiece text tokenizer, or tokenizer.json of Hugging Face's library
image_tokenizer.json, image_tokenizer.safetensors
provenance.json              recipes, data and figures of the training, and SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chameleon.errors import BadInput, as_bad_input
from chameleon.files import atomic_folder, read_json, sha256_of, write_json
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tensor_files import Progress, SafetensorsFiles, no_progress, write_safetensors
from chameleon.tokenizers.image import write_files as write_image_files
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import Vocabulary

CONFIG_FILE, MODEL_FILE, PROVENANCE_FILE = "config.json", "model.safetensors", "provenance.json"
SHIPPED = Path(__file__).parent / "bundles" / "emoji"
FORMAT = 3
OF_ONE_BUNDLE = ("version", "sha256", "trained", "evaluation")
"""Keys of a provenance that do not hold for bundles made from it."""

Prompting = Literal["document", "conversation"]


PLACEHOLDERS = {
    "caption_prompt": ("image",),
    "answer_prompt": ("image", "question"),
    "draw_prompt": ("prompt", "width", "height"),
    "sized_draw_prompt": ("prompt", "width", "height"),
    "edit_prompt": ("image", "instruction"),
}
"""What may stand in each prompt of `GenerationConfig`."""
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class GenerationConfig:
    """How a model is asked for captions, answers and drawings, and how its tokens are sampled unless told otherwise.

    In prompts `{image}`, `{prompt}`, `{question}`, `{instruction}`, `{width}` and `{height}` (pixels) stand for what is
    given. None: the package's own values.
    """

    caption_prompt: str = "{image}"
    answer_prompt: str = "{image}{question}"
    draw_prompt: str = "{prompt}"
    """Of drawings whose size the model may choose; a prompt that names width and height asks for the usual ones."""
    sized_draw_prompt: str = "{prompt}"
    """Of drawings of a given size."""
    edit_prompt: str = "{image}{instruction}"
    unconditional: Literal["empty_prompt", "image_only"] = "empty_prompt"
    """What guidance amplifies the prompt against: an empty prompt, or the picture that is being drawn alone."""
    guidance_scale: float | None = None
    image_sampling: dict[str, float] | None = None
    """Fields of `Sampling`, as are the others."""
    edit_guidance_scale: float | None = None
    edit_sampling: dict[str, float] | None = None
    text_sampling: dict[str, float] | None = None
    max_new_tokens: int = 30
    """Of a caption or an answer."""

    def __post_init__(self) -> None:
        for name, allowed in PLACEHOLDERS.items():
            for placeholder in re.findall(r"\{(\w+)\}", getattr(self, name)):
                if placeholder not in allowed:
                    raise BadInput(f"{{{placeholder}}} is none of {', '.join(allowed)}", where=f"generation.{name}")
        if self.unconditional not in ("empty_prompt", "image_only"):
            raise BadInput(
                f"{self.unconditional!r} is neither empty_prompt nor image_only", where="generation.unconditional"
            )
        if self.max_new_tokens < 1:
            raise BadInput(f"{self.max_new_tokens}, expected 1 or more", where="generation.max_new_tokens")
        for name in ("image_sampling", "edit_sampling", "text_sampling"):
            values = getattr(self, name)
            if values is None:
                continue
            for key in values:
                if key not in SAMPLING_FIELDS:
                    raise BadInput(f"{key} is none of {', '.join(SAMPLING_FIELDS)}", where=f"generation.{name}")
            whole = {key: int(value) if key == "top_k" else float(value) for key, value in values.items()}
            object.__setattr__(self, name, whole)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from the package's own."""
        return {name: value for name, value in asdict(self).items() if value != getattr(GenerationConfig, name)}


@dataclass
class Bundle:
    """A model and its tokenizers."""

    model: Transformer
    tokenizer: MixedTokenizer
    prompting: Prompting = "document"
    """`conversation`: prompts end with `sep` (fine-tuned models); `document`: prompts are the start of a document."""
    provenance: dict[str, Any] = field(default_factory=dict)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that identify the bundle; zeros where it was not loaded."""
        return fingerprint_of(self.provenance)

    def save(self, folder: Path | str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the bundle atomically, with weights in `dtype`."""
        state = self.model.state_dict()
        names = stored_names(self.model.config)
        image_state = self.tokenizer.image.network.released_state_dict()
        with atomic_folder(Path(folder)) as partial:
            write_bundle(
                partial,
                self.model.config,
                self.vocabulary,
                ((name, state[name].detach().to("cpu", dtype)) for name in names),
                self.tokenizer.text,
                self.tokenizer.image.config,
                {name: value.to("cpu", dtype) for name, value in image_state.items()},
                prompting=self.prompting,
                provenance=self.provenance,
                generation=self.generation,
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
        """Read a bundle (None: the shipped one), the model in `dtype`, the image tokenizer in float32.

        `verify`: compare every file with its checksum. Raises `BadInput` that names a missing, altered or incompatible
        file.
        """
        path = Path(folder) if folder is not None else SHIPPED
        if not path.is_dir():
            raise BadInput("no bundle here", where=path, remedy="give the folder that `pretrain` or `finetune` wrote")
        header = read_header(path, verify)
        tokenizer = MixedTokenizer.load(path, header.vocabulary, device)
        model = load_weights(header.model, path, device, dtype)
        return cls(model, tokenizer, header.prompting, header.provenance, header.generation)


def fingerprint_of(provenance: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for the checksums of a bundle's files; zeros where there are none."""
    checksums = provenance.get("sha256")
    if not checksums:
        return "0" * 12
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:12]


def with_stage(provenance: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a bundle made from another one in a further stage, less what holds for that one alone."""
    inherited = {key: value for key, value in provenance.items() if key not in OF_ONE_BUNDLE}
    return {**inherited, "training": [*provenance.get("training", []), stage]}


@dataclass(frozen=True)
class BundleHeader:
    """The contents of config.json and provenance.json."""

    model: ModelConfig
    vocabulary: Vocabulary
    prompting: Prompting
    provenance: dict[str, Any]
    generation: GenerationConfig


def read_header(folder: Path, verify: bool = True) -> BundleHeader:
    """Read config.json and provenance.json; with `verify` check every file's checksum. Raises `BadInput`."""
    provenance = read_json(folder / PROVENANCE_FILE)
    if verify:
        verify_files(folder, provenance)
    path = folder / CONFIG_FILE
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
    with as_bad_input("how the model is asked", path):
        generation = GenerationConfig(**config.get("generation", {}))
    return BundleHeader(model, vocabulary, config["prompting"], provenance, generation)


def package_version() -> str:
    """Return the version of this package; "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("open-chameleon")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def verify_files(folder: Path, provenance: dict[str, Any]) -> None:
    """Raise `BadInput` that names a file which is missing or does not match its checksum in provenance.json."""
    checksums = provenance.get("sha256")
    if not isinstance(checksums, dict) or CONFIG_FILE not in checksums:
        raise BadInput("no checksums", where=folder / PROVENANCE_FILE, remedy="copy the whole bundle again")
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise BadInput("file is missing", where=folder / name, remedy="copy the whole bundle again")
        if sha256_of(folder / name) != expected:
            raise BadInput("file was altered: its checksum does not match", where=folder / name, remedy="copy it again")


def stored_names(config: ModelConfig) -> list[str]:
    """Return the names of the tensors that a bundle stores, in order. A tied head is stored as the embedding alone."""
    with torch.device("meta"):
        names = list(Transformer(config).state_dict())
    return [name for name in names if not (config.tied_head and name == "head.weight")]


def write_bundle(
    folder: Path,
    config: ModelConfig,
    vocabulary: Vocabulary,
    weights: Iterable[tuple[str, Tensor]],
    text: TextTokenizer,
    image: VQGANConfig,
    image_weights: Mapping[str, Tensor],
    *,
    prompting: Prompting,
    provenance: dict[str, Any],
    generation: GenerationConfig = GenerationConfig(),
    progress: Progress = no_progress,
) -> None:
    """Write a bundle's files into an empty folder; the weights are streamed one at a time."""
    header = {"format": FORMAT, "model": config.to_json(), "vocabulary": vocabulary.to_json(), "prompting": prompting}
    if generation.to_json():
        header["generation"] = generation.to_json()
    write_json(folder / CONFIG_FILE, header)
    write_safetensors(folder, weights, stored_names(config), progress=progress)
    (folder / text.FILE).write_bytes(text.data)
    write_image_files(folder, image, image_weights, progress)
    checksums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_json(folder / PROVENANCE_FILE, {**provenance, "version": package_version(), "sha256": checksums})


def load_weights(config: ModelConfig, folder: Path, device: str | torch.device, dtype: torch.dtype) -> Transformer:
    """Load the Transformer of a bundle, frozen and in evaluation mode. Raise `BadInput` where tensors do not fit."""
    files = SafetensorsFiles.from_folder(folder)
    state = {name: value.to(device, dtype) for name, value in files.items()}
    with torch.device("meta"):
        model = Transformer(config)
    if config.tied_head and "embed.weight" in state:
        state["head.weight"] = state["embed.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadInput(f"tensors do not fit {CONFIG_FILE} ({error})", where=folder / MODEL_FILE) from None
    if config.tied_head:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()
