"""Likelihood of text under a model, in bits for a byte of UTF-8."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from chameleon.data.packing import cut
from chameleon.document import Document
from chameleon.generation.chameleon import Chameleon
from chameleon.model.loss import chunked_cross_entropy


@torch.inference_mode()
def bits_per_byte(model: Chameleon, documents: Iterable[Document], limit_bytes: int = 200_000) -> float:
    """Bits a byte over documents of text, the end of each counted; a document longer than the context goes in parts.

    Parts are read without what came before them, so the figure is an upper bound for long documents.
    """
    context = model.model.config.context
    bits, read = 0.0, 0
    for document in documents:
        if read >= limit_bytes:
            break
        ids = model.encode(document)
        bounds = (np.array([0]), np.array([len(ids)]))
        for _, start, size in zip(*cut(*bounds, np.empty(0, dtype=int), 1, context), strict=True):
            # A later part is read behind bos.
            part = torch.cat((ids[:1], ids[start + 1 : start + 1 + size]))
            hidden = model.model(part[None, :-1].to(model.engine.device))[0]
            weights = torch.ones(len(part) - 1, device=hidden.device)
            targets = part[1:].to(hidden.device)
            bits += float(chunked_cross_entropy(hidden, model.model.head.weight, targets, weights, z_loss=0.0).loss)
        read += len(document.text.encode())
    return bits / math.log(2) / max(1, read)
