"""Hugging Face's format on disk: what `ChameleonForConditionalGeneration` and `ChameleonProcessor` load.

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
from chameleon.convert.checkpoint import DECODER, Checkpoint, Source, image_weights, vocabulary_of
from chameleon.convert.configs import from_hf_config, from_hf_vqgan, to_hf_config
from chameleon.convert.meta import TEXT, read_image, read_text, tokenizer_folder
from chameleon.errors import BadInput
from chameleon.files import read_json, write_json
from chameleon.tensor_files import Chosen, Progress, SafetensorsFiles, nothing, write_safetensors
from chameleon.tokenizers.json_text import PLACEHOLDER, RESERVED, JsonTextTokenizer, renamed, to_json_text, with_bos
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.vocabulary import IMAGE_NAME, NAMES

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PICTURES = "model.vqmodel."
# What tells each part's prefix, which releases and fine-tuning tools have changed.
SIGNS = {"model.": "embed_tokens.weight", PICTURES: "quant_conv.weight", "": "lm_head.weight"}
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of names that early releases wrote and that hold nothing learned."""


# --- reading ---------------------------------------------------------------------------------------------------------


def current_names(files: SafetensorsFiles, where: object) -> Chosen:
    """The tensors under the names that Hugging Face's library gives them now, whatever stood before them."""
    prefixes = {}
    for now, sign in SIGNS.items():
        found = [name.removesuffix(sign) for name in files if name == sign or name.endswith("." + sign)]
        if len(found) > 1:
            raise BadInput(f"several tensors end in {sign}", where=where)
        if found:
            prefixes[now] = found[0]
    if "model." not in prefixes:
        raise BadInput(f"no tensor ends in {SIGNS['model.']}", where=where, remedy="is this a Chameleon?")
    places = {}
    for name in files:
        if name.endswith(BUFFERS):
            continue
        for now in (PICTURES, "", "model."):
            before = prefixes.get(now)
            if before is None or not name.startswith(before) or (now == "" and name != before + SIGNS[now]):
                continue
            places[now + name.removeprefix(before)] = (files, name)
            break
        else:
            places[name] = (files, name)
    return Chosen(places)


def check_map(config: dict[str, Any], text: JsonTextTokenizer, where: object) -> None:
    """Raises `BadInput` where the ids of config.json's `vocabulary_map` and of the tokenizer are not the same."""
    found = config.get("vocabulary_map") or {}
    if not isinstance(found, dict):
        raise BadInput("vocabulary_map is no object", where=where)
    for name, number in found.items():
        matters = name in NAMES.values() or IMAGE_NAME.fullmatch(name)
        if matters and text.names.get(name) != number:
            raise BadInput(f"{name} is id {number}, in {text.where} it is {text.names.get(name)}", where=where)


def read_hugging_face(folder: Path, *, tokenizer: Path | None = None) -> Checkpoint:
    """A model in Hugging Face's format. `tokenizer`: a folder of Meta's tokenizers, for what is missing here.

    Raises `BadInput` naming the file and what is wrong with it.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values.get("quantization_config"):
        raise BadInput("the weights are quantised", where=path, remedy="convert those in 16 or 32 bits")
    files = SafetensorsFiles.of_folder(folder)
    named = current_names(files, folder)
    language = Chosen({name: named.names[name] for name in named if not name.startswith(PICTURES)})
    config = from_hf_config(values, where=path)
    config = replace(config, qk_norm_shards=layout.hf_norm_shards(language, config))
    head = layout.ENDS["head.weight"][0].hf
    if head not in language and not config.tied_head:
        raise BadInput(f"tensor {head} is missing", where=folder, remedy="is tie_word_embeddings to be true?")
    notes: list[str] = []
    text = hugging_face_text(folder, tokenizer)
    check_map(values, text, path)
    if any(name.startswith(PICTURES) for name in named):
        image = from_hf_vqgan(values.get("vq_config") or {}, where=f"{path}: vq_config")
        image, pictures = image_weights(named, image, prefix=PICTURES, where=folder)
    elif tokenizer is not None:
        image, pictures = read_image(tokenizer_folder(tokenizer), notes)
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
        pictures,
        files.nbytes,
        source=Source(format="hf", name=folder.resolve().name or None),
        notes=notes,
    )


def hugging_face_text(folder: Path, tokenizer: Path | None) -> JsonTextTokenizer:
    if (folder / TOKENIZER).is_file() or tokenizer is None:
        return read_text(folder / TOKENIZER)
    return renamed(read_text(tokenizer_folder(tokenizer) / TEXT), RESERVED, PLACEHOLDER)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_hugging_face(checkpoint: Checkpoint, place: Path, *, progress: Progress = nothing) -> None:
    """Writes Hugging Face's files into an empty folder. Raises `BadInput` for what that format cannot say."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    text = to_json_text(checkpoint.text, vocabulary)
    if PLACEHOLDER not in text.names:
        text = renamed(text, RESERVED, PLACEHOLDER)
    if PLACEHOLDER not in text.names:
        raise BadInput(f"no piece {PLACEHOLDER} or {RESERVED} to stand for a picture", where=text.where)
    special = {key: getattr(vocabulary, key.removesuffix("_token_id")) for key in SPECIAL_IDS}
    dtype = str(checkpoint.weights.dtype("embed.weight")).removeprefix("torch.")
    write_json(
        place / CONFIG,
        {
            **to_hf_config(config, checkpoint.image),
            **special,
            "torch_dtype": dtype,
            "dtype": dtype,
            "vocabulary_map": text.names,
        },
    )
    write_json(place / "generation_config.json", special)
    write_tokenizer(with_bos(text, vocabulary.bos), place, config.context)
    write_processor(checkpoint.image, place)

    pictures = {PICTURES + name: name for name in checkpoint.image_weights if not name.startswith(DECODER)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from layout.to_hf(checkpoint.weights, config)
        for theirs, name in pictures.items():
            yield theirs, checkpoint.image_weights[name]

    names = [part.hf for name in layout.shapes(config) for part in layout.parts_of(name)]
    write_safetensors(place, tensors(), [*names, *pictures], progress=progress)


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_tokenizer(text: JsonTextTokenizer, place: Path, context: int) -> None:
    """tokenizer.json and what Hugging Face's library wants to know beside it."""
    (place / TOKENIZER).write_bytes(text.data)
    write_json(
        place / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "ChameleonProcessor",
            **{f"{name}_token": NAMES[name] for name in ("bos", "eos", "pad", "sep")},
            "image_token": PLACEHOLDER,
            "boi_token": NAMES["boi"],
            "eoi_token": NAMES["eoi"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )


def write_processor(image: VQGANConfig, place: Path) -> None:
    """Scaling to [-1, 1] as Hugging Face's library has it (0.0078 for 1/127.5), and how many codes a picture has."""
    write_json(
        place / "preprocessor_config.json",
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
        place / "processor_config.json",
        {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": image.grid[0] * image.grid[1],
            "image_token": PLACEHOLDER,
        },
    )
