"""Hugging Face's format: the files that `ChameleonForConditionalGeneration` and `ChameleonProcessor` load.

config.json, generation_config.json                             shape of the model, names of all ids, special ids
model.safetensors, or several files and an index                weights, the image tokenizer's without its decoder
tokenizer.json, tokenizer_config.json                           text tokenizer
preprocessor_config.json, processor_config.json                 how pictures are scaled, what stands for one in a prompt
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from chameleon.convert import layout
from chameleon.convert.checkpoint import DECODER, Checkpoint, Source, image_weights, note_what_is_lost, vocabulary_of
from chameleon.convert.configs import from_hf_config, from_hf_vqgan, to_hf_config
from chameleon.convert.meta import TEXT, read_image_tokenizer, read_text_tokenizer, tokenizer_folder
from chameleon.errors import BadInput
from chameleon.files import read_json, write_json
from chameleon.tensor_files import Progress, RenamedTensors, SafetensorsFiles, no_progress, write_safetensors
from chameleon.tokenizers.json_text import (
    IMAGE_PLACEHOLDER,
    RESERVED,
    JsonTextTokenizer,
    rename_token,
    to_json_text,
    with_bos,
)
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import IMAGE_PIECE, SPECIAL_PIECES

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
IMAGE_PREFIX = "model.vqmodel."
# Prefix of each part in current releases → a tensor by which its prefix in a file is found; tools use others.
PREFIX_MARKERS = {"model.": "embed_tokens.weight", IMAGE_PREFIX: "quant_conv.weight", "": "lm_head.weight"}
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Suffixes of buffers that early releases wrote, which are not weights."""


# --- reading ---------------------------------------------------------------------------------------------------------


def current_names(files: SafetensorsFiles, where: object) -> RenamedTensors:
    """Return the tensors under their names in current releases of Hugging Face's library, whatever their prefixes are."""
    prefixes = {}
    for prefix, marker in PREFIX_MARKERS.items():
        old_prefixes = [name.removesuffix(marker) for name in files if name == marker or name.endswith("." + marker)]
        if len(old_prefixes) > 1:
            raise BadInput(f"several tensors end in {marker}", where=where)
        if old_prefixes:
            prefixes[prefix] = old_prefixes[0]
    if "model." not in prefixes:
        raise BadInput(f"no tensor ends in {PREFIX_MARKERS['model.']}", where=where, remedy="is this a Chameleon?")
    locations = {}
    for name in files:
        if name.endswith(BUFFERS):
            continue
        for prefix in (IMAGE_PREFIX, "", "model."):
            old_prefix = prefixes.get(prefix)
            if (
                old_prefix is None
                or not name.startswith(old_prefix)
                or (prefix == "" and name != old_prefix + PREFIX_MARKERS[prefix])
            ):
                continue
            locations[prefix + name.removeprefix(old_prefix)] = (files, name)
            break
        else:
            locations[name] = (files, name)
    return RenamedTensors(locations)


def check_vocabulary_map(config: dict[str, Any], text: JsonTextTokenizer, where: object) -> None:
    """Raise `BadInput` where `vocabulary_map` in config.json and the tokenizer have different ids."""
    vocabulary_map = config.get("vocabulary_map") or {}
    if not isinstance(vocabulary_map, dict):
        raise BadInput("vocabulary_map is no object", where=where)
    for name, token_id in vocabulary_map.items():
        is_checked = name in SPECIAL_PIECES.values() or IMAGE_PIECE.fullmatch(name)
        if is_checked and text.names.get(name) != token_id:
            raise BadInput(f"{name} is id {token_id}, in {text.where} it is {text.names.get(name)}", where=where)


def read_hugging_face(folder: Path, *, tokenizer: Path | None = None) -> Checkpoint:
    """Open a model in Hugging Face's format. `tokenizer`: a folder of Meta's tokenizers, for what is missing in it.

    Raises `BadInput` naming the file and what is wrong with it.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values.get("quantization_config"):
        raise BadInput("the weights are quantised", where=path, remedy="convert those in 16 or 32 bits")
    files = SafetensorsFiles.from_folder(folder)
    tensors = current_names(files, folder)
    language = RenamedTensors({name: tensors.names[name] for name in tensors if not name.startswith(IMAGE_PREFIX)})
    config = from_hf_config(values, where=path)
    config = replace(config, qk_norm_shards=layout.hf_norm_shards(language, config))
    head = layout.OUTER_PARTS["head.weight"][0].hf
    if head not in language and not config.tied_head:
        raise BadInput(f"tensor {head} is missing", where=folder, remedy="is tie_word_embeddings to be true?")
    notes: list[str] = []
    text = hugging_face_text(folder, tokenizer)
    check_vocabulary_map(values, text, path)
    if any(name.startswith(IMAGE_PREFIX) for name in tensors):
        image = from_hf_vqgan(values.get("vq_config") or {}, where=f"{path}: vq_config")
        image, image_tensors = image_weights(tensors, image, prefix=IMAGE_PREFIX, where=folder)
    elif tokenizer is not None:
        image, image_tensors = read_image_tokenizer(tokenizer_folder(tokenizer), notes)
    else:
        raise BadInput(
            "no image tokenizer in these weights", where=folder, remedy="give the folder of Meta's with --tokenizer"
        )
    return Checkpoint(
        config,
        vocabulary_of(text, image, config.vocab_size, text.where),
        layout.from_hf(language, config, where=folder),
        text,
        image,
        image_tensors,
        files.nbytes,
        source=Source(format="hf", name=folder.resolve().name or None),
        notes=notes,
    )


def hugging_face_text(folder: Path, tokenizer: Path | None) -> JsonTextTokenizer:
    if (folder / TOKENIZER).is_file() or tokenizer is None:
        return read_text_tokenizer(folder / TOKENIZER)
    return rename_token(read_text_tokenizer(tokenizer_folder(tokenizer) / TEXT), RESERVED, IMAGE_PLACEHOLDER)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_hugging_face(checkpoint: Checkpoint, folder: Path, *, progress: Progress = no_progress) -> None:
    """Write Hugging Face's files to an empty folder. Raise `BadInput` for what the format cannot express."""
    note_what_is_lost(checkpoint)
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    text = to_json_text(checkpoint.text, vocabulary)
    if IMAGE_PLACEHOLDER not in text.names:
        text = rename_token(text, RESERVED, IMAGE_PLACEHOLDER)
    if IMAGE_PLACEHOLDER not in text.names:
        raise BadInput(f"no piece {IMAGE_PLACEHOLDER} or {RESERVED} to stand for a picture", where=text.where)
    special_ids = {key: getattr(vocabulary, key.removesuffix("_token_id")) for key in SPECIAL_IDS}
    dtype = str(checkpoint.weights.dtype("embed.weight")).removeprefix("torch.")
    write_json(
        folder / CONFIG,
        {
            **to_hf_config(config, checkpoint.image),
            **special_ids,
            "torch_dtype": dtype,
            "dtype": dtype,
            "vocabulary_map": text.names,
        },
    )
    write_json(folder / "generation_config.json", special_ids)
    write_tokenizer(with_bos(text, vocabulary.bos), folder, config.context_length)
    write_processor(checkpoint.image, folder)

    image_names = {IMAGE_PREFIX + name: name for name in checkpoint.image_weights if not name.startswith(DECODER)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from layout.to_hf(checkpoint.weights, config)
        for hf_name, name in image_names.items():
            yield hf_name, checkpoint.image_weights[name]

    names = [part.hf for name in layout.shapes(config) for part in layout.parts_of(name)]
    write_safetensors(folder, tensors(), [*names, *image_names], progress=progress)


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_tokenizer(text: JsonTextTokenizer, folder: Path, context_length: int) -> None:
    """Write tokenizer.json and its configuration for Hugging Face's library."""
    (folder / TOKENIZER).write_bytes(text.data)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "ChameleonProcessor",
            **{f"{name}_token": SPECIAL_PIECES[name] for name in ("bos", "eos", "pad", "sep")},
            "image_token": IMAGE_PLACEHOLDER,
            "boi_token": SPECIAL_PIECES["boi"],
            "eoi_token": SPECIAL_PIECES["eoi"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        },
    )


def write_processor(image: VQGANConfig, folder: Path) -> None:
    """Write the processor's files: scaling to [-1, 1] as in Hugging Face's library (0.0078), codes per image."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ChameleonImageProcessor",
            "processor_class": "ChameleonProcessor",
            "do_resize": True,
            "size": {"shortest_edge": image.resolution},
            "resample": 1,
            "do_center_crop": True,
            "crop_size": {"height": image.resolution, "width": image.resolution},
            "do_rescale": True,
            "rescale_factor": 0.0078,
            "do_normalize": True,
            "image_mean": [1.0, 1.0, 1.0],
            "image_std": [1.0, 1.0, 1.0],
            "do_convert_rgb": True,
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": image.grid[0] * image.grid[1],
            "image_token": IMAGE_PLACEHOLDER,
        },
    )
