"""Weighted means of bundles that descend from one another, as of a model before and after a further stage of training.

Training on few data makes a model better at what it was tuned on and worse at all else; on the line between both sets of
weights there are often models that have most of either (arXiv 2109.01903, 2203.05482).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chameleon.bundle import fingerprint_of, read_header, stored_names, with_stage, write_bundle
from chameleon.errors import BadInput
from chameleon.files import atomic_folder, check_new_folder
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer


def average(bundles: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Write a bundle whose Transformer is the weighted mean of those of `bundles`; all else is the last one's.

    weights: of each bundle, scaled to sum to 1; all the same by default. Sums are in float32, one tensor at a time.
    Returns what its provenance says: the fingerprint and weight of each bundle. Raises `BadInput` for bundles of other
    shapes or vocabularies, files that are missing or altered, and where `out` is there already.
    """
    check_new_folder(out)
    if len(bundles) < 2:
        raise BadInput(f"{len(bundles)} bundle", where="average", remedy="give 2 or more")
    shares = normalised(weights or [1.0] * len(bundles), len(bundles))
    headers = [read_header(folder) for folder in bundles]
    for folder, header in zip(bundles, headers, strict=True):
        if header.model != headers[-1].model or header.vocabulary != headers[-1].vocabulary:
            raise BadInput(f"another model or vocabulary than that of {bundles[-1]}", where=folder)
    last = headers[-1]
    tokenizer = MixedTokenizer.load(bundles[-1], last.vocabulary)
    image_tensors = SafetensorsFiles.from_folder(bundles[-1], "image_tokenizer")
    image_names = tokenizer.image.network.released_state_dict()  # in the order of the file
    parents = [fingerprint_of(header.provenance) for header in headers]
    average_of = [{"bundle": parent, "weight": share} for parent, share in zip(parents, shares, strict=True)]
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


def normalised(weights: Sequence[float], count: int) -> list[float]:
    """Return weights that sum to 1. Raise `BadInput` where they are not one finite number for each."""
    total = sum(weights)
    if len(weights) != count or not 0 < total < float("inf"):
        raise BadInput(f"weights {', '.join(map(str, weights))} for {count} bundles", where="weights")
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
