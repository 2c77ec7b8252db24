"""Conversion of checkpoints between four formats: bundle, Meta's, Hugging Face's, Lumina-mGPT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from chameleon.bundle import CONFIG_FILE, PROVENANCE_FILE, Prompting
from chameleon.convert.checkpoint import Checkpoint, Format, add_decoder, read_bundle, write_as_bundle
from chameleon.convert.hugging_face import read_hugging_face, write_hugging_face
from chameleon.convert.lumina import is_lumina, read_lumina, write_lumina
from chameleon.convert.meta import IMAGE, PARAMS, read_image_tokenizer, read_meta, tokenizer_folder, write_meta
from chameleon.errors import BadInput
from chameleon.files import atomic_folder, check_new_folder, read_json
from chameleon.tensor_files import Progress, no_progress


def detect_format(folder: Path) -> Format:
    """Return the format of the checkpoint in a folder. Raise `BadInput` where there is none."""
    if not folder.is_dir():
        raise BadInput("is a file" if folder.exists() else "no such folder", where=folder, remedy="give the folder")
    if (folder / PROVENANCE_FILE).is_file():
        return "bundle"
    has_config = (folder / CONFIG_FILE).is_file()
    if has_config and any(folder.glob("*.safetensors")):
        return "lumina" if is_lumina(read_json(folder / CONFIG_FILE)) else "hf"
    if any(folder.rglob(PARAMS)):
        return "meta"
    if has_config:
        raise BadInput(f"{CONFIG_FILE}, but no .safetensors", where=folder, remedy="other files of weights are not read")
    raise BadInput(
        f"no checkpoint: neither {CONFIG_FILE} here nor {PARAMS} here or below",
        where=folder,
        remedy="give a bundle, a Hugging Face folder, or a folder above Meta's files",
    )


def read(
    source: Path,
    *,
    model_dir: str | None = None,
    tokenizer: Path | None = None,
    prompting: Prompting | None = None,
    target_side: int | None = None,
) -> Checkpoint:
    """Open a checkpoint of any format, without reading its weights yet.

    `model_dir`: which of several Meta models. `tokenizer`: a folder with Meta's tokenizer at or below it, for what the
    source lacks (its decoder, say). `prompting`: how the model is prompted, which the other formats do not say; left out,
    as conversations. `target_side`: of Lumina-mGPT's, see `read_lumina`.
    """
    if tokenizer is not None and not tokenizer.is_dir():
        raise BadInput("no such folder", where=f"--tokenizer {tokenizer}")
    source_format = detect_format(source)
    if model_dir is not None and source_format != "meta":
        raise BadInput("only for Meta's format", where="--model-dir")
    if target_side is not None and source_format != "lumina":
        raise BadInput("only for Lumina-mGPT's format", where="--target-side")
    if source_format == "meta":
        checkpoint = read_meta(source, model_dir=model_dir, tokenizer=tokenizer)
    elif source_format == "lumina":
        checkpoint = read_lumina(source, tokenizer=tokenizer, target_side=target_side)
    else:
        checkpoint = read_hugging_face(source, tokenizer=tokenizer) if source_format == "hf" else read_bundle(source)
        if tokenizer is not None and not checkpoint.image.decoder:
            folder = tokenizer_folder(tokenizer)
            checkpoint = add_decoder(checkpoint, *read_image_tokenizer(folder, checkpoint.notes), folder / IMAGE)
    return checkpoint if prompting is None else replace(checkpoint, prompting=prompting)


def convert(
    source: Path | str,
    target: Path | str,
    to: Format,
    *,
    model_dir: str | None = None,
    tokenizer: Path | str | None = None,
    shards: int | None = None,
    prompting: Prompting | None = None,
    target_side: int | None = None,
    progress: Progress = no_progress,
    on_total: Progress = no_progress,
) -> dict[str, Any]:
    """Read a checkpoint of any format and write it in another, one tensor at a time; return a summary.

    `target`: a folder that is not there yet, or empty; it appears once it is whole. `shards`: files of Meta's weights.
    `on_total` is called with the number of bytes in all, `progress` with those written since its last call. Raises
    `BadInput` naming file and tensor.
    """
    source, target = Path(source), Path(target)
    if to not in get_args(Format):
        raise BadInput(f"{to!r} is none of {', '.join(get_args(Format))}", where="--to")
    if shards is not None and (to != "meta" or shards < 1):
        raise BadInput("shards are Meta's, 1 or more", where="--shards")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise BadInput("lies in the source", where=target, remedy="name a folder elsewhere")
    check_new_folder(target)
    tokenizer_path = None if tokenizer is None else Path(tokenizer)
    checkpoint = read(source, model_dir=model_dir, tokenizer=tokenizer_path, prompting=prompting, target_side=target_side)
    if to != "bundle" and checkpoint.image.levels:
        raise BadInput(
            f"its image codes are combinations of levels, which {to} cannot hold",
            where=source,
            remedy="only codebooks that are a matrix can be written",
        )
    on_total(checkpoint.nbytes)
    with atomic_folder(target) as folder:
        if to == "bundle":
            write_as_bundle(checkpoint, folder, progress)
        elif to == "hf":
            write_hugging_face(checkpoint, folder, progress=progress)
        elif to == "lumina":
            write_lumina(checkpoint, folder, progress=progress)
        else:
            write_meta(checkpoint, folder, shards=shards, name=target.resolve().name, progress=progress)
    return {
        "from": detect_format(source),
        "to": to,
        "out": str(target),
        "parameters": checkpoint.config.parameters,
        "vocabulary": checkpoint.vocabulary.size,
        "qk_norm_shards": checkpoint.config.qk_norm_shards,
        "decoder": checkpoint.image.decoder and to not in ("hf", "lumina"),
        "notes": list(dict.fromkeys(checkpoint.notes)),
    }
