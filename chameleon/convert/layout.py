"""Where each tensor of the Transformer lies in Meta's and in Hugging Face's checkpoints: key maps as data.

Three things differ, and nothing is lost in any of them:

* names, and what is one matrix (Meta: q, k, v and gate, up apart or fused, as found; Hugging Face: apart);
* rotary pairs: (2i, 2i + 1) in Meta's, (i, i + half) in Hugging Face's and here, so rows of q and k and the entries of
  their norms are reordered within each head;
* model-parallel shards: Meta splits matrices over files and keeps one QK-norm row a shard; Hugging Face repeats that row
  for every head of the shard; here it is one row a shard in one tensor.

Sources are any mappings from names to tensors, so they may be lazy: one tensor of ours is made at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One tensor of Meta's and Hugging Face's that makes up one of ours, or a share of its rows."""

    meta: str
    hf: str
    split: Literal["rows", "columns", "none", "norm"] = "none"
    """How Meta's shards divide it; `norm`: a vector of each shard's own, which Hugging Face repeats for each head."""
    rotary: bool = False
    """Whether its rows (of a norm: its entries) are in the order of rotary pairs."""
    heads: Literal["q", "kv", ""] = ""
    """Whose heads its rows, or a norm's repetitions, are."""


def block_parts() -> dict[str, tuple[Part, ...]]:
    """Name within a block → its parts, one below the other."""
    ours, theirs = "layers.{n}.attention.", "model.layers.{n}.self_attn."
    mlp, their_mlp = "layers.{n}.feed_forward.", "model.layers.{n}.mlp."
    table = {
        "attention.qkv.weight": (
            Part(ours + "wq.weight", theirs + "q_proj.weight", "rows", True, "q"),
            Part(ours + "wk.weight", theirs + "k_proj.weight", "rows", True, "kv"),
            Part(ours + "wv.weight", theirs + "v_proj.weight", "rows", False, "kv"),
        ),
        "attention.out.weight": (Part(ours + "wo.weight", theirs + "o_proj.weight", "columns"),),
        "attention_norm.weight": (Part("layers.{n}.attention_norm.weight", "model.layers.{n}.input_layernorm.weight"),),
        "ffn.gate_up.weight": (
            Part(mlp + "w1.weight", their_mlp + "gate_proj.weight", "rows"),
            Part(mlp + "w3.weight", their_mlp + "up_proj.weight", "rows"),
        ),
        "ffn.down.weight": (Part(mlp + "w2.weight", their_mlp + "down_proj.weight", "columns"),),
        "ffn_norm.weight": (Part("layers.{n}.ffn_norm.weight", "model.layers.{n}.post_attention_layernorm.weight"),),
    }
    for name, heads in (("q", "q"), ("k", "kv")):
        for kind in ("weight", "bias"):
            part = Part(f"{ours}{name}_normalization.{kind}", f"{theirs}{name}_norm.{kind}", "norm", True, heads)  # type: ignore[arg-type]
            table[f"attention.{name}_norm.{kind}"] = (part,)
    return table


BLOCK = block_parts()
ENDS = {
    "embed.weight": (Part("tok_embeddings.weight", "model.embed_tokens.weight", "columns"),),
    "norm.weight": (Part("norm.weight", "model.norm.weight"),),
    "head.weight": (Part("output.weight", "lm_head.weight", "rows"),),
}
# Fused name → the parts that lie in it, one below the other, in each shard.
FUSED = {
    "attention.wqkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "feed_forward.w13.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}
IGNORED = ("rope.freqs",)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · C, …] from pairs (2i, 2i + 1) of each head to pairs (i, i + C / 2)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name → shape of every tensor of a Transformer. A tied head is listed like any other."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Transformer(config).state_dict().items()}


def parts_of(name: str) -> tuple[Part, ...]:
    """The parts of our tensor `name`, with the block's number put in."""
    if not name.startswith("blocks."):
        return ENDS[name]
    _, number, inner = name.split(".", 2)
    return tuple(
        Part(part.meta.format(n=number), part.hf.format(n=number), part.split, part.rotary, part.heads)
        for part in BLOCK[inner]
    )


def lender(name: str, config: ModelConfig, has_head: bool) -> str:
    """Whose parts tensor `name` is read from: itself, or the embedding where a tied head is not written."""
    return "embed.weight" if name == "head.weight" and config.tied_head and not has_head else name


def head_count(config: ModelConfig, part: Part) -> int:
    return config.heads if part.heads == "q" else config.kv_heads


def rows_of(config: ModelConfig, part: Part, shape: torch.Size) -> int:
    """How many of our tensor's rows are the part's."""
    if part.heads and part.split == "rows":
        return head_count(config, part) * config.head_width
    return config.ffn_width if ".w1." in part.meta or ".w3." in part.meta else shape[0]


def fit(name: str, value: Tensor, shape: Sequence[int], where: object) -> Tensor:
    """`value`, or `BadInput` that names the tensor whose shape or dtype is not what it must be."""
    if tuple(value.shape) != tuple(shape):
        raise BadInput(f"tensor {name} is {list(value.shape)}, expected {list(shape)}", where=where)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(
            f"tensor {name} is of dtype {value.dtype}", where=where, remedy="expected float32, bfloat16 or float16"
        )
    return value


def take(source: Weights, name: str, where: object) -> Tensor:
    if name not in source:
        raise BadInput(f"tensor {name} is missing", where=where)
    return source[name]


def refuse_extra(source: Weights, known: set[str], where: object) -> None:
    extra = sorted(set(source) - known)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise BadInput(f"tensor {extra[0]}{more} is not of this model", where=where)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def from_hf(source: Weights, config: ModelConfig, *, where: object = "checkpoint") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of ours, in order. `source`: names and tensors of the language model alone.

    A head that is missing is taken for tied. Raises `BadInput` that names the first tensor that is missing, unknown, of
    the wrong shape or dtype, or whose norms differ within a shard of `config.qk_norm_shards`.
    """
    known: set[str] = set()
    for name, shape in shapes(config).items():
        values = []
        for part in parts_of(lender(name, config, ENDS["head.weight"][0].hf in source)):
            key = part.hf
            value = take(source, key, where)
            known.add(key)
            if part.split == "norm":
                heads = head_count(config, part)
                value = fit(key, value, (heads, config.head_width), where).unflatten(0, (config.qk_norm_shards, -1))
                if not torch.equal(value, value[:, :1].expand_as(value)):
                    raise BadInput(
                        f"tensor {key} differs within its {config.qk_norm_shards} shards",
                        where=where,
                        remedy="use more shards",
                    )
                values.append(value[:, 0])
            else:
                values.append(fit(key, value, (rows_of(config, part, shape), *shape[1:]), where))
        yield name, values[0] if len(values) == 1 else torch.cat(values)
    refuse_extra(source, known, where)


def to_hf(ours: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of Hugging Face's language model. `ours` gives our tensor of a name. A tied head is left out."""
    for name, shape in shapes(config).items():
        if name == "head.weight" and config.tied_head:
            continue
        value, start = ours(name), 0
        for part in parts_of(name):
            if part.split == "norm":
                yield part.hf, value.repeat_interleave(head_count(config, part) // config.qk_norm_shards, dim=0)
            else:
                count = rows_of(config, part, shape)
                yield part.hf, value[start : start + count]
                start += count


# --- Meta ------------------------------------------------------------------------------------------------------------


def is_fused(source: Weights) -> bool:
    """Whether a shard keeps q, k, v (and gate, up) as one matrix."""
    return any(name.endswith(tuple(FUSED)) for name in source)


def unfuse(source: Weights, name: str, config: ModelConfig, shards: int, where: object) -> tuple[str, Tensor]:
    """The tensor `name` of one shard and the key it was found under: itself, or rows of a fused one."""
    for fused, inner in FUSED.items():
        for place, part in enumerate(inner):
            key = name.removesuffix(part) + fused
            if not name.endswith("." + part) or key not in source or name in source:
                continue
            heads = (config.heads, config.kv_heads, config.kv_heads)
            sizes = [count * config.head_width for count in heads] if len(inner) == 3 else [config.ffn_width] * 2
            sizes = [size // shards for size in sizes]
            return key, fit(key, source[key], (sum(sizes), config.width), where).split(sizes)[place]
    return name, take(source, name, where)


def check_shards(config: ModelConfig, shards: int, where: object) -> None:
    for name in ("width", "heads", "kv_heads", "ffn_width", "vocab_size"):
        if getattr(config, name) % shards:
            raise BadInput(f"{name} {getattr(config, name)} does not divide by {shards} shards", where=where)


def from_meta(
    sources: Sequence[Weights], config: ModelConfig, *, where: object = "checkpoint"
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of ours, in order, joined from the shards.

    QK-norm rows are the shards' own, so `config.qk_norm_shards` must be their number. Raises `BadInput` that names shard
    and tensor for what is missing, unknown, of the wrong shape or dtype, and for norms that shards should share but do not.
    """
    shards = len(sources)
    check_shards(config, shards, where)
    if config.qk_norm and config.qk_norm_shards != shards:
        raise BadInput(f"{config.qk_norm_shards} QK-norm rows, {shards} shards", where=where)
    places = [f"{where}, shard {number:02d}" for number in range(shards)]
    known: list[set[str]] = [set(IGNORED) for _ in sources]
    has_head = any(ENDS["head.weight"][0].meta in source for source in sources)
    for name, shape in shapes(config).items():
        values = []
        for part in parts_of(lender(name, config, has_head)):
            rows = rows_of(config, part, shape)
            wanted = {
                "rows": (rows // shards, *shape[1:]),
                "columns": (rows, shape[-1] // shards),
                "none": tuple(shape),
                "norm": (config.head_width,),
            }[part.split]
            found = []
            for number, source in enumerate(sources):
                key, value = unfuse(source, part.meta, config, shards, places[number])
                known[number].add(key)
                found.append(fit(part.meta, value, wanted, places[number]))
            values.append(join(part, found, config, places))
        yield name, values[0] if len(values) == 1 else torch.cat(values)
    for source, keys, place in zip(sources, known, places, strict=True):
        refuse_extra(source, keys, place)


def join(part: Part, found: Sequence[Tensor], config: ModelConfig, places: Sequence[str]) -> Tensor:
    """What the shards have of a part as one tensor, rotary pairs as ours are; `places` name the shards in errors."""
    if part.split == "none":
        for value, place in zip(found, places, strict=True):
            if not torch.equal(value, found[0]):
                raise BadInput(f"tensor {part.meta} is not that of shard 00", where=place)
        return found[0]
    if part.split == "norm":
        return torch.stack([to_halves(value, 1) for value in found])
    value = found[0] if len(found) == 1 else torch.cat(list(found), dim=0 if part.split == "rows" else 1)
    return to_halves(value, head_count(config, part)) if part.rotary else value


def to_meta(
    ours: Callable[[str], Tensor], config: ModelConfig, shards: int, shard: int, *, fused: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of Meta's shard number `shard` of `shards`, without `rope.freqs`.

    Raises `BadInput` where sizes do not divide, or heads of one shard have different QK-norm rows.
    """
    check_shards(config, shards, "model")
    if config.qk_norm and shards % config.qk_norm_shards and config.qk_norm_shards > 1:
        raise BadInput(f"{config.qk_norm_shards} QK-norm rows do not go into {shards} shards", where="model")
    for name, shape in shapes(config).items():
        if name == "head.weight" and config.tied_head:
            continue
        value, start, made = ours(name), 0, []
        for part in parts_of(name):
            rows = rows_of(config, part, shape)
            piece = value[start : start + rows]
            start += rows
            if part.split == "norm":
                piece = to_pairs(value[shard * config.qk_norm_shards // shards], 1)
            elif part.rotary:
                piece = to_pairs(piece, head_count(config, part))
            if part.split in ("rows", "columns"):
                piece = piece.chunk(shards, dim=0 if part.split == "rows" else 1)[shard]
            made.append((part.meta, piece.contiguous()))
        if fused and len(made) > 1:
            inner = next(key for key, names in FUSED.items() if made[0][0].endswith(names[0]))
            prefix = made[0][0].removesuffix(FUSED[inner][0])
            made = [(prefix + inner, torch.cat([piece for _, piece in made]))]
        yield from made
