"""Meta's format on disk.

models/NAME/params.json, consolidate_params.json    shape of the model
models/NAME/consolidated.pth                        weights, or consolidated.NN.pth for each model-parallel shard
tokenizer/text_tokenizer.json                       text tokenizer, and the names of all ids
tokenizer/vqgan.yaml, vqgan.ckpt                    image tokenizer

Read wherever these lie below a folder, written as above.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from chameleon.convert import layout
from chameleon.convert.checkpoint import Checkpoint, Source, image_shapes, image_weights, vocabulary_of
from chameleon.convert.configs import from_meta_params, from_meta_vqgan, to_meta_params, to_meta_vqgan
from chameleon.errors import BadInput
from chameleon.files import read_json, write_json
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import Chosen, Progress, TorchFile, TorchWriter, Weights, nothing
from chameleon.tokenizers.json_text import PLACEHOLDER, RESERVED, JsonTextTokenizer, renamed, to_json_text, without_bos
from chameleon.tokenizers.vqgan import VQGANConfig

PARAMS, MORE_PARAMS, TEXT, IMAGE_CONFIG, IMAGE = (
    "params.json",
    "consolidate_params.json",
    "text_tokenizer.json",
    "vqgan.yaml",
    "vqgan.ckpt",
)
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
STATE = "state_dict"
FREQUENCIES = "rope.freqs"


# --- reading ---------------------------------------------------------------------------------------------------------


def model_folder(folder: Path, chosen: str | None) -> Path:
    """The folder with a model's files, at or below `folder`; `chosen`, of several. Raises `BadInput` that names them."""
    found = sorted(path.parent for path in folder.rglob(PARAMS))
    if chosen is not None:
        matching = [path for path in found if chosen in (str(path), path.name, str(path.relative_to(folder)))]
        if len(matching) != 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found)
            raise BadInput(f"no such model below {folder}", where=f"--model-dir {chosen}", remedy=f"there are: {names}")
        return matching[0]
    if not found:
        raise BadInput(f"no {PARAMS} here or below", where=folder)
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise BadInput(f"several models: {names}", where=folder, remedy="choose with --model-dir")
    return found[0]


def tokenizer_folder(folder: Path) -> Path:
    """The one folder with the tokenizers' files, at or below `folder`."""
    found = sorted(path.parent for path in folder.rglob(TEXT))
    if len(found) == 1:
        return found[0]
    if not found:
        raise BadInput(f"no {TEXT} here or below", where=folder, remedy="give its folder with --tokenizer")
    raise BadInput(f"several tokenizers: {', '.join(map(str, found))}", where=folder, remedy="choose with --tokenizer")


def read_params(folder: Path) -> dict[str, Any]:
    """params.json, its `model` laid over it and consolidate_params.json over both, as Meta's loader has them."""
    params = read_json(folder / PARAMS)
    inner = params.pop("model", {})
    more = read_json(folder / MORE_PARAMS) if (folder / MORE_PARAMS).is_file() else {}
    if not isinstance(inner, dict):
        raise BadInput("model is no object", where=folder / PARAMS)
    return {**params, **inner, **{key: value for key, value in more.items() if key != "model"}}


def shard_files(folder: Path, said: int | None) -> list[Path]:
    """The weights' files in order. Raises `BadInput` naming one that is absent. `said`: how many there should be."""
    whole = folder / "consolidated.pth"
    if whole.is_file():
        count, files = 1, [whole]
    else:
        numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := SHARD.fullmatch(path.name)))
        if not numbers:
            raise BadInput("no consolidated.pth or consolidated.00.pth", where=folder)
        count = max(said or 0, numbers[-1] + 1)
        files = [folder / f"consolidated.{number:02d}.pth" for number in range(count)]
        for path in files:
            if not path.is_file():
                raise BadInput(f"shard is absent, of {count}", where=path)
    if said not in (None, count):
        raise BadInput(f"model_parallel_size {said}, but {count} files of weights", where=folder)
    return files


def read_text(path: Path) -> JsonTextTokenizer:
    try:
        return JsonTextTokenizer(path.read_bytes(), path)
    except FileNotFoundError:
        raise BadInput("file is missing", where=path) from None


def read_image(folder: Path, notes: list[str]) -> tuple[VQGANConfig, Weights]:
    """The image tokenizer in a tokenizer folder. What is no part of the network (its training's) is passed over."""
    path = folder / IMAGE_CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("file is missing", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not YAML ({error})", where=path) from None
    if not isinstance(values, dict):
        raise BadInput("expected a mapping", where=path)
    config = from_meta_vqgan(values, where=path)
    weights = TorchFile(folder / IMAGE, STATE)
    parts = {name.partition(".")[0] for name in image_shapes(config)}
    ours = {name: (weights, name) for name in weights if name.partition(".")[0] in parts}
    if len(ours) < len(weights):
        notes.append(f"{folder / IMAGE}: passed over {len(weights) - len(ours)} tensors that are no part of the network")
    return image_weights(Chosen(ours), config, where=folder / IMAGE)


def frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rotary frequencies that Meta's files keep beside the weights [head_width / 2]."""
    steps = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    return (1.0 / config.rope_theta**steps).to(dtype)


def kept_frequencies(source: Source, config: ModelConfig) -> Tensor:
    """`rope.freqs` as they came, where a bundle kept them; else computed anew. Meta's loader does not read them."""
    if source.frequencies is None:
        return frequencies(config)
    kept = source.frequencies
    return torch.tensor(kept["values"], dtype=torch.float64).to(getattr(torch, kept["dtype"])).view(kept["shape"])


def keep_frequencies(found: Tensor) -> dict[str, Any] | None:
    """What a bundle keeps of `rope.freqs`, to give back the same bytes; nothing of a large table."""
    if found.numel() > 4096 or not found.is_floating_point():
        return None
    name = str(found.dtype).removeprefix("torch.")
    return {"dtype": name, "shape": list(found.shape), "values": found.double().flatten().tolist()}


def read_meta(folder: Path, *, model_dir: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """A model in Meta's format at or below `folder`; its tokenizers there, or in the folder `tokenizer`.

    Raises `BadInput` naming the file and what is wrong with it.
    """
    place = model_folder(folder, model_dir)
    tokens = tokenizer_folder(folder if tokenizer is None else tokenizer)
    params = read_params(place)
    files = shard_files(place, params.get("model_parallel_size"))
    shards = [TorchFile(path, unless=layout.IGNORED) for path in files]
    embedding = layout.ENDS["embed.weight"][0].meta
    if embedding not in shards[0] or shards[0][embedding].dim() != 2:
        raise BadInput(f"tensor {embedding} is missing, or no table", where=files[0])
    config = from_meta_params(params, len(files), vocab_size=len(shards[0][embedding]), where=place / PARAMS)
    text = read_text(tokens / TEXT)
    notes: list[str] = []
    image, pictures = read_image(tokens, notes)
    kept = shards[0].get(FREQUENCIES)
    source = Source(
        format="meta",
        name=place.resolve().name or None,
        shards=len(files),
        fused=layout.is_fused(shards[0]),
        frequencies=None if kept is None else keep_frequencies(kept),
    )
    return Checkpoint(
        config,
        vocabulary_of(text, image, config.vocab_size, tokens / TEXT),
        layout.from_meta(shards, config, where=place, notes=notes),
        text,
        image,
        pictures,
        sum(shard.nbytes for shard in shards) + (tokens / IMAGE).stat().st_size,
        source=source,
        notes=notes,
    )


# --- writing ---------------------------------------------------------------------------------------------------------


class Unread(Weights):
    """The shapes and dtypes of weights as tensors without memory."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.weights, self.names = weights, layout.shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self.names[name], dtype=self.weights.dtype(name), device="meta")


def write_meta(
    checkpoint: Checkpoint, place: Path, *, shards: int | None = None, name: str = "model", progress: Progress = nothing
) -> None:
    """Writes Meta's files into an empty folder, weights in `shards` files (left out: as many as they came in).

    Raises `BadInput` where sizes do not divide, or there is no decoder, without which Meta's code would draw noise.
    """
    config, source = checkpoint.config, checkpoint.source
    if not checkpoint.image.decoder:
        raise BadInput(
            "the image tokenizer has no decoder, which Meta's format needs",
            where="convert",
            remedy="give the folder of Meta's vqgan.ckpt with --tokenizer",
        )
    count = shards or source.shards or (config.qk_norm_shards if config.qk_norm else 1)
    model, tokens = place / "models" / (source.name or name), place / "tokenizer"
    model.mkdir(parents=True)
    tokens.mkdir()
    for path, said in zip((PARAMS, MORE_PARAMS), to_meta_params(config, count), strict=True):
        write_json(model / path, said)
    turning = kept_frequencies(source, config)

    def parts(weights: Mapping[str, Tensor]) -> Iterator[tuple[int, str, Tensor]]:
        yield from layout.to_meta(weights, config, count, fused=source.fused)
        yield from ((number, FREQUENCIES, turning) for number in range(count))

    shapes: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for number, theirs, empty in parts(Unread(checkpoint.weights, config)):
        shapes[number][theirs] = empty
    names = ["consolidated.pth"] if count == 1 else [f"consolidated.{number:02d}.pth" for number in range(count)]
    with ExitStack() as stack:
        files = [stack.enter_context(TorchWriter(model / file, shapes[number])) for number, file in enumerate(names)]
        for number, theirs, value in parts(checkpoint.weights):
            files[number].put(theirs, value)
            progress(value.nbytes)
    text = renamed(to_json_text(checkpoint.text, checkpoint.vocabulary), PLACEHOLDER, RESERVED)
    (tokens / TEXT).write_bytes(without_bos(text).data)
    shape = yaml.safe_dump(to_meta_vqgan(checkpoint.image), sort_keys=False)
    (tokens / IMAGE_CONFIG).write_text(shape, encoding="utf-8")
    with TorchWriter(tokens / IMAGE, checkpoint.image_weights, inside=STATE) as file:
        for theirs, value in checkpoint.image_weights.items():
            file.put(theirs, value)
            progress(value.nbytes)
