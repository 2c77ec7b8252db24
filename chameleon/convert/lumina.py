"""Lumina-mGPT's format (arXiv 2408.02657): the Transformer in Hugging Face's names, and how its models write and are asked.

config.json                                  shape of the model, names of all ids, weight of the z-loss
model.safetensors, or several and an index   weights of the Transformer alone, QK-norms with a row for each of Meta's shards
tokenizer.json                               text tokenizer, in the folders that have one

The image tokenizer, and the text tokenizer where there is none, are Meta's (`--tokenizer`). Images are written in the sized
dialect, with tokens that Meta reserved; a cell is 2 × 2 codes. Of Lumina-mGPT 2.0, whose image network is another one, the
dialect is the same with cells of 4 × 4 codes; its weights are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from chameleon.bundle import GenerationConfig
from chameleon.convert import layout
from chameleon.convert.checkpoint import Checkpoint, Source, vocabulary_of
from chameleon.convert.configs import from_hf_config, to_hf_config
from chameleon.convert.hugging_face import (
    CONFIG,
    SPECIAL_IDS,
    check_vocabulary_map,
    current_names,
    hugging_face_text,
    write_tokenizer,
)
from chameleon.convert.meta import read_image_tokenizer, tokenizer_folder
from chameleon.dialect import ShapeConfig, SizedDialect
from chameleon.errors import BadInput, as_bad_input
from chameleon.files import read_json, write_json
from chameleon.model.loss import Z_LOSS
from chameleon.tensor_files import Progress, SafetensorsFiles, no_progress, write_safetensors
from chameleon.tokenizers.json_text import to_json_text

OWN_KEYS = ("mask_image_logits", "z_loss_weight")
"""Keys of config.json that Hugging Face's Chameleon has not."""
CELL_PIXELS = 32
UNITS = {"1.0": 2, "2.0": 4}
"""Codes of a cell's side, by the version of the models."""
MAX_UNITS = 64
MAX_RATIO = 4.0
DRAW_PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
GENERATION = GenerationConfig(
    caption_prompt="Describe the image in detail. {image}",
    answer_prompt="{question} {image}",
    draw_prompt=DRAW_PROMPT,
    sized_draw_prompt=DRAW_PROMPT,
    edit_prompt="{instruction} {image}",
    unconditional="image_only",
    guidance_scale=4.0,
    image_sampling={"temperature": 1.0, "top_p": 1.0, "top_k": 2000},
    edit_guidance_scale=1.0,
    edit_sampling={"temperature": 1.0, "top_p": 1.0, "top_k": 200},
    text_sampling={"temperature": 1.0, "top_p": 1.0, "top_k": 10},
    max_new_tokens=512,
)
"""The forms of prompts that the models were trained with, and the sampling that their README recommends."""


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is Lumina-mGPT's, and not Hugging Face's own."""
    return any(key in config for key in OWN_KEYS)


def shapes(target_side: int, version: str = "1.0") -> ShapeConfig:
    """Return the shapes of images of a model for `target_side` pixels."""
    return ShapeConfig(target_side // CELL_PIXELS, UNITS[version], MAX_RATIO, MAX_UNITS)


def stated_side(name: str) -> int | None:
    """Return the target side in pixels that a model's name states, as 768 in Lumina-mGPT-7B-768-Omni."""
    match = re.search(r"-(512|768|1024)(?![0-9])", name)
    return None if match is None else int(match[1])


def read_lumina(folder: Path, *, tokenizer: Path | None = None, target_side: int | None = None) -> Checkpoint:
    """Open a model in Lumina-mGPT's format.

    tokenizer: a folder of Meta's tokenizers. target_side: side in pixels of a square image; by default the one in the
    folder's name. Raises `BadInput` naming the file and what is wrong with it.
    """
    path, name = folder / CONFIG, folder.resolve().name
    values = read_json(path)
    if tokenizer is None:
        raise BadInput(
            "no image tokenizer in these weights", where=folder, remedy="give the folder of Meta's with --tokenizer"
        )
    side = stated_side(name) if target_side is None else target_side
    if side is None:
        raise BadInput("its name does not say the size of images", where=folder, remedy="give --target-side, as 768")
    if side % CELL_PIXELS or not CELL_PIXELS <= side <= CELL_PIXELS * MAX_UNITS:
        expected = f"a multiple of {CELL_PIXELS} up to {CELL_PIXELS * MAX_UNITS}"
        raise BadInput(f"{side} pixels, expected {expected}", where="--target-side")
    config = from_hf_config(values, where=path)
    with as_bad_input("a model's configuration", path):
        config = replace(config, dropout=float(values.get("dropout") or 0.0))
    files, notes = SafetensorsFiles.from_folder(folder), list[str]()
    text = hugging_face_text(folder, tokenizer)
    check_vocabulary_map(values, text, path)
    image, image_tensors = read_image_tokenizer(tokenizer_folder(tokenizer), notes)
    stored_config = {key: value for key, value in values.items() if key != "vocabulary_map"}
    return Checkpoint(
        config,
        vocabulary_of(text, image, config.vocab_size, text.where, shapes(side)),
        layout.from_hf(current_names(files, folder), config, norms="shard", where=folder),
        text,
        image,
        image_tensors,
        files.nbytes,
        source=Source(format="lumina", name=name, config=stored_config),
        generation=GENERATION,
        notes=notes,
    )


def write_lumina(checkpoint: Checkpoint, folder: Path, *, progress: Progress = no_progress) -> None:
    """Write Lumina-mGPT's files to an empty folder. Raise `BadInput` for what the format cannot express."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if not isinstance(vocabulary.dialect, SizedDialect) or vocabulary.answer_end != vocabulary.sep:
        raise BadInput(
            "its images are squares of one size, or its answers end with another token",
            where="model",
            remedy="write it in Hugging Face's format",
        )
    text = to_json_text(checkpoint.text, vocabulary)
    dtype = str(checkpoint.weights.dtype("embed.weight")).removeprefix("torch.")
    values = checkpoint.source.config
    if values is None:
        hf_config = to_hf_config(config, checkpoint.image)
        values = {key: value for key, value in hf_config.items() if key != "vq_config"} | {
            **{key: getattr(vocabulary, key.removesuffix("_token_id")) for key in SPECIAL_IDS},
            "dropout": config.dropout,
            "mask_image_logits": False,
            "z_loss_weight": Z_LOSS,
            "torch_dtype": dtype,
        }
    # What training changes: dropout, and the dtype in which the weights were saved.
    changed = {"dropout": config.dropout, "torch_dtype": dtype, "max_position_embeddings": config.context_length}
    write_json(folder / CONFIG, {**values, **changed, "vocabulary_map": text.names})
    write_tokenizer(text, folder, config.context_length)
    names = [part.hf for name in layout.shapes(config) for part in layout.parts_of(name)]
    names = [name for name in names if not (config.tied_head and name == layout.OUTER_PARTS["head.weight"][0].hf)]
    write_safetensors(folder, layout.to_hf(checkpoint.weights, config, norms="shard"), names, progress=progress)
