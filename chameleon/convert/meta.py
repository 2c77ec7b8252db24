"""Meta's format: the files of its release.

models/NAME/params.json, consolidate_params.json    shape of the model
models/NAME/consolidated.pth                        weights, or consolidated.NN.pth for each model-parallel shard
tokenizer/text_tokenizer.json                       text tokenizer, and the names of all ids
tokenizer/vqgan.yaml, vqgan.ckpt                    image tokenizer

They are found anywhere below a folder, and written as above.
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
from chameleon.convert.checkpoint import Checkpoint, Source, image_shapes, image_weights, note_what_is_lost, vocabulary_of
from chameleon.convert.configs import from_meta_params, from_meta_vqgan, to_meta_params, to_meta_vqgan
from chameleon.errors import BadInput
from chameleon.files import read_json, write_json
from chameleon.model.config import ModelConfig
from chameleon.tensor_files import LazyTensors, Progress, RenamedTensors, TorchFile, TorchWriter, no_progress
from chameleon.tokenizers.json_text import (
    IMAGE_PLACEHOLDER,
    RESERVED,
    JsonTextTokenizer,
    rename_token,
    to_json_text,
    without_bos,
)
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
    """Return the folder with a model's files, at or below `folder`; of several, the one named `chosen`."""
    folders = sorted(path.parent for path in folder.rglob(PARAMS))
    if chosen is not None:
        matching = [path for path in folders if chosen in (str(path), path.name, str(path.relative_to(folder)))]
        if len(matching) != 1:
            names = ", ".join(str(path.relative_to(folder)) for path in folders)
            raise BadInput(f"no such model below {folder}", where=f"--model-dir {chosen}", remedy=f"there are: {names}")
        return matching[0]
    if not folders:
        raise BadInput(f"no {PARAMS} here or below", where=folder)
    if len(folders) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in folders)
        raise BadInput(f"several models: {names}", where=folder, remedy="choose with --model-dir")
    return folders[0]


def tokenizer_folder(folder: Path) -> Path:
    """Return the only folder with the tokenizers' files, at or below `folder`."""
    folders = sorted(path.parent for path in folder.rglob(TEXT))
    if len(folders) == 1:
        return folders[0]
    if not folders:
        raise BadInput(f"no {TEXT} here or below", where=folder, remedy="give its folder with --tokenizer")
    raise BadInput(f"several tokenizers: {', '.join(map(str, folders))}", where=folder, remedy="choose with --tokenizer")


def read_params(folder: Path) -> dict[str, Any]:
    """Return params.json, overridden by its `model` and by consolidate_params.json, as Meta's loader does."""
    params = read_json(folder / PARAMS)
    model_params = params.pop("model", {})
    consolidate_params = read_json(folder / MORE_PARAMS) if (folder / MORE_PARAMS).is_file() else {}
    if not isinstance(model_params, dict):
        raise BadInput("model is no object", where=folder / PARAMS)
    return {**params, **model_params, **{key: value for key, value in consolidate_params.items() if key != "model"}}


def shard_files(folder: Path, expected: int | None) -> list[Path]:
    """Return the weights' files in order. Raise `BadInput` that names a missing one. `expected`: their number, if known."""
    single_file = folder / "consolidated.pth"
    if single_file.is_file():
        count, files = 1, [single_file]
    else:
        shard_indices = sorted(int(match[1]) for path in folder.iterdir() if (match := SHARD.fullmatch(path.name)))
        if not shard_indices:
            raise BadInput("no consolidated.pth or consolidated.00.pth", where=folder)
        count = max(expected or 0, shard_indices[-1] + 1)
        files = [folder / f"consolidated.{shard:02d}.pth" for shard in range(count)]
        for path in files:
            if not path.is_file():
                raise BadInput(f"shard is absent, of {count}", where=path)
    if expected not in (None, count):
        raise BadInput(f"model_parallel_size {expected}, but {count} files of weights", where=folder)
    return files


def read_text_tokenizer(path: Path) -> JsonTextTokenizer:
    try:
        return JsonTextTokenizer(path.read_bytes(), path)
    except FileNotFoundError:
        raise BadInput("file is missing", where=path) from None


def read_image_tokenizer(folder: Path, notes: list[str]) -> tuple[VQGANConfig, LazyTensors]:
    """Open the image tokenizer in a tokenizer folder. Tensors of its training (the discriminator's) are ignored."""
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
    modules = {name.partition(".")[0] for name in image_shapes(config)}
    network_tensors = {name: (weights, name) for name in weights if name.partition(".")[0] in modules}
    if len(network_tensors) < len(weights):
        notes.append(
            f"{folder / IMAGE}: ignored {len(weights) - len(network_tensors)} tensors that are no part of the network"
        )
    return image_weights(RenamedTensors(network_tensors), config, where=folder / IMAGE)


def rope_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rotary frequencies that Meta's files contain beside the weights [head_width / 2]."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    return (1.0 / config.rope_theta**exponents).to(dtype)


def stored_rope_frequencies(source: Source, config: ModelConfig) -> Tensor:
    """Return `rope.freqs` as a bundle stores them, else as computed. Meta's loader does not read them."""
    if source.frequencies is None:
        return rope_frequencies(config)
    stored = source.frequencies
    return torch.tensor(stored["values"], dtype=torch.float64).to(getattr(torch, stored["dtype"])).view(stored["shape"])


def rope_frequencies_to_json(tensor: Tensor) -> dict[str, Any] | None:
    """Return the form in which a bundle stores `rope.freqs`, so that they are restored exactly; None for a large table."""
    if tensor.numel() > 4096 or not tensor.is_floating_point():
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "values": tensor.double().flatten().tolist()}


def read_meta(folder: Path, *, model_dir: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Open a model in Meta's format at or below `folder`, with its tokenizers there or in the folder `tokenizer`.

    Raises `BadInput` naming the file and what is wrong with it.
    """
    model_path = model_folder(folder, model_dir)
    tokenizer_path = tokenizer_folder(folder if tokenizer is None else tokenizer)
    params = read_params(model_path)
    files = shard_files(model_path, params.get("model_parallel_size"))
    shards = [TorchFile(path, optional=layout.IGNORED) for path in files]
    embedding = layout.OUTER_PARTS["embed.weight"][0].meta
    if embedding not in shards[0] or shards[0][embedding].dim() != 2:
        raise BadInput(f"tensor {embedding} is missing, or no table", where=files[0])
    config = from_meta_params(params, len(files), vocab_size=len(shards[0][embedding]), where=model_path / PARAMS)
    text = read_text_tokenizer(tokenizer_path / TEXT)
    notes: list[str] = []
    image, image_tensors = read_image_tokenizer(tokenizer_path, notes)
    stored_frequencies = shards[0].get(FREQUENCIES)
    source = Source(
        format="meta",
        name=model_path.resolve().name or None,
        shards=len(files),
        fused=layout.is_fused(shards[0]),
        frequencies=None if stored_frequencies is None else rope_frequencies_to_json(stored_frequencies),
    )
    return Checkpoint(
        config,
        vocabulary_of(text, image, config.vocab_size, tokenizer_path / TEXT),
        layout.from_meta(shards, config, where=model_path, notes=notes),
        text,
        image,
        image_tensors,
        sum(shard.nbytes for shard in shards) + (tokenizer_path / IMAGE).stat().st_size,
        source=source,
        notes=notes,
    )


# --- writing ---------------------------------------------------------------------------------------------------------


class MetaDeviceTensors(LazyTensors):
    """The shapes and dtypes of weights, as tensors on `meta`."""

    def __init__(self, weights: LazyTensors, config: ModelConfig) -> None:
        self.weights, self.names = weights, layout.shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self.names[name], dtype=self.weights.dtype(name), device="meta")


def write_meta(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shards: int | None = None,
    name: str = "model",
    progress: Progress = no_progress,
) -> None:
    """Write Meta's files to an empty folder, with weights in `shards` files (by default as many as they came in).

    Raises `BadInput` where sizes do not divide, or there is no decoder, without which Meta's code would draw noise.
    """
    note_what_is_lost(checkpoint)
    config, source = checkpoint.config, checkpoint.source
    if not checkpoint.image.decoder:
        raise BadInput(
            "the image tokenizer has no decoder, which Meta's format needs",
            where="convert",
            remedy="give the folder of Meta's vqgan.ckpt with --tokenizer",
        )
    num_shards = shards or source.shards or (config.qk_norm_shards if config.qk_norm else 1)
    model_path, tokenizer_path = folder / "models" / (source.name or name), folder / "tokenizer"
    model_path.mkdir(parents=True)
    tokenizer_path.mkdir()
    for path, values in zip((PARAMS, MORE_PARAMS), to_meta_params(config, num_shards), strict=True):
        write_json(model_path / path, values)
    frequencies = stored_rope_frequencies(source, config)

    def sharded(weights: Mapping[str, Tensor]) -> Iterator[tuple[int, str, Tensor]]:
        yield from layout.to_meta(weights, config, num_shards, fused=source.fused)
        yield from ((shard, FREQUENCIES, frequencies) for shard in range(num_shards))

    shapes: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for shard, meta_name, empty in sharded(MetaDeviceTensors(checkpoint.weights, config)):
        shapes[shard][meta_name] = empty
    file_names = (
        ["consolidated.pth"] if num_shards == 1 else [f"consolidated.{shard:02d}.pth" for shard in range(num_shards)]
    )
    with ExitStack() as stack:
        files = [
            stack.enter_context(TorchWriter(model_path / file, shapes[shard])) for shard, file in enumerate(file_names)
        ]
        for shard, meta_name, value in sharded(checkpoint.weights):
            files[shard].write(meta_name, value)
            progress(value.nbytes)
    text = rename_token(to_json_text(checkpoint.text, checkpoint.vocabulary), IMAGE_PLACEHOLDER, RESERVED)
    (tokenizer_path / TEXT).write_bytes(without_bos(text).data)
    shape = yaml.safe_dump(to_meta_vqgan(checkpoint.image), sort_keys=False)
    (tokenizer_path / IMAGE_CONFIG).write_text(shape, encoding="utf-8")
    with TorchWriter(tokenizer_path / IMAGE, checkpoint.image_weights, inside=STATE) as file:
        for meta_name, value in checkpoint.image_weights.items():
            file.write(meta_name, value)
            progress(value.nbytes)
