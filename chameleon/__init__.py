"""Open Chameleon: unified multimodal token models, one Transformer over text and image tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chameleon.bundle import Bundle
    from chameleon.document import Conversation, Document, Image, Message, Text
    from chameleon.errors import BadInput
    from chameleon.generation.chameleon import Chameleon
    from chameleon.generation.sampling import GREEDY, Sampling
    from chameleon.vocabulary import Vocabulary

# Imported on first use, so that `import chameleon` is fast and does not import torch.
PUBLIC = {
    "BadInput": "chameleon.errors",
    "Bundle": "chameleon.bundle",
    "Chameleon": "chameleon.generation.chameleon",
    "Conversation": "chameleon.document",
    "Document": "chameleon.document",
    "GREEDY": "chameleon.generation.sampling",
    "Image": "chameleon.document",
    "Message": "chameleon.document",
    "Sampling": "chameleon.generation.sampling",
    "Text": "chameleon.document",
    "Vocabulary": "chameleon.vocabulary",
}

__all__ = [
    "GREEDY",
    "BadInput",
    "Bundle",
    "Chameleon",
    "Conversation",
    "Document",
    "Image",
    "Message",
    "Sampling",
    "Text",
    "Vocabulary",
]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
