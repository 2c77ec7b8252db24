"""What token shards hold, for people: decoded documents as lines for a terminal, or as a page with pictures and masks."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from chameleon.data.token_shards import TokenShard
from chameleon.gallery import page, picture_tag
from chameleon.tokenizers.mixed import MixedTokenizer, answer_mask
from chameleon.vocabulary import Modality, Vocabulary

# ruff: noqa: E501 (style sheet)
STYLE = """<style>
.document { background: white; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0; overflow-wrap: anywhere; }
.document header { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.text { white-space: pre-wrap; color: var(--soft); } .text.learned { color: var(--ink); background: #d3f0e0; }
.special { font: 11px monospace; color: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0 3px; margin: 0 2px; }
.special.learned { background: #d3f0e0; }
.document img { vertical-align: middle; margin: 3px; border: 3px solid var(--line); max-width: 256px; } .document img.learned { border-color: #5fc592; }
</style>"""
LEGEND = (
    "Green is what the loss is taken on where a recipe says `loss: answers`; of a document without answers it is all, as "
    "with `loss: all`. The first id is never a target."
)


@dataclass(frozen=True)
class Segment:
    """A run of ids of one kind: a text, a whole picture with boi and eoi, a special, or codes of a picture cut short."""

    kind: str
    ids: tuple[int, ...]
    learned: bool


def segments(ids: torch.Tensor, vocabulary: Vocabulary) -> Iterator[Segment]:
    """The segments of a document's ids [T], which joined are the ids again."""
    v = vocabulary
    learned = torch.from_numpy(answer_mask(ids.numpy(), v))
    if not bool((ids == v.sep).any()):
        learned = torch.ones_like(learned)
    learned[:1] = False
    kinds, values, taken = v.modality(ids).tolist(), ids.tolist(), learned.tolist()
    place = 0
    while place < len(values):
        start = place
        block = values[place : place + v.block_length]
        if values[place] == v.boi and len(block) == v.block_length and block[-1] == v.eoi:
            place += v.block_length
            yield Segment("picture", tuple(block), taken[start + 1])
            continue
        place += 1
        if kinds[start] != Modality.STRUCTURE:
            while place < len(values) and (kinds[place], taken[place]) == (kinds[start], taken[start]):
                place += 1
        names = {Modality.TEXT: "text", Modality.IMAGE: "codes"}
        kind = names.get(Modality(kinds[start])) or special_name(values[start], v)
        yield Segment(kind, tuple(values[start:place]), taken[start])


def special_name(number: int, vocabulary: Vocabulary) -> str:
    return next((name for name, value in vocabulary.specials.items() if value == number), f"id {number}")


def chosen(shards: Sequence[TokenShard], count: int) -> list[tuple[TokenShard, int]]:
    """`count` documents spread evenly over all."""
    firsts = list(accumulate(map(len, shards), initial=0))
    count = min(count, firsts[-1])
    wanted = [place * firsts[-1] // count for place in range(count)]
    return [
        (shard, number - first)
        for shard, (first, end) in zip(shards, pairwise(firsts), strict=True)
        for number in wanted
        if first <= number < end
    ]


def describe(shard: TokenShard, number: int, tokenizer: MixedTokenizer) -> dict[str, Any]:
    """A document as JSON: where it lies, its counts of ids, and its segments, pictures by their marker."""
    ids = torch.from_numpy(shard[number])
    parts = [
        {"kind": part.kind, "ids": len(part.ids), "learned": part.learned}
        | ({"text": tokenizer.text_bytes(part.ids).decode("utf-8", errors="replace")} if part.kind == "text" else {})
        for part in segments(ids, tokenizer.vocabulary)
    ]
    return {"shard": shard.folder.name, "document": number, "tokens": len(ids), **counts(parts), "parts": parts}


def counts(parts: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "text_tokens": sum(part["ids"] for part in parts if part["kind"] == "text"),
        "pictures": sum(part["kind"] == "picture" for part in parts),
        "learned_tokens": sum(part["ids"] for part in parts if part["learned"]),
    }


def title(found: dict[str, Any]) -> str:
    return (
        f"{found['shard']}, document {found['document']}: {found['tokens']} ids, {found['text_tokens']} of text, "
        f"{found['pictures']} pictures, loss on {found['learned_tokens']}"
    )


def as_line(found: dict[str, Any]) -> str:
    """A described document for a terminal: what the loss is taken on stands between « and »."""
    shown = []
    for part in found["parts"]:
        text = part.get("text", f"[{part['kind']}]" if part["kind"] in ("picture", "codes") else f"<{part['kind']}>")
        shown.append(f"«{text}»" if part["learned"] else text)
    return f"{title(found)}\n{''.join(shown)}"


def as_page(documents: Sequence[tuple[TokenShard, int]], tokenizer: MixedTokenizer, name: str) -> str:
    """One self-contained page of documents with their pictures decoded, and what the loss is taken on in green."""
    v = tokenizer.vocabulary
    shown = []
    for shard, number in documents:
        parts = []
        for part in segments(torch.from_numpy(shard[number]), v):
            kind = "learned" if part.learned else ""
            if part.kind == "text":
                text = tokenizer.text_bytes(part.ids).decode("utf-8", errors="replace")
                parts.append(f'<span class="text {kind}">{html.escape(text)}</span>')
            elif part.kind == "picture" and set(part.ids[1:-1]) <= set(v.image_ids.order):
                codes = v.ids_to_codes(torch.tensor(part.ids[1:-1])).view(1, *v.grid)
                parts.append(picture_tag(tokenizer.image.decode(codes)[0], kind))
            else:
                parts.append(f'<span class="special {kind}">{html.escape(part.kind)}</span>')
        heading = html.escape(title(describe(shard, number, tokenizer)))
        shown.append(f'<div class="document"><header>{heading}</header>{"".join(parts)}</div>')
    return page([STYLE, f"<p>{html.escape(LEGEND)}</p>", *shown], f"Token shards: {name}", f"{len(shown)} documents.")
