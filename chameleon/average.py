"""Weighted means of bundles that descend from one another, as of a model before and after a further stage of training.

Training on few data makes a model better at what it was tuned on and worse at all else; on the line between both sets of
weights there are often models that have most of either (arXiv 2109.01903, 2203.05482).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chameleon.bundle import BundleHeader, fingerprint_of, read_header, stored_names, with_stage, write_bundle
from chameleon.errors import BadInput
from chameleon.files import atomic_folder, check_new_folder
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer


def average(bundles: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Write a bundle whose Transformer is the weighted mean of those of `bundles`; all else is the last one's.

    weights: of each bundle, scaled to sum to 1; all the same by default. Sums are in float32, one tensor at a time.
    Returns what its provenance says: the fingerprint and weight of each bundle, and the training of those whose training
    the last one's does not go on from. Raises `BadInput` for bundles of other shapes or tokenizers, files that are missing
    or altered, and where `out` is there already.
    """
    check_new_folder(out)
    if len(bundles) < 2:
        raise BadInput(f"{len(bundles)} bundle", where="average", remedy="give 2 or more")
    shares = normalised([1.0] * len(bundles) if weights is None else weights, len(bundles))
    headers = [read_header(folder) for folder in bundles]
    last = headers[-1]
    tokenizer = MixedTokenizer.load(bundles[-1], last.vocabulary)
    for folder, header in zip(bundles[:-1], headers[:-1], strict=True):
        check_same_kind(folder, header, bundles[-1], last, tokenizer)
    image_tensors = SafetensorsFiles.from_folder(bundles[-1], "image_tokenizer")
    image_names = tokenizer.image.network.released_state_dict()  # in the order of the file
    average_of = [parent_record(header, share, last) for header, share in zip(headers, shares, strict=True)]
    with atomic_folder(out) as partial:
        write_bundle(
            partial,
            last.model,
            last.vocabulary,
            mean_tensors([SafetensorsFiles.from_folder(folder) for folder in bundles], stored_names(last.model), shares),
            tokenizer.text,
            tokenizer.image.config,
            {name: image_tensors[name] for name in image_names},
            prompting=last.prompting,
            provenance=with_stage(last.provenance, {"average_of": average_of}),
            generation=last.generation,
        )
    return {"out": str(out), "average_of": average_of}


def check_same_kind(
    folder: Path, header: BundleHeader, last_folder: Path, last: BundleHeader, tokenizer: MixedTokenizer
) -> None:
    """Raise `BadInput` where a bundle's tensors have another shape or meaning than the last one's.

    Dropout may differ: it holds for training alone, and fine-tuning has less of it.
    """
    shapes = [asdict(replace(of.model, dropout=0.0)) for of in (header, last)]
    differing = [name for name in shapes[0] if shapes[0][name] != shapes[1][name]]
    if header.vocabulary != last.vocabulary:
        differing.append("vocabulary")
    if not differing and MixedTokenizer.load(folder, header.vocabulary).fingerprint != tokenizer.fingerprint:
        differing.append("tokenizers")
    if differing:
        raise BadInput(f"not of one kind with {last_folder}: they differ in {', '.join(differing)}", where=folder)


def parent_record(header: BundleHeader, share: float, last: BundleHeader) -> dict[str, Any]:
    """Return what the provenance says of a bundle that was averaged, with its training unless the last one's says it."""
    record: dict[str, Any] = {"bundle": fingerprint_of(header.provenance), "weight": share}
    stages, last_stages = (of.provenance.get("training", []) for of in (header, last))
    if stages != last_stages[: len(stages)]:
        record["training"] = stages
    return record


def normalised(weights: Sequence[float], count: int) -> list[float]:
    """Return weights that sum to 1. Raise `BadInput` where they are not one finite number for each, or sum to 0 or less."""
    total = sum(weights)
    if len(weights) != count:
        raise BadInput(f"{len(weights)} weights for {count} bundles", where="weights", remedy="give one for each")
    if not (math.isfinite(total) and total > 0):
        raise BadInput(
            f"{', '.join(map(str, weights))} sum to {total}", where="weights", remedy="their sum must be above 0 and finite"
        )
    return [weight / total for weight in weights]


def mean_tensors(
    sources: Sequence[Mapping[str, Tensor]], names: Sequence[str], shares: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weighted mean of each tensor, in the dtype of the last source's."""
    for name in names:
        tensors = [source[name] for source in sources]
        mean = torch.zeros(tensors[-1].shape)
        for tensor, share in zip(tensors, shares, strict=True):
            mean.add_(tensor.float(), alpha=share)
        yield name, mean.to(tensors[-1].dtype)
