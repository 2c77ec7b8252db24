"""Likelihood of text under a model, in bits per byte of UTF-8."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from chameleon.data.packing import split_long_documents
from chameleon.document import Document
from chameleon.generation.chameleon import Chameleon
from chameleon.model.loss import chunked_cross_entropy


@torch.inference_mode()
def bits_per_byte(model: Chameleon, documents: Iterable[Document], max_bytes: int = 200_000) -> float:
    """Return bits per byte over text documents, the end of each included; documents are read until `max_bytes`.

    A document longer than the context length is split into segments, which are read without the text before them, so the
    value is an upper bound for long documents.
    """
    context_length = model.model.config.context_length
    nats, bytes_read = 0.0, 0
    for document in documents:
        if bytes_read >= max_bytes:
            break
        token_ids = model.encode(document)
        bounds = (np.array([0]), np.array([len(token_ids)]))
        segments = split_long_documents(*bounds, np.empty(0, dtype=int), 1, context_length)
        for _, start, size in zip(*segments, strict=True):
            segment = torch.cat((token_ids[:1], token_ids[start + 1 : start + 1 + size]))  # each segment follows bos
            hidden = model.model(segment[None, :-1].to(model.engine.device))[0]
            weights = torch.ones(len(segment) - 1, device=hidden.device)
            targets = segment[1:].to(hidden.device)
            nats += float(chunked_cross_entropy(hidden, model.model.head.weight, targets, weights, z_loss=0.0).loss)
        bytes_read += len(document.text.encode())
    return nats / math.log(2) / max(1, bytes_read)
