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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tensor_files import Weights


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


def norm_rows(config: ModelConfig, part: Part) -> int:
    return config.qk_norm_shards if part.heads == "q" else config.k_norm_shards


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


def check_names(found: Iterable[str], wanted: set[str], where: object) -> None:
    """Raises `BadInput` that names a tensor which is missing or too many."""
    there = set(found)
    for some, what in ((wanted - there, "missing"), (there - wanted, "not of this model")):
        if some:
            more = f" and {len(some) - 1} more are" if len(some) > 1 else " is"
            raise BadInput(f"tensor {min(some)}{more} {what}", where=where)


class Reading(Weights):
    """Our tensors, each made from another format's when it is asked for, in the order they are written."""

    def __init__(self, config: ModelConfig, has_head: bool, where: object) -> None:
        self.config, self.has_head, self.where = config, has_head, where
        self.names: dict[str, torch.Size] = shapes(config)
        """The shape of each."""

    def parts(self, name: str) -> tuple[Part, ...]:
        return parts_of(lender(name, self.config, self.has_head))

    def part(self, part: Part, shape: torch.Size) -> Tensor:
        """One part of a tensor of ours of that shape."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        # The parts are taken one at a time, so that a tensor is not held twice.
        whole, start, shape = None, 0, self.names[name]
        for part in self.parts(name):
            value = self.part(part, shape)
            if len(value) == shape[0]:
                return value
            if whole is None:
                whole = value.new_empty(shape)
            if value.dtype != whole.dtype:
                raise BadInput(f"the parts of {name} are of different dtypes", where=self.where)
            whole[start : start + len(value)] = value
            start += len(value)
        assert whole is not None and start == len(whole)
        return whole

    def check_head(self) -> None:
        """Raises `BadInput` where a tied head is written and is not the embedding."""
        if self.config.tied_head and self.has_head and not torch.equal(self["head.weight"], self["embed.weight"]):
            name = ENDS["head.weight"][0].hf
            raise BadInput(
                f"{name} is not the embedding, though the configuration says so",
                where=self.where,
                remedy="set tie_word_embeddings to what was trained",
            )


class BundleReading(Reading):
    """A bundle's tensors, which are ours already; shapes and dtypes are checked as they are asked for."""

    def __init__(self, source: Mapping[str, Tensor], config: ModelConfig, where: object) -> None:
        super().__init__(config, not config.tied_head, where)
        self.source = source
        check_names(source, {lender(name, config, self.has_head) for name in self.names}, where)

    def __getitem__(self, name: str) -> Tensor:
        return fit(name, self.source[lender(name, self.config, self.has_head)], self.names[name], self.where)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class HuggingFaceReading(Reading):
    """See `from_hf`."""

    def __init__(self, source: Mapping[str, Tensor], config: ModelConfig, where: object) -> None:
        super().__init__(config, ENDS["head.weight"][0].hf in source, where)
        self.source = source
        check_names(source, {part.hf for name in self.names for part in self.parts(name)}, where)
        self.check_head()

    def part(self, part: Part, shape: torch.Size) -> Tensor:
        config, value = self.config, self.source[part.hf]
        if part.split != "norm":
            return fit(part.hf, value, (rows_of(config, part, shape), *shape[1:]), self.where)
        rows = norm_rows(config, part)
        value = fit(part.hf, value, (head_count(config, part), config.head_width), self.where).unflatten(0, (rows, -1))
        if not torch.equal(value, value[:, :1].expand_as(value)):
            raise BadInput(f"tensor {part.hf} differs within its {rows} shards", where=self.where)
        return value[:, 0]

    def dtype(self, name: str) -> torch.dtype:
        return self.source[self.parts(name)[0].hf].dtype


def from_hf(source: Mapping[str, Tensor], config: ModelConfig, *, where: object = "checkpoint") -> Reading:
    """Our tensors by name, made from Hugging Face's. `source`: names and tensors of the language model alone.

    Raises `BadInput` that names a tensor which is missing, unknown, or a tied head other than the embedding; and, when
    a tensor is asked for, one of the wrong shape or dtype, or norms that differ within a shard of `config.qk_norm_shards`.
    """
    return HuggingFaceReading(source, config, where)


def hf_norm_shards(source: Mapping[str, Tensor], config: ModelConfig) -> int:
    """The least number of QK-norm rows that say all that Hugging Face's rows, one a head, say.

    A model that was trained in that format has as many as it has heads.
    """
    counts = [
        n for n in range(1, config.heads + 1) if config.heads % n == 0 and config.kv_heads % min(n, config.kv_heads) == 0
    ]
    counts.sort(key=lambda n: (n != config.qk_norm_shards, n))
    parts = [
        part
        for number in range(config.layers)
        for name in BLOCK
        for part in parts_of(f"blocks.{number}.{name}")
        if part.split == "norm" and part.hf in source
    ]

    def agree(part: Part, count: int) -> bool:
        value = source[part.hf]
        rows = norm_rows(replace(config, qk_norm_shards=count), part)
        if value.dim() != 2 or len(value) % rows:
            return True  # a wrong shape is named when it is read
        value = value.unflatten(0, (rows, -1))
        return torch.equal(value, value[:, :1].expand_as(value))

    return next((count for count in counts if all(agree(part, count) for part in parts)), config.qk_norm_shards)


def to_hf(ours: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of Hugging Face's language model. A tied head is left out."""
    for name, shape in shapes(config).items():
        if name == "head.weight" and config.tied_head:
            continue
        value, start = ours[name], 0
        for part in parts_of(name):
            if part.split == "norm":
                yield part.hf, value.repeat_interleave(head_count(config, part) // norm_rows(config, part), dim=0)
            else:
                count = rows_of(config, part, shape)
                yield part.hf, value[start : start + count]
                start += count


# --- Meta ------------------------------------------------------------------------------------------------------------


def is_fused(source: Mapping[str, Tensor]) -> bool:
    """Whether a shard keeps q, k, v (and gate, up) as one matrix."""
    return any(name.endswith(tuple(FUSED)) for name in source)


def found_under(source: Mapping[str, Tensor], name: str) -> tuple[str, int]:
    """The key of a shard that holds tensor `name`, and the place in it: itself, or the fused one that it is part of."""
    if name not in source:
        for fused, inner in FUSED.items():
            for place, part in enumerate(inner):
                key = name.removesuffix(part) + fused
                if name.endswith("." + part) and key in source:
                    return key, place
    return name, -1


def unfuse(source: Mapping[str, Tensor], name: str, config: ModelConfig, shards: int, where: object) -> Tensor:
    """The tensor `name` of one shard, be it rows of a fused one."""
    key, place = found_under(source, name)
    if place < 0:
        return source[key]
    if key.endswith(next(iter(FUSED))):
        sizes = [heads * config.head_width // shards for heads in (config.heads, config.kv_heads, config.kv_heads)]
    else:
        sizes = [config.ffn_width // shards] * 2
    return fit(key, source[key], (sum(sizes), config.width), where).split(sizes)[place]


def check_shards(config: ModelConfig, shards: int, where: object) -> None:
    for name in ("width", "heads", "kv_heads", "ffn_width", "vocab_size"):
        if getattr(config, name) % shards:
            raise BadInput(f"{name} {getattr(config, name)} does not divide by {shards} shards", where=where)


class MetaReading(Reading):
    """See `from_meta`."""

    def __init__(
        self, sources: Sequence[Mapping[str, Tensor]], config: ModelConfig, where: object, notes: list[str] | None
    ) -> None:
        super().__init__(config, any(ENDS["head.weight"][0].meta in source for source in sources), where)
        check_shards(config, len(sources), where)
        if config.qk_norm and config.qk_norm_shards != len(sources):
            raise BadInput(f"{config.qk_norm_shards} QK-norm rows, {len(sources)} shards", where=where)
        self.sources = sources
        self.notes = [] if notes is None else notes
        self.places = [f"{where}, shard {number:02d}" for number in range(len(sources))]
        names = {part.meta for name in self.names for part in self.parts(name)}
        for source, place in zip(sources, self.places, strict=True):
            wanted = {found_under(source, name)[0] for name in names}
            check_names(set(source) - set(IGNORED), wanted, place)
        self.check_head()

    def part(self, part: Part, shape: torch.Size) -> Tensor:
        config, shards, rows = self.config, len(self.sources), rows_of(self.config, part, shape)
        wanted = {
            "rows": (rows // shards, *shape[1:]),
            "columns": (rows, shape[-1] // shards),
            "none": tuple(shape),
            "norm": (config.head_width,),
        }[part.split]
        found = (
            fit(part.meta, unfuse(source, part.meta, config, shards, place), wanted, place)
            for source, place in zip(self.sources, self.places, strict=True)
        )
        return self.join(part, found)

    def join(self, part: Part, found: Iterable[Tensor]) -> Tensor:
        """What the shards have of a part as one tensor, rotary pairs as ours are.

        The shards' tensors are taken one at a time, so that the largest is never held twice.
        """
        stream = zip(found, self.places, strict=True)
        value, _ = next(stream)
        if part.split == "none":
            return self.shared(part, [value, *(entry for entry, _ in stream)])
        if part.split == "norm":
            return torch.stack([to_halves(entry, 1) for entry in (value, *(entry for entry, _ in stream))])
        if len(self.places) > 1:
            dim = 0 if part.split == "rows" else 1
            size, step = list(value.shape), value.shape[dim]
            size[dim] *= len(self.places)
            whole = value.new_empty(size)
            whole.narrow(dim, 0, step).copy_(value)
            value = whole
            for number, (entry, place) in enumerate(stream, 1):
                if entry.dtype != whole.dtype:
                    raise BadInput(f"tensor {part.meta} is {entry.dtype}, in shard 00 {whole.dtype}", where=place)
                whole.narrow(dim, number * step, step).copy_(entry)
        return to_halves(value, head_count(self.config, part)) if part.rotary else value

    def shared(self, part: Part, found: Sequence[Tensor]) -> Tensor:
        """The one vector that all shards should have; their mean, with a note, where they do not."""
        if all(torch.equal(value, found[0]) for value in found):
            return found[0]
        self.notes.append(f"{part.meta} differs between shards: averaged, as Hugging Face's own converter does")
        return torch.stack(list(found)).mean(dim=0)

    def dtype(self, name: str) -> torch.dtype:
        first = self.sources[0]
        return first[found_under(first, self.parts(name)[0].meta)[0]].dtype


def from_meta(
    sources: Sequence[Mapping[str, Tensor]],
    config: ModelConfig,
    *,
    where: object = "checkpoint",
    notes: list[str] | None = None,
) -> Reading:
    """Our tensors by name, joined from Meta's shards. `notes` takes what the user should know.

    QK-norm rows are the shards' own, so `config.qk_norm_shards` must be their number. Raises `BadInput` that names shard
    and tensor for what is missing or unknown; and, when a tensor is asked for, for a wrong shape or dtype. Norms that
    shards should share but do not are averaged.
    """
    return MetaReading(sources, config, where, notes)


def to_meta(
    ours: Mapping[str, Tensor], config: ModelConfig, shards: int, *, fused: bool = False
) -> Iterator[tuple[int, str, Tensor]]:
    """(shard, name, tensor) of Meta's shards, without `rope.freqs`; a tied head is written out.

    Each of our tensors is asked for once and cut for all shards. Raises `BadInput` where sizes do not divide, or heads
    of one shard have different QK-norm rows.
    """
    check_shards(config, shards, "model")
    if config.qk_norm and shards % config.qk_norm_shards and config.qk_norm_shards > 1:
        raise BadInput(f"{config.qk_norm_shards} QK-norm rows do not go into {shards} shards", where="model")
    for name, shape in shapes(config).items():
        value = ours["embed.weight" if name == "head.weight" and config.tied_head else name]
        for shard in range(shards):
            made, start = [], 0
            for part in parts_of(name):
                rows = rows_of(config, part, shape)
                made.append((part.meta, cut(part, value[start : start + rows], config, shards, shard)))
                start += rows
            if fused and len(made) > 1:
                inner = next(key for key, names in FUSED.items() if made[0][0].endswith(names[0]))
                prefix = made[0][0].removesuffix(FUSED[inner][0])
                made = [(prefix + inner, torch.cat([piece for _, piece in made]))]
            for theirs, piece in made:
                yield shard, theirs, piece


def cut(part: Part, value: Tensor, config: ModelConfig, shards: int, shard: int) -> Tensor:
    """One shard's share of a part, rotary pairs as Meta's are."""
    if part.split == "norm":
        return to_pairs(value[shard * config.qk_norm_shards // shards], 1)
    if part.split != "none":
        value = value.chunk(shards, dim=0 if part.split == "rows" else 1)[shard]
    return to_pairs(value, head_count(config, part) // shards) if part.rotary else value.contiguous()
