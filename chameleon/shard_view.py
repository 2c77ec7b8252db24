"""Views of token shards: decoded documents as lines for a terminal, or as a page with images and loss masks."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from chameleon.data.token_shards import TokenShard
from chameleon.html_page import page, picture_tag
from chameleon.tokenizers.mixed import MixedTokenizer, answer_mask
from chameleon.vocabulary import Modality, Vocabulary

# ruff: noqa: E501 (style sheet)
STYLE = """<style>
.document { background: white; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0; overflow-wrap: anywhere; }
.document header { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.text { white-space: pre-wrap; color: var(--soft); } .text.loss { color: var(--ink); background: #d3f0e0; }
.special { font: 11px monospace; color: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0 3px; margin: 0 2px; }
.special.loss { background: #d3f0e0; }
.document img { vertical-align: middle; margin: 3px; border: 3px solid var(--line); max-width: 256px; } .document img.loss { border-color: #5fc592; }
</style>"""
LEGEND = (
    "The loss is taken on green tokens where a recipe has `loss: answers`; in a document without answers, on all tokens, as "
    "with `loss: all`. The first token is never a target."
)


@dataclass(frozen=True)
class TokenSpan:
    """A span of tokens of one kind: a text, a complete image with boi and eoi, a special token, or stray codes."""

    kind: str
    token_ids: tuple[int, ...]
    has_loss: bool


def token_spans(token_ids: torch.Tensor, vocabulary: Vocabulary) -> Iterator[TokenSpan]:
    """Split a document's token ids [T] into spans."""
    v = vocabulary
    mask = torch.from_numpy(answer_mask(token_ids.numpy(), v))
    if not bool((token_ids == v.sep).any()):
        mask = torch.ones_like(mask)
    mask[:1] = False
    modality, values, has_loss = v.modality(token_ids).tolist(), token_ids.tolist(), mask.tolist()
    position = 0
    while position < len(values):
        start = position
        if (image := v.read_image(values, start)) is not None:
            position += image.length
            yield TokenSpan("image", tuple(values[start:position]), has_loss[start + 1])
            continue
        position += 1
        if modality[start] != Modality.STRUCTURE:
            first = (modality[start], has_loss[start])
            while position < len(values) and (modality[position], has_loss[position]) == first:
                position += 1
        names = {Modality.TEXT: "text", Modality.IMAGE: "codes"}
        kind = names.get(Modality(modality[start])) or special_name(values[start], v)
        yield TokenSpan(kind, tuple(values[start:position]), has_loss[start])


def special_name(token_id: int, vocabulary: Vocabulary) -> str:
    return next((name for name, value in vocabulary.specials.items() if value == token_id), f"id {token_id}")


def evenly_spaced_documents(shards: Sequence[TokenShard], count: int) -> list[tuple[TokenShard, int]]:
    """Return `count` documents (shard, index), evenly spaced over all."""
    first_documents = list(accumulate(map(len, shards), initial=0))
    total = first_documents[-1]
    count = min(count, total)
    document_indices = [index * total // count for index in range(count)]
    return [
        (shard, document - first)
        for shard, (first, end) in zip(shards, pairwise(first_documents), strict=True)
        for document in document_indices
        if first <= document < end
    ]


def describe(shard: TokenShard, index: int, tokenizer: MixedTokenizer) -> dict[str, Any]:
    """Return a document as JSON: where it is, counts of its tokens, and its spans, images by their marker."""
    token_ids = torch.from_numpy(shard[index])
    parts = []
    for span in token_spans(token_ids, tokenizer.vocabulary):
        part: dict[str, Any] = {"kind": span.kind, "tokens": len(span.token_ids), "loss": span.has_loss}
        if span.kind == "text":
            part["text"] = tokenizer.text_bytes(span.token_ids).decode("utf-8", errors="replace")
        parts.append(part)
    return {
        "shard": shard.folder.name,
        "document": index,
        "tokens": len(token_ids),
        "text_tokens": sum(part["tokens"] for part in parts if part["kind"] == "text"),
        "images": sum(part["kind"] == "image" for part in parts),
        "loss_tokens": sum(part["tokens"] for part in parts if part["loss"]),
        "parts": parts,
    }


def title(document: dict[str, Any]) -> str:
    return (
        f"{document['shard']}, document {document['document']}: {document['tokens']} tokens, {document['text_tokens']} of "
        f"text, {document['images']} images, loss on {document['loss_tokens']}"
    )


def as_line(document: dict[str, Any]) -> str:
    """Return a described document for a terminal, with « and » around tokens on which the loss is taken."""
    shown = []
    for part in document["parts"]:
        is_image = part["kind"] in ("image", "codes")
        text = part.get("text", f"[{part['kind']}]" if is_image else f"<{part['kind']}>")
        shown.append(f"«{text}»" if part["loss"] else text)
    return f"{title(document)}\n{''.join(shown)}"


def as_page(documents: Sequence[tuple[TokenShard, int]], tokenizer: MixedTokenizer, name: str) -> str:
    """Return a self-contained page of documents with their images decoded; tokens with loss are green."""
    v = tokenizer.vocabulary
    shown = []
    for shard, index in documents:
        parts = []
        for span in token_spans(torch.from_numpy(shard[index]), v):
            css_class = "loss" if span.has_loss else ""
            if span.kind == "text":
                text = tokenizer.text_bytes(span.token_ids).decode("utf-8", errors="replace")
                parts.append(f'<span class="text {css_class}">{html.escape(text)}</span>')
            elif (image := v.read_image(span.token_ids)) is not None:
                codes = v.image_codes(image).unsqueeze(0)
                parts.append(picture_tag(tokenizer.image.decode(codes)[0], css_class))
            else:
                parts.append(f'<span class="special {css_class}">{html.escape(span.kind)}</span>')
        heading = html.escape(title(describe(shard, index, tokenizer)))
        shown.append(f'<div class="document"><header>{heading}</header>{"".join(parts)}</div>')
    return page([STYLE, f"<p>{html.escape(LEGEND)}</p>", *shown], f"Token shards: {name}", f"{len(shown)} documents.")
