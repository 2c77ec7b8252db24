"""The configuration of the Transformer and the table of named sizes."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from chameleon.errors import BadInput, as_bad_input, check_fields

NormOrder = Literal["pre", "swin"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of an early-fusion Transformer. Sections cited are those of arXiv 2405.09818."""

    vocab_size: int = 65536
    """Number of token ids: special tokens, image codes and text pieces (section 2.1)."""
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    """Heads of keys and values; fewer than `heads` means grouped-query attention."""
    ffn_width: int = 11008
    """Hidden width of SwiGLU."""
    context_length: int = 4096
    """Longest sequence, in tokens (section 2.3)."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = True
    """LayerNorm with weight and bias on each head's queries and keys, before RoPE (section 2.3)."""
    qk_norm_shards: int = 1
    """Rows of QK-norm weights; each serves an equal share of the heads (34b: one row for each model-parallel shard).

    Keys have at most as many rows as heads: with a row for each of 64 query heads, 8 key heads have 8 rows.
    """
    norm_order: NormOrder = "pre"
    """`pre`: h = x + f(norm(x)); `swin`: h = x + norm(f(x)) (section 2.3)."""
    dropout: float = 0.0
    """Dropout rate after attention and after the feed-forward layer (section 2.3)."""
    tied_head: bool = False
    """Whether the output head shares the weight of the embedding."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.dropout >= 1 or not self.rope_theta:
            raise BadInput("dropout must be below 1, rope_theta above 0", where="model")
        for name, value, divisor in (
            ("width", self.width, self.heads),
            ("heads", self.heads, self.kv_heads),
            ("heads", self.heads, self.qk_norm_shards),
            ("kv_heads", self.kv_heads, self.k_norm_shards),
            ("width / heads", self.width // self.heads, 2),
        ):
            if value % divisor:
                raise BadInput(f"{name} {value} is not divisible by {divisor}", where="model")
        if self.norm_order not in ("pre", "swin"):
            raise BadInput(f"norm_order {self.norm_order!r} is neither pre nor swin", where="model")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def k_norm_shards(self) -> int:
        """Rows of the weights of the norm of keys."""
        return min(self.qk_norm_shards, self.kv_heads)

    @property
    def largest_matrix(self) -> int:
        """Number of weights of a block's largest matrix: that of queries, keys and values, or of gate and up."""
        return self.width * max((self.heads + 2 * self.kv_heads) * self.head_width, 2 * self.ffn_width)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        kv = self.kv_heads * self.head_width
        attention = self.width * (self.width + 2 * kv) + self.width * self.width
        rows = 2 * (self.qk_norm_shards + self.k_norm_shards) if self.qk_norm else 0
        norms = 2 * self.width + rows * self.head_width
        block = attention + 3 * self.width * self.ffn_width + norms
        return self.vocab_size * self.width * (1 if self.tied_head else 2) + self.layers * block + self.width

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any], *, where: object = "config.json") -> ModelConfig:
        with as_bad_input("a model's configuration", where):
            config = cls(**value)
        return config


def small(layers: int, width: int, heads: int, ffn_width: int, context_length: int) -> ModelConfig:
    return ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=heads, ffn_width=ffn_width, context_length=context_length
    )


SIZES = {
    "tiny": small(layers=4, width=192, heads=3, ffn_width=512, context_length=256),
    "mini": small(layers=8, width=320, heads=5, ffn_width=896, context_length=256),
    "small": small(layers=12, width=512, heads=8, ffn_width=1408, context_length=1024),
    "base": small(layers=12, width=768, heads=12, ffn_width=2048, context_length=2048),
    "large": small(layers=24, width=1024, heads=16, ffn_width=2816, context_length=4096),
    "1b": small(layers=24, width=2048, heads=16, ffn_width=5504, context_length=4096),
    # The paper's two sizes; what section 2.3 takes over from LLaMA-2 is in table 1 of arXiv 2307.09288.
    "7b": ModelConfig(dropout=0.1),
    # The released weights of 34b are in 4 model-parallel shards.
    "34b": ModelConfig(layers=48, width=8192, heads=64, kv_heads=8, ffn_width=22016, norm_order="swin", qk_norm_shards=4),
}


def named_size(name: str, **changes: Any) -> ModelConfig:
    """Return the configuration of a named size with some fields changed. Raise `BadInput` for unknown names and keys."""
    if name not in SIZES:
        nearest = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.0)[0]
        raise BadInput(f"no size {name!r}", where="model.size", remedy=f"did you mean {nearest}? Sizes: {', '.join(SIZES)}")
    known_keys = [field.name for field in fields(ModelConfig)]
    for key in changes:
        if key not in known_keys:
            nearest = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.0)[0]
            raise BadInput(f"unknown key model.{key}", where="recipe", remedy=f"did you mean model.{nearest}?")
    try:
        return replace(SIZES[name], **changes)
    except (TypeError, ZeroDivisionError) as error:
        raise BadInput(f"a value of the wrong type ({error})", where="recipe.model") from None
