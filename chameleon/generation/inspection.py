"""Looking into a sequence: what the model thought of each token, where it attended, and what a code stands for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.dialect import Grid
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.model.transformer import ScaledDotProductAttention

POSITIONS_PER_CHUNK = 256
"""Positions whose logits exist at one time."""


class TokenScores(NamedTuple):
    """What the model predicted at each position of a sequence [T] but the first, from the tokens before it."""

    log_probs: Tensor
    """float32 [T − 1]: natural logarithm of the probability of tokens 1 … T − 1."""
    entropies: Tensor
    """float32 [T − 1], in nats."""
    top_log_probs: Tensor
    """float32 [T − 1, K] of the likeliest tokens, in descending order."""
    top_ids: Tensor
    """int64 [T − 1, K]."""


@torch.inference_mode()
def token_scores(model: Chameleon, token_ids: list[int], top: int, *, text_only: bool = False) -> TokenScores:
    """Score a sequence in one pass, over the whole vocabulary and without any constraint or temperature.

    text_only: over all tokens but image codes, where the target is none.
    Raises `BadInput` for a sequence that is longer than the context, and for token ids outside the vocabulary.
    """
    check_sequence(model, token_ids)
    inputs, targets = torch.tensor([token_ids[:-1] or token_ids]), torch.tensor(token_ids[1:])
    hidden = model.model(inputs.to(model.engine.device))[0, : len(targets)]
    parts = []
    for states, target in zip(hidden.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True):
        logits = model.model.logits(states).float()
        if text_only:
            is_text = ~model.vocabulary.is_image(target).to(logits.device)
            logits[is_text] = mask_image_codes(model, logits[is_text])
        log_probs = logits.log_softmax(-1)
        target_log_probs = log_probs.gather(1, target.to(log_probs.device).unsqueeze(1)).squeeze(1)
        values, ids = log_probs.topk(min(top, log_probs.shape[1]), dim=-1)
        parts.append((target_log_probs, -(log_probs.exp() * log_probs).sum(-1), values, ids))
    return TokenScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def mask_image_codes(model: Chameleon, logits: Tensor) -> Tensor:
    """Return logits [..., vocab_size] whose values for image codes are the least of their dtype, changed in place."""
    for first, count in model.vocabulary.image_ids.ranges:
        logits[..., first : first + count] = torch.finfo(logits.dtype).min
    return logits


def check_sequence(model: Chameleon, token_ids: list[int]) -> None:
    """Raise `BadInput` unless the model can read the sequence; the last token need not be an input."""
    context_length = model.model.config.context_length
    if not 1 <= len(token_ids) <= context_length + 1:
        raise BadInput(f"{len(token_ids)} tokens, the context length is {context_length}", where="token ids")
    if not 0 <= min(token_ids) <= max(token_ids) < model.vocabulary.size:
        raise BadInput(f"a token id is not below {model.vocabulary.size}", where="token ids")


@torch.inference_mode()
def attention_weights(model: Chameleon, token_ids: list[int], position: int, layer: int) -> Tensor:
    """Return the attention of the token at `position` to itself and those before it: float32 [H, position + 1]."""
    check_sequence(model, token_ids)
    config = model.model.config
    if not 0 <= position < min(len(token_ids), config.context_length):
        raise BadInput(f"{position} is outside the {len(token_ids)} tokens or the context", where="position")
    if not 0 <= layer < config.layers:
        raise BadInput(f"{layer} is none of {config.layers} layers", where="layer")
    seen: list[tuple[Tensor, Tensor]] = []
    (attention,) = (m for m in model.model.blocks[layer].modules() if isinstance(m, ScaledDotProductAttention))
    handle = attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], inputs[1])))
    try:
        model.model(torch.tensor([token_ids[: position + 1]], device=model.engine.device))
    finally:
        handle.remove()
    q, k = (part[0].float() for part in seen[0])  # [H, T, C], [K, T, C]
    keys = k.repeat_interleave(len(q) // len(k), dim=0)
    return (torch.einsum("hc, htc -> ht", q[:, -1], keys) / math.sqrt(q.shape[-1])).softmax(-1).cpu()


def picture_of_code(model: Chameleon, code: int) -> PILImage.Image:
    """Return the middle cell of an image that has this code everywhere."""
    if not 0 <= code < model.vocabulary.num_image_codes:
        raise BadInput(f"{code} is none of {model.vocabulary.num_image_codes} codes", where="code")
    height, width = model.vocabulary.grid
    image = model.tokenizer.image.decode(torch.full((1, height, width), code))[0]
    cell_width, cell_height = image.width // width, image.height // height
    left, top = width // 2 * cell_width, height // 2 * cell_height
    return image.crop((left, top, left + cell_width, top + cell_height))


def pictures_in(model: Chameleon, token_ids: list[int]) -> list[tuple[int, Grid, PILImage.Image]]:
    """Return the whole images of a sequence, each with the position of its first code, and its grid."""
    v = model.vocabulary
    blocks = [(position, v.read_image(token_ids, position)) for position in range(len(token_ids))]
    images = [(position + 1 + v.dialect.header_length, block) for position, block in blocks if block is not None]
    if not images or not model.tokenizer.image.config.decoder:
        return []
    pictures = model.tokenizer.image.decode_all([v.image_codes(block) for _, block in images])
    return [(start, block.grid, picture) for (start, block), picture in zip(images, pictures, strict=True)]
