"""The layout of weights in Meta's and Hugging Face's checkpoints: key maps as data, and lossless conversion both ways.

Three things differ:

* names, and which matrices are fused (Meta: q, k, v and gate, up separate or fused; Hugging Face: separate);
* rotary pairs: (2i, 2i + 1) in Meta's, (i, i + half) in Hugging Face's and here, so rows of q and k and the entries of
  their norms are reordered within each head;
* model-parallel shards: Meta splits matrices over files and keeps one QK-norm row a shard; Hugging Face repeats that row
  for every head of the shard; here it is one row a shard in one tensor.

Sources are mappings from names to tensors, which may be lazy: one tensor is converted at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tensor_files import LazyTensors

Heads = Literal["q", "kv", ""]
NormRows = Literal["head", "shard"]


@dataclass(frozen=True)
class TensorPart:
    """A tensor of Meta's and Hugging Face's formats that is one of the model's tensors, or some of its rows."""

    meta: str
    hf: str
    split: Literal["rows", "columns", "none", "norm"] = "none"
    """How Meta's shards split it; `norm`: a vector for each shard, which Hugging Face repeats for each head."""
    rotary: bool = False
    """Whether its rows (of a norm: its elements) are in the order of rotary pairs."""
    heads: Heads = ""
    """Whose heads its rows, or the repetitions of a norm, correspond to."""


def block_parts() -> dict[str, tuple[TensorPart, ...]]:
    """Return name within a block → its parts, concatenated along the rows."""
    attention, hf_attention = "layers.{n}.attention.", "model.layers.{n}.self_attn."
    mlp, hf_mlp = "layers.{n}.feed_forward.", "model.layers.{n}.mlp."
    table = {
        "attention.qkv.weight": (
            TensorPart(attention + "wq.weight", hf_attention + "q_proj.weight", "rows", True, "q"),
            TensorPart(attention + "wk.weight", hf_attention + "k_proj.weight", "rows", True, "kv"),
            TensorPart(attention + "wv.weight", hf_attention + "v_proj.weight", "rows", False, "kv"),
        ),
        "attention.out.weight": (TensorPart(attention + "wo.weight", hf_attention + "o_proj.weight", "columns"),),
        "attention_norm.weight": (
            TensorPart("layers.{n}.attention_norm.weight", "model.layers.{n}.input_layernorm.weight"),
        ),
        "ffn.gate_up.weight": (
            TensorPart(mlp + "w1.weight", hf_mlp + "gate_proj.weight", "rows"),
            TensorPart(mlp + "w3.weight", hf_mlp + "up_proj.weight", "rows"),
        ),
        "ffn.down.weight": (TensorPart(mlp + "w2.weight", hf_mlp + "down_proj.weight", "columns"),),
        "ffn_norm.weight": (TensorPart("layers.{n}.ffn_norm.weight", "model.layers.{n}.post_attention_layernorm.weight"),),
    }
    norm_heads: dict[str, Heads] = {"q": "q", "k": "kv"}
    for name, heads in norm_heads.items():
        for kind in ("weight", "bias"):
            meta_name, hf_name = f"{attention}{name}_normalization.{kind}", f"{hf_attention}{name}_norm.{kind}"
            part = TensorPart(meta_name, hf_name, "norm", True, heads)
            table[f"attention.{name}_norm.{kind}"] = (part,)
    return table


BLOCK_PARTS = block_parts()
OUTER_PARTS = {
    "embed.weight": (TensorPart("tok_embeddings.weight", "model.embed_tokens.weight", "columns"),),
    "norm.weight": (TensorPart("norm.weight", "model.norm.weight"),),
    "head.weight": (TensorPart("output.weight", "lm_head.weight", "rows"),),
}
# Fused name → its parts, concatenated along the rows in each shard.
FUSED = {
    "attention.wqkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "feed_forward.w13.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}
IGNORED = ("rope.freqs",)


def pairs_to_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads · C, …] from rotary pairs (2i, 2i + 1) of each head to pairs (i, i + C / 2)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def halves_to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `pairs_to_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return name → shape of every tensor of a Transformer, a tied head included."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Transformer(config).state_dict().items()}


def parts_of(name: str) -> tuple[TensorPart, ...]:
    """Return the parts of the model's tensor `name`."""
    if not name.startswith("blocks."):
        return OUTER_PARTS[name]
    _, layer, name_in_block = name.split(".", 2)
    return tuple(
        TensorPart(part.meta.format(n=layer), part.hf.format(n=layer), part.split, part.rotary, part.heads)
        for part in BLOCK_PARTS[name_in_block]
    )


def stored_name(name: str, config: ModelConfig, has_head: bool) -> str:
    """Return the name under which tensor `name` is stored: its own, or the embedding's for a tied head without a copy."""
    return "embed.weight" if name == "head.weight" and config.tied_head and not has_head else name


def head_count(config: ModelConfig, part: TensorPart) -> int:
    return config.heads if part.heads == "q" else config.kv_heads


def norm_rows(config: ModelConfig, part: TensorPart) -> int:
    return config.qk_norm_shards if part.heads == "q" else config.k_norm_shards


def rows_of(config: ModelConfig, part: TensorPart, shape: torch.Size) -> int:
    """Return how many rows of the model's tensor the part has."""
    if part.heads and part.split == "rows":
        return head_count(config, part) * config.head_width
    return config.ffn_width if ".w1." in part.meta or ".w3." in part.meta else shape[0]


def check_tensor(name: str, value: Tensor, shape: Sequence[int], where: object) -> Tensor:
    """Return the tensor. Raise `BadInput` that names it where its shape or dtype is wrong."""
    if tuple(value.shape) != tuple(shape):
        raise BadInput(f"tensor {name} is {list(value.shape)}, expected {list(shape)}", where=where)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(
            f"tensor {name} is of dtype {value.dtype}", where=where, remedy="expected float32, bfloat16 or float16"
        )
    return value


def check_names(names: Iterable[str], expected: set[str], where: object) -> None:
    """Raise `BadInput` that names a tensor which is missing or unknown."""
    existing = set(names)
    for wrong, problem in ((expected - existing, "missing"), (existing - expected, "not of this model")):
        if wrong:
            others = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
            raise BadInput(f"tensor {min(wrong)}{others} {problem}", where=where)


class BundleTensors(LazyTensors):
    """The tensors of a bundle; shapes and dtypes are checked on access."""

    def __init__(self, source: Mapping[str, Tensor], config: ModelConfig, where: object) -> None:
        self.source, self.config, self.where = source, config, where
        self.names: dict[str, torch.Size] = shapes(config)
        """Name → shape."""
        check_names(source, {self.stored_name(name) for name in self.names}, where)

    def stored_name(self, name: str) -> str:
        return stored_name(name, self.config, not self.config.tied_head)

    def __getitem__(self, name: str) -> Tensor:
        return check_tensor(name, self.source[self.stored_name(name)], self.names[name], self.where)


class PartwiseTensors(LazyTensors, ABC):
    """The model's tensors, each assembled on access from its parts in another format."""

    def __init__(self, config: ModelConfig, has_head: bool, where: object) -> None:
        self.config, self.has_head, self.where = config, has_head, where
        self.names: dict[str, torch.Size] = shapes(config)
        """Name → shape, in the order in which they are written."""

    def parts(self, name: str) -> tuple[TensorPart, ...]:
        return parts_of(stored_name(name, self.config, self.has_head))

    @abstractmethod
    def read_part(self, part: TensorPart, shape: torch.Size) -> Tensor:
        """Return a part of a tensor that has the given shape as a whole."""

    def __getitem__(self, name: str) -> Tensor:
        # Parts are read one at a time, so that a tensor is never held twice.
        tensor, first_row, shape = None, 0, self.names[name]
        for part in self.parts(name):
            value = self.read_part(part, shape)
            if len(value) == shape[0]:
                return value
            if tensor is None:
                tensor = value.new_empty(shape)
            if value.dtype != tensor.dtype:
                raise BadInput(f"the parts of {name} are of different dtypes", where=self.where)
            tensor[first_row : first_row + len(value)] = value
            first_row += len(value)
        assert tensor is not None and first_row == len(tensor)
        return tensor

    def check_head(self) -> None:
        """Raise `BadInput` where a tied head is stored and differs from the embedding."""
        if self.config.tied_head and self.has_head and not torch.equal(self["head.weight"], self["embed.weight"]):
            name = OUTER_PARTS["head.weight"][0].hf
            raise BadInput(
                f"{name} is not the embedding, though the configuration says so",
                where=self.where,
                remedy="set tie_word_embeddings to what was trained",
            )


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class HuggingFaceTensors(PartwiseTensors):
    """See `from_hf`."""

    def __init__(self, source: Mapping[str, Tensor], config: ModelConfig, where: object, norms: NormRows) -> None:
        super().__init__(config, OUTER_PARTS["head.weight"][0].hf in source, where)
        self.source, self.norms = source, norms
        check_names(source, {part.hf for name in self.names for part in self.parts(name)}, where)
        self.check_head()

    def read_part(self, part: TensorPart, shape: torch.Size) -> Tensor:
        config, value = self.config, self.source[part.hf]
        if part.split != "norm":
            return check_tensor(part.hf, value, (rows_of(config, part, shape), *shape[1:]), self.where)
        num_rows = norm_rows(config, part)
        if self.norms == "shard":
            return check_tensor(part.hf, value, (num_rows, config.head_width), self.where)
        value = check_tensor(part.hf, value, (head_count(config, part), config.head_width), self.where).unflatten(
            0, (num_rows, -1)
        )
        if not torch.equal(value, value[:, :1].expand_as(value)):
            raise BadInput(f"tensor {part.hf} differs within its {num_rows} shards", where=self.where)
        return value[:, 0]

    def dtype(self, name: str) -> torch.dtype:
        return self.source[self.parts(name)[0].hf].dtype


def from_hf(
    source: Mapping[str, Tensor], config: ModelConfig, *, norms: NormRows = "head", where: object = "checkpoint"
) -> PartwiseTensors:
    """Return the model's tensors, converted from Hugging Face's. `source`: tensors of the language model alone.

    norms: whether QK-norms have a row for each head, or for each shard, as in Lumina's checkpoints.

    Raises `BadInput` that names a tensor which is missing, unknown, or a tied head other than the embedding; and, when
    a tensor is asked for, one of the wrong shape or dtype, or norms that differ within a shard of `config.qk_norm_shards`.
    """
    return HuggingFaceTensors(source, config, where, norms)


def hf_norm_shards(source: Mapping[str, Tensor], config: ModelConfig) -> int:
    """Return the least number of QK-norm rows that represent Hugging Face's rows, of which there is one for each head.

    A model that was trained in that format has a different row for each head.
    """
    counts = [
        n for n in range(1, config.heads + 1) if config.heads % n == 0 and config.kv_heads % min(n, config.kv_heads) == 0
    ]
    counts.sort(key=lambda n: (n != config.qk_norm_shards, n))
    parts = [
        part
        for layer in range(config.layers)
        for name in BLOCK_PARTS
        for part in parts_of(f"blocks.{layer}.{name}")
        if part.split == "norm" and part.hf in source
    ]

    def is_represented(part: TensorPart, count: int) -> bool:
        value = source[part.hf]
        num_rows = norm_rows(replace(config, qk_norm_shards=count), part)
        if value.dim() != 2 or len(value) % num_rows:
            return True  # a wrong shape is named when it is read
        value = value.unflatten(0, (num_rows, -1))
        return torch.equal(value, value[:, :1].expand_as(value))

    return next((count for count in counts if all(is_represented(part, count) for part in parts)), config.qk_norm_shards)


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig, norms: NormRows = "head") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of Hugging Face's language model, norms as in `from_hf`. A tied head is left out."""
    for name, shape in shapes(config).items():
        if name == "head.weight" and config.tied_head:
            continue
        value, first_row = tensors[name], 0
        for part in parts_of(name):
            if part.split == "norm" and norms == "shard":
                yield part.hf, value
            elif part.split == "norm":
                yield part.hf, value.repeat_interleave(head_count(config, part) // norm_rows(config, part), dim=0)
            else:
                num_rows = rows_of(config, part, shape)
                yield part.hf, value[first_row : first_row + num_rows]
                first_row += num_rows


# --- Meta ------------------------------------------------------------------------------------------------------------


def is_fused(source: Mapping[str, Tensor]) -> bool:
    """Return whether a shard has q, k, v (and gate, up) as one matrix."""
    return any(name.endswith(tuple(FUSED)) for name in source)


def fused_location(source: Mapping[str, Tensor], name: str) -> tuple[str, int]:
    """Return (key, index) of tensor `name` in a shard: its own key and -1, or a fused tensor's key and its index there."""
    if name not in source:
        for fused_name, part_names in FUSED.items():
            for index, part_name in enumerate(part_names):
                key = name.removesuffix(part_name) + fused_name
                if name.endswith("." + part_name) and key in source:
                    return key, index
    return name, -1


def unfuse(source: Mapping[str, Tensor], name: str, config: ModelConfig, shards: int, where: object) -> Tensor:
    """Return tensor `name` of one shard, which may be rows of a fused one."""
    key, index = fused_location(source, name)
    if index < 0:
        return source[key]
    if key.endswith(next(iter(FUSED))):
        sizes = [heads * config.head_width // shards for heads in (config.heads, config.kv_heads, config.kv_heads)]
    else:
        sizes = [config.ffn_width // shards] * 2
    return check_tensor(key, source[key], (sum(sizes), config.width), where).split(sizes)[index]


def check_shards(config: ModelConfig, shards: int, where: object) -> None:
    for name in ("width", "heads", "kv_heads", "ffn_width", "vocab_size"):
        if getattr(config, name) % shards:
            raise BadInput(f"{name} {getattr(config, name)} does not divide by {shards} shards", where=where)


class MetaTensors(PartwiseTensors):
    """See `from_meta`."""

    def __init__(
        self, sources: Sequence[Mapping[str, Tensor]], config: ModelConfig, where: object, notes: list[str] | None
    ) -> None:
        super().__init__(config, any(OUTER_PARTS["head.weight"][0].meta in source for source in sources), where)
        check_shards(config, len(sources), where)
        if config.qk_norm and config.qk_norm_shards != len(sources):
            raise BadInput(f"{config.qk_norm_shards} QK-norm rows, {len(sources)} shards", where=where)
        self.sources = sources
        self.notes = [] if notes is None else notes
        self.shard_names = [f"{where}, shard {shard:02d}" for shard in range(len(sources))]
        names = {part.meta for name in self.names for part in self.parts(name)}
        for source, shard_name in zip(sources, self.shard_names, strict=True):
            expected = {fused_location(source, name)[0] for name in names}
            check_names(set(source) - set(IGNORED), expected, shard_name)
        self.check_head()

    def read_part(self, part: TensorPart, shape: torch.Size) -> Tensor:
        config, shards, num_rows = self.config, len(self.sources), rows_of(self.config, part, shape)
        expected_shape = {
            "rows": (num_rows // shards, *shape[1:]),
            "columns": (num_rows, shape[-1] // shards),
            "none": tuple(shape),
            "norm": (config.head_width,),
        }[part.split]
        values = (
            check_tensor(part.meta, unfuse(source, part.meta, config, shards, shard_name), expected_shape, shard_name)
            for source, shard_name in zip(self.sources, self.shard_names, strict=True)
        )
        return self.join(part, values)

    def join(self, part: TensorPart, values: Iterable[Tensor]) -> Tensor:
        """Concatenate the shards of a part, with rotary pairs in the model's order.

        They are read one at a time, so that the largest tensor is never held twice.
        """
        remaining = zip(values, self.shard_names, strict=True)
        value, _ = next(remaining)
        if part.split == "none":
            return self.shared(part, [value, *(shard_value for shard_value, _ in remaining)])
        if part.split == "norm":
            shard_values = (value, *(shard_value for shard_value, _ in remaining))
            return torch.stack([pairs_to_halves(shard_value, 1) for shard_value in shard_values])
        if len(self.shard_names) > 1:
            dim = 0 if part.split == "rows" else 1
            size, shard_size = list(value.shape), value.shape[dim]
            size[dim] *= len(self.shard_names)
            joined = value.new_empty(size)
            joined.narrow(dim, 0, shard_size).copy_(value)
            value = joined
            for shard, (shard_value, shard_name) in enumerate(remaining, 1):
                if shard_value.dtype != joined.dtype:
                    raise BadInput(
                        f"tensor {part.meta} is {shard_value.dtype}, in shard 00 {joined.dtype}", where=shard_name
                    )
                joined.narrow(dim, shard * shard_size, shard_size).copy_(shard_value)
        return pairs_to_halves(value, head_count(self.config, part)) if part.rotary else value

    def shared(self, part: TensorPart, values: Sequence[Tensor]) -> Tensor:
        """Return the vector that all shards should share; their mean, with a note, where they differ."""
        if all(torch.equal(value, values[0]) for value in values):
            return values[0]
        self.notes.append(f"{part.meta} differs between shards: averaged, as Hugging Face's own converter does")
        return torch.stack(list(values)).mean(dim=0)

    def dtype(self, name: str) -> torch.dtype:
        first = self.sources[0]
        return first[fused_location(first, self.parts(name)[0].meta)[0]].dtype


def from_meta(
    sources: Sequence[Mapping[str, Tensor]],
    config: ModelConfig,
    *,
    where: object = "checkpoint",
    notes: list[str] | None = None,
) -> PartwiseTensors:
    """Return the model's tensors, converted from Meta's shards. `notes`: a list that notes for the user are appended to.

    QK-norm rows are the shards' own, so `config.qk_norm_shards` must be their number. Raises `BadInput` that names shard
    and tensor for what is missing or unknown; and, when a tensor is asked for, for a wrong shape or dtype. Norms that
    shards should share but do not are averaged.
    """
    return MetaTensors(sources, config, where, notes)


def to_meta(
    tensors: Mapping[str, Tensor], config: ModelConfig, shards: int, *, fused: bool = False
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (shard, name, tensor) of Meta's shards, without `rope.freqs`; a tied head is written as a tensor of its own.

    Each of the model's tensors is read once and split for all shards. Raises `BadInput` where sizes do not divide, or heads
    of one shard have different QK-norm rows.
    """
    check_shards(config, shards, "model")
    if config.qk_norm and shards % config.qk_norm_shards and config.qk_norm_shards > 1:
        raise BadInput(f"{config.qk_norm_shards} QK-norm rows do not go into {shards} shards", where="model")
    for name, shape in shapes(config).items():
        value = tensors["embed.weight" if name == "head.weight" and config.tied_head else name]
        for shard in range(shards):
            named, first_row = [], 0
            for part in parts_of(name):
                rows = rows_of(config, part, shape)
                named.append((part.meta, shard_part(part, value[first_row : first_row + rows], config, shards, shard)))
                first_row += rows
            if fused and len(named) > 1:
                fused_name = next(key for key, names in FUSED.items() if named[0][0].endswith(names[0]))
                prefix = named[0][0].removesuffix(FUSED[fused_name][0])
                named = [(prefix + fused_name, torch.cat([tensor for _, tensor in named]))]
            for meta_name, tensor in named:
                yield shard, meta_name, tensor


def shard_part(part: TensorPart, value: Tensor, config: ModelConfig, shards: int, shard: int) -> Tensor:
    """Return one shard's share of a part, with rotary pairs in Meta's order."""
    if part.split == "norm":
        return halves_to_pairs(value[shard * config.qk_norm_shards // shards], 1)
    if part.split != "none":
        value = value.chunk(shards, dim=0 if part.split == "rows" else 1)[shard]
    return halves_to_pairs(value, head_count(config, part) // shards) if part.rotary else value.contiguous()
