"""A bundle: one folder that holds a model with both tokenizers. Saved whole or not at all; loaded strictly.

config.json                  shape of the model, vocabulary, how it is prompted
model.safetensors            weights (several files and an index past 4 GB)
text_tokenizer.model         sentencepiece model
image_tokenizer.json, image_tokenizer.safetensors
provenance.json              how it came to be, and SHA-256 of every other file
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.files import checksum, write_json, written_whole
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.vocabulary import Vocabulary

CONFIG_FILE, MODEL_FILE, PROVENANCE_FILE = "config.json", "model.safetensors", "provenance.json"
INDEX_FILE = MODEL_FILE + ".index.json"
MAX_FILE_BYTES = 4 * 10**9
SHIPPED = Path(__file__).parent / "bundles" / "emoji"
FORMAT = 1

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
        with written_whole(Path(folder)) as place:
            config = {
                "format": FORMAT,
                "model": self.model.config.to_json(),
                "vocabulary": self.vocabulary.to_json(),
                "prompting": self.prompting,
            }
            write_json(place / CONFIG_FILE, config)
            save_weights(self.model, place, dtype)
            self.tokenizer.text.save(place)
            self.tokenizer.image.save(place, dtype)
            files = {path.name: checksum(path) for path in sorted(place.iterdir())}
            write_json(place / PROVENANCE_FILE, {**self.provenance, "version": version(), "sha256": files})

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
        provenance = read_json(place / PROVENANCE_FILE)
        if verify:
            verify_files(place, provenance)
        config = read_json(place / CONFIG_FILE)
        if config.get("format") != FORMAT:
            raise BadInput(
                f"bundle format {config.get('format')!r}, this version reads {FORMAT}", where=place / CONFIG_FILE
            )
        for key in ("model", "vocabulary", "prompting"):
            if key not in config:
                raise BadInput(f"no key {key}", where=place / CONFIG_FILE)
        vocabulary = Vocabulary.from_json(config["vocabulary"], where=place / CONFIG_FILE)
        text, image = TextTokenizer.load(place), ImageTokenizer.load(place, device)
        model_config = ModelConfig.from_json(config["model"], where=place / CONFIG_FILE)
        for name, wanted, found in (
            ("ids", vocabulary.size, model_config.vocab_size),
            ("text pieces", vocabulary.text_count, len(text)),
            ("image codes", vocabulary.image_count, image.config.codebook_size),
            ("codes a picture", vocabulary.grid, image.config.grid),
        ):
            if wanted != found:
                raise BadInput(f"vocabulary says {wanted} {name}, the files have {found}", where=place / CONFIG_FILE)
        tokenizer = MixedTokenizer(text, image, vocabulary)
        model = load_weights(model_config, place, device, dtype)
        return cls(model, tokenizer, config["prompting"], provenance)


def version() -> str:
    """The package's version; "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("open-chameleon")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("file is missing", where=path, remedy="is this folder a bundle, and whole?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"not JSON ({error})", where=path) from None
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=path)
    return value


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


def save_weights(model: Transformer, place: Path, dtype: torch.dtype) -> None:
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    if model.config.tied_head:
        del state["head.weight"]
    parts: list[dict[str, Tensor]] = [{}]
    room = MAX_FILE_BYTES
    for name, value in state.items():
        if value.nbytes > room and parts[-1]:
            parts.append({})
            room = MAX_FILE_BYTES
        parts[-1][name] = value
        room -= value.nbytes
    if len(parts) == 1:
        save_file(state, place / MODEL_FILE)
        return
    names = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, place / file)
        names.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in state.values())
    write_json(place / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": names})


def load_weights(config: ModelConfig, place: Path, device: str | torch.device, dtype: torch.dtype) -> Transformer:
    files = [MODEL_FILE]
    if (place / INDEX_FILE).is_file():
        files = sorted(set(read_json(place / INDEX_FILE).get("weight_map", {}).values()))
        if not files or any(Path(file).name != file for file in files):
            raise BadInput("weight_map must name files of this folder", where=place / INDEX_FILE)
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= {name: value.to(device, dtype) for name, value in load_file(place / file).items()}
        except FileNotFoundError:
            raise BadInput("file is missing", where=place / file, remedy="copy the whole bundle again") from None
        except SafetensorError as error:
            raise BadInput(f"damaged ({error})", where=place / file) from None
    with torch.device("meta"):
        model = Transformer(config)
    if config.tied_head and "embed.weight" in state:
        state["head.weight"] = state["embed.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadInput(f"tensors do not fit {CONFIG_FILE} ({error})", where=place / files[0]) from None
    if config.tied_head:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()
